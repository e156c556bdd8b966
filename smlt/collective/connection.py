"""The data plane's connections: one authenticated socket for each lane of the engine, three to each node of the store.

Plain sockets are driven by the native transport without the GIL. TLS goes through Python's `ssl`, which reads into and
sends from the engine's own buffers, so no second OpenSSL is linked.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis.connection

from smlt.collective import _native
from smlt.collective.failure import handshake_failure
from smlt.errors import StoreUnavailable
from smlt.store.parameter import redact

SOCKET_BUFFER_BYTES = 1 << 20
TLS_SEND_BYTES = 256 * 1024
#: How often TLS looks whether a connection has fallen silent (csrc/progress.c for plain ones).
LOOK_S = 0.25


#: redis-py reads the URL, so that both planes understand it alike (untyped in some releases).
_parse_url: Callable[[str], dict[str, Any]] = redis.connection.parse_url


class Connections:
    """The engine's lanes as sockets to the store's nodes (redis://, rediss:// or unix://)."""

    def __init__(self, *, timeout_s: float, silence_s: float = 10.0, name: str = "smlt") -> None:
        self._name, self._silence_s = name, silence_s
        self._tls = False
        self._timeout_s = timeout_s
        self._sockets: list[socket.socket] = []
        self._looked = 0.0

    def open(self, urls: Sequence[str], deadline: float | None = None) -> None:
        """Connect every lane anew, to the node at each of `urls`.

        StoreUnavailable or StoreAuthError when that fails before `deadline` (monotonic).
        """
        self.close()
        self._tls = any(_is_tls(_parse_url(url)) for url in urls)
        try:
            for url in urls:
                for _ in range(_native.LANES):
                    left_s = self._timeout_s if deadline is None else max(deadline - time.monotonic(), 0.1)
                    self._sockets.append(self._connect(url, left_s if deadline is None else min(self._silence_s, left_s)))
        except BaseException:
            self.close()
            raise

    def connect_one(self, url: str) -> socket.socket:
        """A connection of the same kind for other uses, blocking, the caller's to close."""
        sock = self._connect(url, self._timeout_s)
        sock.settimeout(self._timeout_s)
        return sock

    def close(self) -> None:
        """Close every lane."""
        for sock in self._sockets:
            sock.close()
        self._sockets = []

    @property
    def tls(self) -> bool:
        """Whether `run` must move the bytes; otherwise the native transport does, over `descriptors`."""
        return self._tls

    def descriptors(self) -> list[int] | None:
        """The lanes' sockets for the native transport, None when they speak TLS."""
        return None if self._tls else [sock.fileno() for sock in self._sockets]

    def run(self, engine: _native.Engine, step: int | None, timeout_ms: int, flush: bool) -> int:
        """Move bytes by TLS for at most `timeout_ms`, or wait for the thread that does: ENDED, AGAIN or CONNECTION_LOST.

        Ends with collective `step`; None stands for as long as there is something to do.
        """
        if not engine.take():
            return engine.run(step or 0, timeout_ms, flush)
        lost = False
        try:
            outcome = self._run_tls(engine, step, timeout_ms, flush)
            lost = outcome == _native.CONNECTION_LOST
        finally:
            engine.release(lost)
        return outcome

    def _connect(self, url: str, timeout_s: float) -> socket.socket:
        try:
            return self._connect_socket(url, timeout_s)
        except StoreUnavailable:  # which is an OSError
            raise
        except OSError as error:
            raise StoreUnavailable(f"cannot reach the store at {redact(url)}: {error}") from error

    def _connect_socket(self, url: str, timeout_s: float) -> socket.socket:
        options: dict[str, Any] = dict(_parse_url(url))
        if "path" in options:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_s)
            sock.connect(options["path"])
        else:
            host, port = options.get("host", "localhost"), int(options.get("port", 6379))
            sock = socket.create_connection((host, port), timeout=timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _notice_death(sock, self._silence_s)
        try:
            if hasattr(socket, "SO_NOSIGPIPE"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_NOSIGPIPE, 1)
            if "path" in options:  # TCP buffers are sized by the kernel as the connection's speed shows
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
            if _is_tls(options):
                sock = _tls_context(options).wrap_socket(sock, server_hostname=options.get("host", "localhost"))
            self._handshake(sock, url, options)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def _handshake(self, sock: socket.socket, url: str, options: dict[str, Any]) -> None:
        commands = []
        if options.get("password"):
            user = [options["username"]] if options.get("username") else []
            commands.append(["AUTH", *user, options["password"]])
        if int(options.get("db", 0)):
            commands.append(["SELECT", str(options["db"])])
        # These may be refused: for CLIENT LIST, and lest a store with maxmemory-clients drop who downloads the most.
        commands += [["CLIENT", "SETNAME", self._name], ["CLIENT", "NO-EVICT", "ON"]]
        sock.sendall(b"".join(_native.encode_command(*(part.encode() for part in command)) for command in commands))
        decoder, asked = _native.Decoder(), iter(commands)
        answered = 0
        while answered < len(commands):
            data = sock.recv(4096)
            if not data:
                raise StoreUnavailable(f"{redact(url)} closed the connection during the handshake")
            try:
                replies = decoder.feed(data)
            except ValueError as error:
                raise StoreUnavailable(f"{redact(url)} does not speak the Redis protocol") from error
            # Each as it comes: who refuses one command may not answer the next.
            for reply, command in zip(replies, asked, strict=False):
                answered += 1
                if isinstance(reply, _native.ReplyError):
                    failure = handshake_failure(url, command[0], str(reply))
                    if failure is not None:
                        raise failure

    def _run_tls(self, engine: _native.Engine, step: int | None, timeout_ms: int, flush: bool) -> int:
        deadline = time.monotonic() + timeout_ms / 1000
        wake = engine.wake_fd()
        while True:
            if engine.lost():
                return _native.CONNECTION_LOST
            moved = False
            waiting_to_write: list[socket.socket] = []
            for lane, sock in enumerate(self._sockets):
                try:
                    moved |= _send(engine, lane, sock, waiting_to_write)
                    moved |= _receive(engine, lane, sock, waiting_to_write)
                except OSError:
                    return _native.CONNECTION_LOST
            if engine.fatal()[0] != _native.OK or (engine.flushed() if flush else step is not None and engine.has_ended(step)):
                return _native.ENDED
            left = deadline - time.monotonic()
            if left <= 0:
                return _native.AGAIN
            if time.monotonic() - self._looked > LOOK_S:
                self._looked = time.monotonic()
                if engine.is_silent():
                    return _native.CONNECTION_LOST
            if not moved:
                readers: list[Any] = [*self._sockets, wake]
                ready, _, _ = select.select(readers, waiting_to_write, [], left)
                if wake in ready:
                    engine.drain()


def _send(engine: _native.Engine, lane: int, sock: socket.socket, waiting_to_write: list[socket.socket]) -> bool:
    moved = False
    while views := engine.output(lane):
        try:
            # The first view only: a send that must be repeated begins with the same bytes.
            engine.sent(lane, sock.send(views[0][:TLS_SEND_BYTES]))
            moved = True
        except (ssl.SSLWantWriteError, BlockingIOError):  # the latter from a node without TLS beside others with it
            waiting_to_write.append(sock)
            break
        except ssl.SSLWantReadError:
            break
    return moved


def _receive(engine: _native.Engine, lane: int, sock: socket.socket, waiting_to_write: list[socket.socket]) -> bool:
    moved = False
    while True:
        try:
            count = sock.recv_into(engine.input(lane))
        except (ssl.SSLWantReadError, BlockingIOError):
            return moved
        except ssl.SSLWantWriteError:
            waiting_to_write.append(sock)
            return moved
        if count == 0:
            raise ConnectionResetError(0, "closed by the store")
        moved = True
        status = engine.received(lane, count)
        if status == _native.STORE_REFUSES:
            raise ConnectionResetError(0, "refused by the store")
        if status != _native.OK:
            return moved


def _is_tls(options: dict[str, Any]) -> bool:
    return options.get("connection_class") is redis.connection.SSLConnection


def _notice_death(sock: socket.socket, silence_s: float) -> None:
    """The kernel gives up a peer that acknowledges nothing, where it knows how."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = max(1, int(silence_s / 3))
    for option, value in (
        ("TCP_USER_TIMEOUT", int(silence_s * 1000)),
        ("TCP_KEEPIDLE", seconds),
        ("TCP_KEEPALIVE", seconds),  # macOS's name for the idle time
        ("TCP_KEEPINTVL", seconds),
        ("TCP_KEEPCNT", 2),
    ):
        if hasattr(socket, option):
            with contextlib.suppress(OSError):  # a kernel older than its headers
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _tls_context(options: dict[str, Any]) -> ssl.SSLContext:
    """A verifying context from redis-py's URL options: ssl_ca_certs, ssl_certfile, ssl_keyfile, ssl_cert_reqs."""
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"))
    if str(options.get("ssl_cert_reqs", "required")).lower() == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif str(options.get("ssl_check_hostname", "true")).lower() in ("false", "no", "0"):
        context.check_hostname = False
    if options.get("ssl_certfile"):
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password"))
    return context
