"""Engines driven by hand: the test says which lane sends, how much of a reply is received, and when connections are cut."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import redis

from smlt.collective import _native
from smlt.collective.codecs import OPERATIONS, WIRE_DTYPES, wire_codec
from smlt.collective.connection import Connections
from smlt.collective.plan import CHUNK_ELEMENTS, SegmentType, broadcast_plan, reduce_plan
from smlt.collective.tuning import LOCAL
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore

UP, DOWN, TOKENS = range(3)


class ByHand:
    """One worker's engine with three real connections and nobody who drives it."""

    def __init__(self, store: EmbeddedStore, job: str, rank: int, world_size: int, chunk_bytes: int = 64 * 1024) -> None:
        self.rank, self.world_size, self.chunk_bytes = rank, world_size, chunk_bytes
        self.prefix = f"smlt:{{{job}.0}}:1.hand:"
        self.engine = _native.Engine(
            rank,
            world_size,
            1,
            [self.prefix.encode()],
            f"smlt:{{{job}.0}}:ctl".encode(),
            60_000,
            CHUNK_ELEMENTS,
            chunk_bytes,
            1 << 20,
        )
        with contextlib.closing(ParameterStore(store.url, job=job)) as parameters:
            self._urls = parameters.locate(parameters.propose_places())[:1]  # one node of the store, whatever it is made of
        self._connections = Connections(timeout_s=5)
        self._connections.open(self._urls)

    def reduce(
        self,
        x: np.ndarray,
        *,
        out: np.ndarray | None = None,
        op: str = "mean",
        codec: str = "fp32",
        algorithm: str = "hierarchical",
        feedback: Sequence[Any] = (None, None),
    ) -> int:
        """Begin a reduction; returns its step."""
        kind = SegmentType(x.dtype.name, codec, x.size)
        plan = reduce_plan((kind,), self.world_size, self.chunk_bytes, LOCAL, algorithm)
        return self._submit(plan, op, kind, x, x if out is None else out, feedback)

    def broadcast(self, x: np.ndarray, root: int) -> int:
        """Begin a broadcast; returns its step."""
        kind = SegmentType(x.dtype.name, "fp32", x.size)
        return self._submit(broadcast_plan((kind,), root, self.chunk_bytes), "mean", kind, x, x, (None, None))

    def _submit(self, plan: Any, op: str, kind: SegmentType, x: np.ndarray, out: np.ndarray, feedback: Sequence[Any]) -> int:
        return self.engine.submit(
            algorithm=plan.algorithm,
            operation=OPERATIONS[op],
            digest=hash((plan.algorithm, op, kind)) & 0xFFFFFFFF,
            description=f"{plan.algorithm} {op} {kind}".encode(),
            segments=[(WIRE_DTYPES[kind.dtype], wire_codec(kind.dtype, kind.codec), x, out, x.itemsize, *feedback)],
            table=plan.table,
        )

    def send(self, lane: int, limit: int | None = None) -> int:
        """Send what the lane has to say, or `limit` bytes of it; returns how many."""
        sent, sock = 0, self._connections._sockets[lane]
        while (limit is None or sent < limit) and (views := self.engine.output(lane)):
            view = views[0] if limit is None else views[0][: limit - sent]
            sock.setblocking(True)
            sock.sendall(view)
            sock.setblocking(False)
            self.engine.sent(lane, len(view))
            sent += len(view)
        return sent

    def receive(self, lane: int, limit: int | None = None, wait_s: float = 0.0) -> int:
        """Take what has come, or `limit` bytes of it, after waiting for the first byte; returns how many."""
        sock, taken = self._connections._sockets[lane], 0
        while select.select([sock], [], [], wait_s if taken == 0 else 0)[0]:
            room = self.engine.input(lane)
            data = sock.recv(min(len(room), limit - taken if limit is not None else len(room)))
            assert data, "the store has closed the connection"
            room[: len(data)] = data
            self.engine.received(lane, len(data))
            taken += len(data)
            if taken == limit:
                break
        return taken

    def move(self, lanes: Sequence[int] = (UP, DOWN, TOKENS)) -> bool:
        """Send and take what there is on `lanes`."""
        moved = False
        for lane in lanes:
            moved |= self.send(lane) > 0
            moved |= self.receive(lane) > 0
        return moved

    def cut(self) -> None:
        """The connections are lost, with all that was under way; new ones take their place."""
        self._connections.open(self._urls)
        self.engine.reconnected()

    def status(self, step: int) -> int:
        """How the collective stands."""
        return int(self.engine.state(step)[0])

    def close(self, store: EmbeddedStore) -> None:
        """Close the connections, delete all keys."""
        self._connections.close()
        with redis.Redis.from_url(self._urls[0]) as client:
            for key in client.scan_iter(match=f"{self.prefix.replace('{', '?').replace('}', '?')}*", count=10_000):
                client.unlink(key)


def finish(workers: Sequence[ByHand], step: int, limit_s: float = 5.0) -> None:
    """Move all workers' bytes until the collective is complete on every one."""
    deadline = time.monotonic() + limit_s
    while any(worker.status(step) == _native.ACTIVE for worker in workers):
        assert time.monotonic() < deadline, [worker.engine.state(step) for worker in workers]
        moved = [worker.move() for worker in workers]  # each of them, not the first that has something to do
        if not any(moved):
            select.select([s for worker in workers for s in worker._connections._sockets], [], [], 0.1)
    for worker in workers:
        assert worker.engine.state(step) == (_native.OK, ""), worker.engine.state(step)
