"""The one HTTP endpoint: Lambda's Invoke API is answered here, everything else by moto in the same process."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from http.server import HTTPServer
from socketserver import ThreadingMixIn
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import DechunkedInput

Headers = dict[str, str]
Reply = tuple[int, Headers, bytes]


class Server(ThreadingMixIn, HTTPServer):
    """Serves `app`, a WSGI application, on 127.0.0.1, with connections that are kept."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    multithread = True
    multiprocess = False
    ssl_context = None
    _server_version = "lambda-local"

    def __init__(self, port: int, app: Callable[[dict[str, Any], Any], Iterable[bytes]]) -> None:
        self.app = app
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="smlt-lambda-http", daemon=True)

    @property
    def endpoint_url(self) -> str:
        """What AWS_ENDPOINT_URL is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> None:
        """Serve from a thread."""
        self._thread.start()

    def close(self) -> None:
        """Take no more connections, and close those that clients keep: the next emulator's answers are not for them."""
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()
        with self._lock:
            kept = list(self._connections)
        for connection in kept:
            with contextlib.suppress(OSError):  # gone meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection from a thread of its own."""
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The connection has ended."""
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def server_bind(self) -> None:
        """Without a look-up of the host's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that a client has dropped is not news; anything else is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(MotoRequestHandler):
    """werkzeug's closes the connection behind each request; this one reads the whole body first, so it can keep it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def handle_expect_100(self) -> bool:
        proceed = bool(super().handle_expect_100())
        self.wfile.flush()
        return proceed

    def run_wsgi(self) -> None:
        environ = self.make_environ()
        body = self._body()
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        started: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> Callable[[bytes], object]:
            started[:] = [status, headers]
            return lambda _: None

        try:
            parts = self.server.app(environ, start_response)
            content = b"".join(parts)
            close = getattr(parts, "close", None)
            if close is not None:
                close()
        except Exception as error:
            traceback.print_exc()  # a bug, moto's or ours: shown, and the client is not left without an answer
            code, fields, content = aws_error(500, "ServiceException", f"lambda-local failed: {type(error).__name__}")
            started[:] = [f"{code} Internal Server Error", list(fields.items())]
        status, headers = started
        number, _, phrase = status.partition(" ")
        self.send_response(int(number), phrase)
        bodiless = self.command == "HEAD" or int(number) in (204, 304)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding") and (bodiless or name.lower() != "content-length"):
                self.send_header(name, str(value))
        if not bodiless:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not bodiless:
            self.wfile.write(content)
        self.wfile.flush()

    def _body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or "").lower():
            return io.BufferedReader(DechunkedInput(self.rfile)).read()  # type: ignore[type-var, arg-type]
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Requests are kept by the request log."""


def moto_application() -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    """moto's server, which finds the service in each request's signature."""
    dispatcher = DomainDispatcherApplication(create_backend_app)
    # It looks at each of its folders for each request, in a lock: a third of the time of a small request.
    dispatcher.get_backend_for_host = functools.cache(dispatcher.get_backend_for_host)  # type: ignore[method-assign]
    return dispatcher


def aws_error(status: int, code: str, message: str, **more: str) -> Reply:
    """An error as Lambda's REST API gives it; botocore finds the code in the header."""
    headers = {"Content-Type": "application/json", "x-amzn-ErrorType": code}
    return status, headers, json.dumps({"Type": "User" if status < 500 else "Service", "message": message, **more}).encode()
