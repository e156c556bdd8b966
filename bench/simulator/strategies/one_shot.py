"""SMLT's one-shot all-reduce: a contribution travels inside its arrival token, everyone adds all of them.

It takes one node of the store, another one in the next step; which of them makes no difference to its time.
"""

from __future__ import annotations

from bench.simulator.cluster import Cluster, StoreNode, Worker
from bench.simulator.strategies import Done, Gradient
from bench.simulator.strategies.hierarchical import SMALL_BYTES


class OneShot:
    """One all-reduce of up to 64 KiB (encoded)."""

    def __init__(self, cluster: Cluster, gradient: Gradient, done: Done) -> None:
        self.cluster, self.done, self.costs = cluster, done, cluster.costs
        self.size, self.floats = gradient.wire_bytes + SMALL_BYTES, gradient.floats
        n = cluster.n
        self.waiting = [False] * n  # blocked in XREAD
        self.unread = [0] * n  # parts in the stream that a worker has not read
        self.missing = [n] * n  # parts to be read, the own one among them
        self.left = [2] * n  # the own part to be confirmed, the sum to be made
        self.store: StoreNode = cluster.stores[0]

    def begin(self, rank: int) -> None:
        worker = self.cluster.workers[rank]
        worker.thread.do("up", self.floats * self.costs.encode_s_per_float, self._encoded, worker)
        self._wait(worker)

    def _encoded(self, worker: Worker) -> None:
        self.cluster.up(worker, self.store, "up", self.size, 1, self._stored, worker, calls=(("xadd", 1),))

    def _stored(self, worker: Worker) -> None:
        self.cluster.down(self.store, worker, "up", SMALL_BYTES / 3, 0.0, self._part_done, worker)
        for other in self.cluster.workers:  # its own part is in the stream it reads, too
            self.unread[other.rank] += 1
            if self.waiting[other.rank]:
                self._give(other)

    def _wait(self, worker: Worker) -> None:
        self.cluster.up(worker, self.store, "tokens", SMALL_BYTES, 1, self._read, worker, calls=(("xread", 1),))

    def _read(self, worker: Worker) -> None:
        if self.unread[worker.rank]:
            self._give(worker)
        else:
            self.waiting[worker.rank] = True

    def _give(self, worker: Worker) -> None:
        count, self.unread[worker.rank] = self.unread[worker.rank], 0
        self.waiting[worker.rank] = False
        serve_s = self.costs.store_serve_s
        self.cluster.down(self.store, worker, "tokens", count * self.size, 0.0, self._heard, worker, count, store_s=serve_s)

    def _heard(self, worker: Worker, count: int) -> None:
        self.missing[worker.rank] -= count
        if self.missing[worker.rank]:
            self._wait(worker)
        else:
            work_s = self.cluster.n * self.floats * self.costs.add_s_per_float
            worker.thread.do("tokens", work_s, self._part_done, worker)

    def _part_done(self, worker: Worker) -> None:
        self.left[worker.rank] -= 1
        if self.left[worker.rank] == 0:
            self.done(worker.rank)
