"""The Runtime API of one sandbox: what `awslambdaric` asks for its next invocation and gives its answers to.

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html
"""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

#: What a handler may return (https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html: 6 MB, and as
#: Lambda's own message says, 100 bytes more).
RESPONSE_BYTES = 6 * 1024 * 1024 + 100
_PREFIX = "/2018-06-01/runtime"


@dataclass(frozen=True)
class Invocation:
    """One event on its way to a handler. `deadline_ms` is an epoch time."""

    request_id: str
    event: bytes
    deadline_ms: int
    arn: str
    trace_id: str
    client_context: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of an invocation: the handler's value, or an error as Lambda answers it."""

    body: bytes
    error_type: str = ""

    @property
    def failed(self) -> bool:
        """Whether X-Amz-Function-Error is set."""
        return bool(self.error_type)

    @classmethod
    def error(cls, error_type: str, message: str) -> Outcome:
        """An error that Lambda itself reports, without a stack trace."""
        return cls(json.dumps({"errorType": error_type, "errorMessage": message}).encode(), error_type)


class RuntimeApi:
    """Serves one sandbox on a loopback port of its own: that is how it knows who asks.

    All waits end when the sandbox has ended (`close`).
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next: Invocation | None = None
        self._answered: Outcome | None = None
        self._under_way: str | None = None
        self.idle = False  # whether the runtime waits for its next invocation
        self.init_error: Outcome | None = None
        self.closed = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=8)
        host, port = self._listener.getsockname()[:2]
        self.address = f"{host}:{port}"
        threading.Thread(target=self._accept, name="smlt-runtime-api", daemon=True).start()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until the runtime asks for an invocation; False when it did not in time, or never will."""
        with self._changed:
            return self._changed.wait_for(lambda: self.idle or self.closed, timeout_s) and self.idle

    def hand_out(self, invocation: Invocation) -> None:
        """Give the waiting runtime its invocation."""
        with self._changed:
            self._next, self._answered, self._under_way, self.idle = invocation, None, invocation.request_id, False
            self._changed.notify_all()

    def wait_outcome(self, timeout_s: float) -> Outcome | None:
        """Wait until the invocation is answered and the runtime asks for the next one, or has ended.

        None when it is not so in time, or the sandbox has ended without an answer.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self.closed or (self._answered is not None and self.idle), timeout_s)
            return self._answered if done or self._answered else None

    def close(self) -> None:
        """The sandbox has ended: wake everyone who waits. Safe to call twice."""
        with self._changed:
            was, self.closed = self.closed, True
            self._changed.notify_all()
        if not was:
            try:
                socket.create_connection(self._listener.getsockname()[:2], timeout=1).close()  # wakes accept, on macOS too
            except OSError:
                self._listener.close()

    def _accept(self) -> None:
        with self._listener:
            while not self.closed:
                try:
                    connection, address = self._listener.accept()
                except OSError:
                    return
                threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                _Handler(connection, address, self)  # type: ignore[arg-type]
            except OSError:
                return  # the sandbox was ended meanwhile

    def take(self) -> Invocation | None:
        """For the runtime: wait for the next invocation; None when the sandbox is to end."""
        with self._changed:
            self.idle, self._under_way = True, None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._next is not None or self.closed)
            taken, self._next = self._next, None
            return taken

    def answer(self, request_id: str, outcome: Outcome) -> bool:
        """From the runtime: what became of the invocation. False when it is not the one under way."""
        with self._changed:
            if request_id != self._under_way:
                return False
            self._answered = outcome
            self._changed.notify_all()
            return True

    def fail_init(self, outcome: Outcome) -> None:
        """From the runtime: the handler's module cannot be loaded."""
        with self._changed:
            self.init_error = outcome
            self._changed.notify_all()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: RuntimeApi  # type: ignore[assignment]

    def do_GET(self) -> None:
        if self.path != f"{_PREFIX}/invocation/next":
            return self._reply(404, b"")
        invocation = self.server.take()
        if invocation is None:
            self.close_connection = True
            return None
        headers = {
            "Lambda-Runtime-Aws-Request-Id": invocation.request_id,
            "Lambda-Runtime-Deadline-Ms": str(invocation.deadline_ms),
            "Lambda-Runtime-Invoked-Function-Arn": invocation.arn,
            "Lambda-Runtime-Trace-Id": invocation.trace_id,
        }
        if invocation.client_context:
            headers["Lambda-Runtime-Client-Context"] = invocation.client_context
        return self._reply(200, invocation.event, headers)

    def do_POST(self) -> None:
        body = self._body()
        parts = self.path.removeprefix(_PREFIX).strip("/").split("/")
        error_type = self.headers.get("Lambda-Runtime-Function-Error-Type") or _error_type(body)
        if parts == ["init", "error"]:
            self.server.fail_init(Outcome(body, error_type))
            return self._reply(202, b'{"status":"OK"}')
        if len(parts) != 3 or parts[0] != "invocation" or parts[2] not in ("response", "error"):
            return self._reply(404, b"")
        outcome, status = Outcome(body, error_type if parts[2] == "error" else ""), 202
        if len(body) > RESPONSE_BYTES:
            status = 413
            text = f"Response payload size exceeded maximum allowed payload size ({RESPONSE_BYTES} bytes)."
            outcome = Outcome.error("Function.ResponseSizeTooLarge", text)
        known = self.server.answer(parts[1], outcome)
        return self._reply(status if known else 400, b'{"status":"OK"}' if known else b'{"errorType":"InvalidRequestID"}')

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or "").lower():
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """The sandbox's requests are nobody's news."""


def _error_type(body: bytes) -> str:
    try:
        return str(json.loads(body).get("errorType") or "Runtime.Unknown")
    except (ValueError, AttributeError):
        return "Runtime.Unknown"


def trace_id() -> str:
    """An X-Ray header that says: not sampled."""
    moment = int(time.time())
    return f"Root=1-{moment:08x}-{time.monotonic_ns() & (1 << 96) - 1:024x};Parent=0000000000000001;Sampled=0"
