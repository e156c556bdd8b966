"""`smlt doctor --tune`: measure what a message costs between this machine and the store."""

from __future__ import annotations

import os
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from smlt.collective import _native
from smlt.collective.connection import Connections
from smlt.collective.tuning import Tuning
from smlt.errors import StoreError, StoreUnavailable
from smlt.store.parameter import ParameterStore

TRIPS = 300
COMMANDS = 2000
PAYLOAD_BYTES = 8 << 20
REPEATS = 5
READERS = 4


class _Line:
    """A blocking connection with the native transport's options, and no client library's time in what it measures."""

    def __init__(self, url: str) -> None:
        self._connections = Connections(timeout_s=30.0)
        self._socket: socket.socket = self._connections.connect_one(url)
        self._decoder = _native.Decoder()

    def ask(self, commands: bytes, replies: int) -> float:
        """Send; wait for so many replies; the seconds it took. StoreError for an error reply."""
        began = time.perf_counter()
        self._socket.sendall(commands)
        found: list[object] = []
        while len(found) < replies:
            data = self._socket.recv(1 << 16)
            if not data:
                raise StoreUnavailable("the store closed the connection while it was measured")
            found += self._decoder.feed(data)
        seconds = time.perf_counter() - began
        for reply in found:
            if isinstance(reply, _native.ReplyError):
                raise StoreError(f"the store refused a command while it was measured: {reply}")
        return seconds

    def download(self, key: bytes, size: int) -> float:
        """The seconds that GET takes, its content thrown away as it comes."""
        target = memoryview(bytearray(1 << 20))
        began = time.perf_counter()
        self._socket.sendall(_native.encode_command(b"GET", key))
        left = len(f"${size}\r\n") + size + 2
        while left > 0:
            received = self._socket.recv_into(target)
            if not received:
                raise StoreUnavailable("the store closed the connection while it was measured")
            left -= received
        return time.perf_counter() - began

    def close(self) -> None:
        self._socket.close()


def measure(url: str) -> Tuning:
    """The constants of the way to the store at `url`, for `smlt.collective.tuning`. Takes a second or two.

    Raises StoreError and its children.
    """
    parameters = ParameterStore(url, job=f"tune-{os.urandom(4).hex()}", ttl_s=60)
    lines: list[_Line] = []
    try:
        parameters.check()
        node = parameters.locate(parameters.propose_places())[0]  # one stands for all
        lines += [_Line(node) for _ in range(READERS)]
        line, key = lines[0], parameters.key("tune").encode()
        trips = [line.ask(_native.encode_command(b"PING"), 1) for _ in range(TRIPS)]
        small = _native.encode_command(b"SET", key, b"x" * 64, b"PX", b"60000")
        commands = [line.ask(small * COMMANDS, COMMANDS) / COMMANDS for _ in range(REPEATS)]
        large = _native.encode_command(b"SET", key, bytes(PAYLOAD_BYTES), b"PX", b"60000")
        up = min(line.ask(large, 1) for _ in range(REPEATS))
        down = min(line.download(key, PAYLOAD_BYTES) for _ in range(REPEATS))
        with ThreadPoolExecutor(READERS) as pool:
            together = min(_all_at_once(pool, lines, key) for _ in range(REPEATS))
        return Tuning(
            round_trip_s=statistics.median(trips),
            command_s=min(commands),
            link_bytes_per_s=PAYLOAD_BYTES / max(up, down),
            store_bytes_per_s=READERS * PAYLOAD_BYTES / together,
        )
    finally:
        for line in lines:
            line.close()
        parameters.sweep()
        parameters.close()


def _all_at_once(pool: ThreadPoolExecutor, lines: list[_Line], key: bytes) -> float:
    began = time.perf_counter()
    for call in [pool.submit(line.download, key, PAYLOAD_BYTES) for line in lines]:
        call.result()
    return time.perf_counter() - began
