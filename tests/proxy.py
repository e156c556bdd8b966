"""A TCP proxy before a real store that does to the bytes what networks do.

    proxy = Proxy(store, seed=7)
    proxy.on_connect = lambda connection: connection.down.at(1000, "reset")
    Communicator(proxy.url, ...)

Each connection has two directions, `up` (to the store) and `down`, each with its own rules; `proxy.connections` lists
them in the order in which they came. Whatever is random comes of the seed.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

from stores import AnyStore, Doors, asks_for_slots

#: What happens at a byte: both sides closed; both reset; nothing more is forwarded and nothing closed.
End = Literal["close", "reset", "silence"]


class Direction:
    """The bytes that go one way through one connection."""

    def __init__(self, connection: Connection, chance: random.Random) -> None:
        self._connection, self._chance = connection, chance
        self._end: tuple[int, End] | None = None
        self.passed = 0
        self.delay_s = 0.0  # before each piece
        self.piece: int | Literal["random"] | None = None  # so many bytes at a time
        self.change: Callable[[bytes], bytes | None] | None = None  # None: close
        self.begun: Callable[[bytes], None] = lambda first: None  # told of the first bytes before they pass
        self.heard: Callable[[bytes], None] = lambda data: None  # told of all bytes before they pass
        self.translate: Callable[[bytes], bytes] | None = None
        self._flowing = threading.Event()
        self._flowing.set()

    def at(self, byte: int, end: End) -> None:
        """End like this when so many bytes have passed, from now on."""
        self._end = (self.passed + byte, end)

    def freeze(self) -> None:
        """Forward nothing until `thaw`."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        while data:
            size = len(data)
            if self.piece is not None:
                size = self._chance.randint(1, 2000) if self.piece == "random" else self.piece
            if self._end is not None:
                size = min(size, self._end[0] - self.passed)
                if size <= 0:
                    return
            yield data[:size]
            data = data[size:]

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        how: End = "close"
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self.passed == 0:
                    self.begun(data)
                self.heard(data)
                data = self.translate(data) if self.translate is not None else data
                changed = self.change(data) if self.change is not None else data
                if changed is None:
                    break
                for piece in self._pieces(changed):
                    self._flowing.wait()
                    if self.delay_s:
                        time.sleep(self.delay_s)
                    sink.sendall(piece)
                    self.passed += len(piece)
                if self._end is not None and self.passed >= self._end[0]:
                    how = self._end[1]
                    break
        self._connection.end(how)


class Connection:
    """One client of the proxy."""

    def __init__(self, number: int, client: socket.socket, store: socket.socket, seed: int) -> None:
        self.number, self._client, self._store = number, client, store
        self.up, self.down = (Direction(self, random.Random(f"{seed}:{number}:{way}")) for way in ("up", "down"))
        self._ended = threading.Event()
        for sock in (client, store):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        for direction, source, sink in ((self.up, self._client, self._store), (self.down, self._store, self._client)):
            threading.Thread(target=direction.pump, args=(source, sink), daemon=True).start()

    def end(self, how: End) -> None:
        if how == "silence" or self._ended.is_set():
            return
        self._ended.set()
        for sock in (self._client, self._store):
            with contextlib.suppress(OSError):
                if how == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Reading ends first: the kernel closes nothing while the other thread waits in recv.
                sock.shutdown(socket.SHUT_RD if how == "reset" else socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                sock.close() if how == "reset" else None

    def silence(self) -> None:
        """Half-open from now on, both ways."""
        for direction in (self.up, self.down):
            direction.freeze()

    def close(self) -> None:
        for direction in (self.up, self.down):
            direction.change = lambda data: None
            direction.thaw()
        self.end("close")
        for sock in (self._client, self._store):
            with contextlib.suppress(OSError):
                sock.close()


class Proxy:
    """Listens on loopback, passes on to `store`. `on_connect` is told of each connection before its first
    byte, `on_lane` of each of a communicator's data connections (and which of its three lanes) before the handshake."""

    def __init__(self, store: AnyStore, *, seed: int = 0) -> None:
        self.seed = seed
        self.connections: list[Connection] = []
        self.on_connect: Callable[[Connection], None] = lambda connection: None
        self.on_lane: Callable[[Connection, int], None] = lambda connection, lane: None
        self._lanes = 0
        self._counting = threading.Lock()
        self.refuse = False  # close new connections at once
        self.doors = Doors(store)
        self.url = self.doors.url()
        for number in range(len(self.doors.listeners)):
            threading.Thread(target=self._accept, args=(number,), daemon=True).start()

    def _accept(self, number: int) -> None:
        while True:
            try:
                client, _ = self.doors.listeners[number].accept()
            except OSError:
                return
            try:
                if self.refuse:
                    raise ConnectionRefusedError
                store = socket.create_connection(("127.0.0.1", self.doors.targets[number]))
            except OSError:
                client.close()
                continue
            with self._counting:
                connection = Connection(len(self.connections), client, store, self.seed)
                self.connections.append(connection)
            self.on_connect(connection)
            connection.up.begun = lambda first, connection=connection: self._begun(connection, first)  # type: ignore[misc]
            connection.up.heard = lambda data, connection=connection: self._heard(connection, data)  # type: ignore[misc]
            connection.start()

    def _heard(self, connection: Connection, data: bytes) -> None:
        if asks_for_slots(data):
            connection.down.translate = self.doors.translate

    def _begun(self, connection: Connection, first: bytes) -> None:
        if b"NO-EVICT" in first:  # only the data plane asks for it
            self._lanes += 1
            self.on_lane(connection, (self._lanes - 1) % 3)

    def change_down(self, change: Callable[[bytes], bytes | None] | None) -> None:
        """What becomes of the store's bytes on every connection, those to come too."""
        self.on_connect = lambda connection: setattr(connection.down, "change", change)
        for connection in self.connections:
            connection.down.change = change

    def lead_to(self, store: AnyStore) -> None:
        """To another store from now on; what is connected is cut off."""
        self.doors.targets = Doors.ports_of(store)
        for connection in list(self.connections):
            connection.close()

    def freeze(self) -> None:
        for connection in self.connections:
            connection.silence()

    def thaw(self) -> None:
        for connection in self.connections:
            for direction in (connection.up, connection.down):
                direction.thaw()

    def close(self) -> None:
        self.doors.close()
        for connection in self.connections:
            connection.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
