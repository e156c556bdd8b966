"""The store that tests run on: one server, or, by SMLT_TEST_STORE, three of them ("nodes") or a cluster of three ("cluster").

    SMLT_TEST_STORE=cluster pytest tests/collective

A store of either kind is more than one server. `Everywhere` is a client of all of them, `Doors` are addresses of a test's
own before them.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import redis

from smlt.store.embedded import EmbeddedStore
from smlt.store.embedded_cluster import EmbeddedCluster
from smlt.store.embedded_set import EmbeddedStores
from smlt.store.slots import slot_of

#: "", "nodes" or "cluster".
KIND = os.environ.get("SMLT_TEST_STORE", "")
SERVERS = 3
AnyStore = EmbeddedStore | EmbeddedStores | EmbeddedCluster


def make_store() -> AnyStore:
    """A store of the kind that is asked for."""
    if KIND == "nodes":
        return EmbeddedStores(SERVERS)
    if KIND == "cluster":
        return EmbeddedCluster(SERVERS)
    return EmbeddedStore()


def servers_of(store: AnyStore) -> list[EmbeddedStore]:
    """The servers that a store is made of."""
    return list(store.nodes) if isinstance(store, (EmbeddedStores, EmbeddedCluster)) else [store]


class Everywhere:
    """A client of all servers of a store: what redis-py's does, on each or on the one that has the key."""

    def __init__(self, store: AnyStore) -> None:
        self._store = store
        self._clients = [redis.Redis.from_url(server.url) for server in servers_of(store)]

    def __enter__(self) -> Everywhere:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()

    def scan_iter(self, match: str | None = None, count: int | None = None) -> Iterator[bytes]:
        for client in self._clients:
            yield from client.scan_iter(match=match, count=count)

    def unlink_all(self, match: str) -> None:
        """Delete all keys of a pattern."""
        for client in self._clients:
            for key in client.scan_iter(match=match, count=1000):
                with contextlib.suppress(redis.ResponseError):  # its slot has moved meanwhile
                    client.unlink(key)

    def dbsize(self) -> int:
        return sum(int(client.dbsize()) for client in self._clients)

    def at(self, key: str | bytes) -> Any:
        """The client of the server that holds the key: found by its tag."""
        text = key.decode() if isinstance(key, bytes) else key
        tag = text.partition("{")[2].partition("}")[0]
        if isinstance(self._store, EmbeddedCluster):
            return self._clients[self._store.owner(slot_of(tag))]
        return self._clients[int(tag.rpartition(".")[2]) % len(self._clients)]

    def client_list(self) -> list[dict[str, Any]]:
        """As of one server; `server` says of which."""
        return [{**row, "server": j} for j, client in enumerate(self._clients) for row in client.client_list()]

    def kill(self, row: dict[str, Any]) -> None:
        """End a connection of `client_list`. redis.ResponseError when it has ended."""
        self._clients[row["server"]].client_kill_filter(_id=row["id"])

    def kill_all(self) -> None:
        """End every client's connection but our own."""
        for client in self._clients:
            client.client_kill_filter(_type="normal", skipme=True)


class Doors:
    """Listeners on loopback, one before each server of a store, and the URL that leads through them.

    A cluster's servers tell each other's addresses: whoever passes their answers on tells `translate`d ones.
    """

    def __init__(self, store: AnyStore, *, scheme: str = "redis", host: str = "127.0.0.1") -> None:
        self._host = host
        self.targets = self.ports_of(store)
        self.listeners = [socket.create_server(("127.0.0.1", 0), backlog=64) for _ in self.targets]
        self.ports = [listener.getsockname()[1] for listener in self.listeners]
        user = servers_of(store)[0].tcp_url.partition("://")[2].rpartition("@")[0]
        user += "@" if user else ""
        scheme += "+cluster" if isinstance(store, EmbeddedCluster) else ""
        self.parts = [f"{scheme}://{user}{host}:{port}" for port in self.ports]

    @staticmethod
    def ports_of(store: AnyStore) -> list[int]:
        """The ports of a store's servers."""
        return [int(server.tcp_url.rpartition(":")[2]) for server in servers_of(store)]

    def url(self, options: str = "") -> str:
        """The store's URL by these doors, each part with the options."""
        return ",".join(part + options for part in self.parts)

    def translate(self, answer: bytes) -> bytes:
        """What a server says of where the others are (CLUSTER SLOTS), with the doors' ports and host."""
        for target, port in zip(self.targets, self.ports, strict=True):
            answer = answer.replace(b":%d\r\n" % target, b":%d\r\n" % port)
        return answer.replace(b"$9\r\n127.0.0.1\r\n", b"$%d\r\n%s\r\n" % (len(self._host), self._host.encode()))

    def close(self) -> None:
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes whoever is in accept
            listener.close()


def asks_for_slots(command: bytes) -> bool:
    """Whether bytes to a server ask where slots are."""
    return b"\r\nCLUSTER\r\n" in command


def lanes_of(connections: Iterable[Any], lanes: int = 3) -> list[Any]:
    """Of a proxy's connections, the newest of a communicator's data plane to the first server."""
    newest = list(connections)[-lanes * (SERVERS if KIND else 1) :]
    return newest[:lanes]
