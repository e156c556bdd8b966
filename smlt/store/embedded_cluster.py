"""The embedded cluster: a Valkey Cluster of processes on this machine, to try one out and to test with.

A server's part in it changes while it runs (a replica takes over, a slot moves), so nodes are told apart by number, in the
order of their start: first the primaries, each with an equal part of the slots, then the replicas.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from smlt.errors import ConfigError, StoreUnavailable
from smlt.store.embedded import EmbeddedStore, default_memory_bytes, free_port, new_password
from smlt.store.embedded_set import check_count
from smlt.store.slots import SLOTS
from smlt.store.translation import translated

#: How long servers may take to agree on who serves what, a replica to have its primary's data, a slot to move.
AGREE_TIMEOUT_S = 30.0
#: After so long without a word a primary counts as failed, and a replica takes over.
NODE_TIMEOUT_MS = 2000


class ClusterServer(EmbeddedStore):
    """One server of an embedded cluster."""

    def __init__(self, *, announce: str, node_timeout_ms: int, **settings: Any) -> None:
        self._announce, self._node_timeout_ms = announce, node_timeout_ms
        super().__init__(**settings)

    def _choose_ports(self) -> None:
        super()._choose_ports()
        self._bus_port = free_port()

    def _configuration(self, memory_bytes: int) -> dict[str, object]:
        return super()._configuration(memory_bytes) | {
            "cluster-enabled": "yes",
            "cluster-config-file": "nodes.conf",
            "cluster-port": self._bus_port,
            "cluster-announce-ip": self._announce,
            "cluster-node-timeout": self._node_timeout_ms,
            "cluster-replica-validity-factor": 0,  # a replica takes over however long it has not heard of its primary
            "cluster-allow-replica-migration": "no",
            "masterauth": self._password,
            "repl-diskless-sync-delay": 0,
        }

    @property
    def address(self) -> tuple[str, int, int]:
        """Host, port, and the port of the cluster's bus."""
        return self._announce, self._port, self._bus_port

    def command(self, *arguments: object) -> Any:
        """The server's raw answer to one command. redis-py's errors."""
        with redis.Redis.from_url(self.url, protocol=2, socket_timeout=10) as client:
            # One word: redis-py knows other forms of answers to "CLUSTER NODES" and its like.
            return client.execute_command(*(str(part).encode() for part in arguments))

    def kill(self) -> None:
        """End the server without a word to anyone (SIGKILL); `restart` brings it back, empty, as one of the cluster."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._guard is not None
        self._guard.wait(10)


class EmbeddedCluster:
    """A Valkey Cluster of `primaries` servers with `replicas` each, as long as this process lives or until `close`.

    `memory_bytes` is for each server. With `bind`, addresses of this machine, other hosts reach it at the first of them.
    Raises ConfigError and StoreUnavailable as `EmbeddedStore` does, and StoreUnavailable when the servers do not agree.
    """

    def __init__(
        self,
        primaries: int = 3,
        replicas: int = 0,
        *,
        memory_bytes: int | None = None,
        logs: Path | None = None,
        bind: Sequence[str] = (),
        node_timeout_ms: int = NODE_TIMEOUT_MS,
    ) -> None:
        check_count(primaries)
        if replicas < 0:
            raise ConfigError(f"{replicas} replicas of each primary: give 0 or more")
        count = primaries * (1 + replicas)
        self._password, self._primaries = new_password(), primaries
        self.nodes: list[ClusterServer] = []
        try:
            for j in range(count):
                self.nodes.append(
                    ClusterServer(
                        announce=bind[0] if bind else "127.0.0.1",
                        node_timeout_ms=node_timeout_ms,
                        memory_bytes=memory_bytes or default_memory_bytes() // count,
                        log_path=logs / f"store-{j}" if logs is not None else None,
                        bind=bind,
                        password=self._password,
                    )
                )
            with translated(self.url):
                self._form(primaries)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """The cluster, by all of its servers; the password stands in the first part, and holds for all."""
        hosts = (f"{host}:{port}" for host, port, _ in (node.address for node in self.nodes))
        return f"redis+cluster://:{self._password}@" + ",redis+cluster://".join(hosts)

    @property
    def tcp_url(self) -> str:
        """The same: a cluster is reached by TCP."""
        return self.url

    @property
    def life_lines(self) -> list[int]:
        """Open files: each server lives as long as any process has its own (`EmbeddedStore.life_line`)."""
        return [node.life_line for node in self.nodes]

    def outlives(self, dead: Collection[int]) -> bool:
        """Whether it goes on without these nodes, given time for replicas to take over."""
        count = self._primaries
        return all(any(j not in dead for j in range(first, len(self.nodes), count)) for first in range(count))

    # ---- what tests and demonstrations do to it ----

    def owner(self, slot: int) -> int:
        """The number of the node that says that it serves the slot. StoreUnavailable when none does."""
        for number, node in enumerate(self.nodes):
            if node.alive and any(first <= slot <= last for first, last in self._own_slots(node)):
                return number
        raise StoreUnavailable(f"no server of the embedded cluster serves slot {slot}")

    def replica_of(self, number: int) -> int:
        """The number of a running replica of that primary. ConfigError when it has none."""
        primary = self._id(self.nodes[number])
        for other, node in enumerate(self.nodes):
            if node.alive and self._myself(node)[3] == primary:
                return other
        raise ConfigError(f"node {number} of the embedded cluster has no replica")

    def wait_for_replica(self, number: int) -> None:
        """Wait until this node, which was a primary, has all data of the one that took its place."""
        self._wait(lambda: self._follows(self.nodes[number]), f"node {number} to follow another")

    def _follows(self, node: ClusterServer) -> bool:
        told = node.command("INFO", "replication")
        return b"role:slave" in told and b"master_link_status:up" in told and self._agreed(node)

    def fail_over(self, number: int, *, force: bool = False) -> None:
        """Let this replica take its primary's place; with `force` without waiting for what it has not sent yet."""
        node = self.nodes[number]
        before = next(other for other in self.nodes if other.alive and self._id(other) == self._myself(node)[3])
        node.command("CLUSTER", "FAILOVER", *(["FORCE"] if force else []))
        self._wait(lambda: "master" in self._myself(node)[2], "the replica to take over")
        self._wait(lambda: "slave" in self._myself(before)[2], "the primary to hear of it")

    def migrate(self, slot: int, to: int) -> None:
        """Move a slot key by key, as `valkey-cli --cluster reshard` does: clients meet ASK and TRYAGAIN meanwhile."""
        source, target = self.nodes[self.owner(slot)], self.nodes[to]
        if source is target:
            return
        source_id, target_id = self._id(source), self._id(target)
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        host, port, _ = target.address
        while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, 10):
            with redis.Redis.from_url(source.url, protocol=2, socket_timeout=30) as client:
                client.execute_command("MIGRATE", host, port, "", 0, 30_000, "AUTH", self._password, "KEYS", *keys)
        # The target first: otherwise nobody serves the slot for a moment.
        for node in (target, source, *self.nodes):
            if node.alive and "master" in self._myself(node)[2]:
                node.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def migrate_at_once(self, slot: int, to: int) -> None:
        """Move a slot as Valkey 9 does (CLUSTER MIGRATESLOTS): clients meet MOVED behind it only.

        StoreUnavailable when the migration fails, ConfigError when the servers know no such command.
        """
        source, target = self.nodes[self.owner(slot)], self.nodes[to]
        if source is target:
            return
        try:
            source.command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self._id(target))
        except redis.ResponseError as error:
            if "unknown subcommand" in str(error).lower():
                raise ConfigError("the embedded cluster's servers know no CLUSTER MIGRATESLOTS: it takes Valkey 9") from error
            raise
        self._wait(lambda: self._migrated(source, target, slot), f"slot {slot} to move")

    def _migrated(self, source: ClusterServer, target: ClusterServer, slot: int) -> bool:
        newest = source.command("CLUSTER", "GETSLOTMIGRATIONS")[0]
        row = {name.decode(): value for name, value in zip(newest[::2], newest[1::2], strict=True)}
        state = row["state"].decode()
        if state in ("failed", "canceled", "cancelled"):
            raise StoreUnavailable(f"slot {slot} did not move: {row.get('message', b'').decode()}")
        return state == "success" and any(first <= slot <= last for first, last in self._own_slots(target))

    # ---- setting it up ----

    def _form(self, primaries: int) -> None:
        for j, node in enumerate(self.nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", j + 1)
            if j < primaries:
                first, behind = SLOTS * j // primaries, SLOTS * (j + 1) // primaries
                node.command("CLUSTER", "ADDSLOTSRANGE", first, behind - 1)
        for node in self.nodes[1:]:
            node.command("CLUSTER", "MEET", *self.nodes[0].address)
        self._wait(lambda: all(self._knows_all(node) for node in self.nodes), "the servers to know each other")
        for j, node in enumerate(self.nodes[primaries:]):
            primary = self._id(self.nodes[j % primaries])
            self._wait(partial(self._replicates, node, primary), "a replica to join")
        self._wait(lambda: all(self._ready(node) for node in self.nodes), "the cluster to be ready")

    def _knows_all(self, node: ClusterServer) -> bool:
        rows = self._rows(node)
        return len(rows) == len(self.nodes) and not any("handshake" in row[2] or "noaddr" in row[2] for row in rows)

    def _replicates(self, node: ClusterServer, primary: str) -> bool:
        try:
            return bool(node.command("CLUSTER", "REPLICATE", primary) == b"OK")
        except redis.ResponseError:  # it has not heard yet that the other one is a primary
            return False

    def _agreed(self, node: ClusterServer) -> bool:
        return b"cluster_state:ok" in node.command("CLUSTER", "INFO")

    def _ready(self, node: ClusterServer) -> bool:
        if not self._agreed(node):
            return False
        replicas = [row for row in self._rows(node) if "slave" in row[2]]
        expected = len(self.nodes) - sum(bool(self._own_slots(other)) for other in self.nodes)
        link_up = b"master_link_status:down" not in node.command("INFO", "replication")
        return len(replicas) == expected and link_up

    def _rows(self, node: ClusterServer) -> list[list[str]]:
        """https://valkey.io/commands/cluster-nodes: id, address, flags, primary, ..., slots."""
        return [line.split() for line in node.command("CLUSTER", "NODES").decode().splitlines() if line]

    def _myself(self, node: ClusterServer) -> list[str]:
        return next(row for row in self._rows(node) if "myself" in row[2])

    def _id(self, node: ClusterServer) -> str:
        return self._myself(node)[0]

    def _own_slots(self, node: ClusterServer) -> list[tuple[int, int]]:
        found = []
        for part in self._myself(node)[8:]:
            if not part.startswith("["):  # those in brackets are on their way
                first, _, last = part.partition("-")
                found.append((int(first), int(last or first)))
        return found

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + AGREE_TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise StoreUnavailable(f"the embedded cluster: waited {AGREE_TIMEOUT_S:g} s for {what}")
            time.sleep(0.02)

    def close(self) -> None:
        """End the servers. Safe to call twice."""
        with contextlib.ExitStack() as stack:
            for node in self.nodes:
                stack.callback(node.close)

    def __enter__(self) -> EmbeddedCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
