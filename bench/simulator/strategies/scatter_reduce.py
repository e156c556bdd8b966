"""ScatterReduce through storage: LambdaML's all-reduce for large models.

Jiang et al., Towards Demystifying Serverless Machine Learning Training, SIGMOD 2021 (arXiv 2105.07806), section 3.2. A worker
writes every partition but its own, one request after the other; lists until the others' parts of its own partition are
there; reads and adds each; writes the merged partition; lists until all are there, reads them. bench/peers.py has the
program over Redis. With many workers, b neighbouring partitions (or parts) are one request of b times the bytes and b
times the time a request takes, as in the hierarchical strategy.
"""

from __future__ import annotations

from functools import partial

from bench.simulator.cluster import Cluster, StoreNode
from bench.simulator.strategies import Done, Gradient
from bench.simulator.strategies.hierarchical import block_size
from bench.simulator.strategies.requests import Board, Client, Requests

MESSAGES_MAX = 30_000


class ScatterReduce:
    """One all-reduce. Partition i lies on node i modulo k."""

    def __init__(self, cluster: Cluster, gradient: Gradient, client: Client, done: Done, *, delete: bool = True) -> None:
        self.cluster, self.client, self.done, self.delete = cluster, client, done, delete
        n = cluster.n
        self.part, self.floats = gradient.wire_bytes / n, gradient.floats / n
        self.block = block_size(n, n, 1, len(cluster.stores), MESSAGES_MAX)
        self.blocks = -(-n // self.block)
        self.parts = [0] * self.blocks  # parts there, of each partition of a block
        self.merged = [0] * self.blocks  # merged partitions there
        self.wrote_parts = [[False] * n for _ in range(self.blocks)]
        self.boards = [Board(cluster), Board(cluster)]
        self.requests = [Requests(cluster, worker, client) for worker in cluster.workers]
        self.read = [0] * n  # parts that a worker has read, then merged partitions

    def _store(self, block: int) -> StoreNode:
        return self.cluster.stores[block % len(self.cluster.stores)]

    def _size(self, block: int) -> int:
        return min(self.block, self.cluster.n - block * self.block)

    def begin(self, rank: int) -> None:
        self._write(rank, 0)

    # ---- scatter ----

    def _write(self, rank: int, block: int) -> None:
        if block == self.blocks:
            self._collect(rank)
            return
        count = self._size(block) - (rank // self.block == block)
        if count == 0:
            self._written(rank, block)
            return
        then = partial(self._written, rank, block)
        self.requests[rank].put(self._store(block), count * self.part, then, count=count)

    def _written(self, rank: int, block: int) -> None:
        self.parts[block] += 1
        self.boards[0].wrote(self._size(block))
        self._write(rank, block + 1)

    # ---- reduce ----

    def _collect(self, rank: int) -> None:
        """The parts of the own partition, as they come to be listed."""
        block = rank // self.block
        if self.read[rank] >= self.cluster.n - 1:
            self._publish(rank)
            return
        there = partial(self._parts_left, rank, block)
        self.boards[0].poll(self.requests[rank], self._store(block), there, partial(self._read_parts, rank, block))

    def _parts_left(self, rank: int, block: int) -> bool:
        others = self.parts[block] - 1  # the own one is never written, and is counted when its turn came
        return others > self.read[rank] or self.read[rank] >= self.cluster.n - 1

    def _read_parts(self, rank: int, block: int) -> None:
        count = min(self.parts[block] - 1 - self.read[rank], self.block)
        if count <= 0:
            self._collect(rank)
            return
        self.read[rank] += count
        work_s = count * self.floats * self.client.add_s_per_float
        then = partial(self._read_parts, rank, block)
        commands = 2 * count if self.delete else count
        self.requests[rank].get(self._store(block), count * self.part, then, count=commands, work_s=work_s)

    def _publish(self, rank: int) -> None:
        self.read[rank] = 0
        block = rank // self.block
        self.requests[rank].put(self._store(block), self.part, partial(self._published, rank, block))

    def _published(self, rank: int, block: int) -> None:
        self.merged[block] += 1
        self.boards[1].wrote()
        self._gather(rank)

    # ---- gather ----

    def _gather(self, rank: int) -> None:
        if self.read[rank] >= self.cluster.n - 1:
            work_s = self.floats * self.cluster.n * self.client.add_s_per_float  # np.concatenate
            self.cluster.workers[rank].thread.do("requests", work_s, self.done, rank)
            return
        there = partial(self._merged_left, rank)
        store = self._store(rank // self.block)
        self.boards[1].poll(self.requests[rank], store, there, partial(self._read_merged, rank))

    def _merged_left(self, rank: int) -> bool:
        return sum(self.merged) - 1 > self.read[rank]

    def _read_merged(self, rank: int) -> None:
        count = min(sum(self.merged) - 1 - self.read[rank], self.block)
        if count <= 0:
            self._gather(rank)
            return
        self.read[rank] += count
        store = self._store(self.read[rank] // self.block)
        self.requests[rank].get(store, count * self.part, partial(self._read_merged, rank), count=count)
