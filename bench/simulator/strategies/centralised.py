"""One aggregates for all: a worker, through a store (Siren), or parameter servers on machines of their own (Cirrus).

Siren: Wang, Niu, Li, Distributed Machine Learning with a Serverless Architecture, INFOCOM 2019: stateless functions that meet
in S3. Cirrus: Carreira et al., Cirrus: a Serverless Framework for End-to-end ML Workflows, SoCC 2019: functions that push
gradients to, and pull the model from, a parameter server on a virtual machine.
"""

from __future__ import annotations

from functools import partial

from bench.simulator.cluster import Cluster, StoreNode, Worker
from bench.simulator.strategies import Done, Gradient
from bench.simulator.strategies.requests import ANSWER_BYTES, ASK_BYTES, Board, Client, Requests


class Centralised:
    """Everybody uploads the whole gradient, rank 0 adds them up in the order of ranks, everybody downloads the mean."""

    def __init__(self, cluster: Cluster, gradient: Gradient, client: Client, done: Done) -> None:
        self.cluster, self.client, self.done = cluster, client, done
        self.size, self.floats = float(gradient.wire_bytes), gradient.floats
        self.store: StoreNode = cluster.stores[0]
        self.there = [False] * cluster.n  # whose gradient can be read; of rank 0 the mean
        self.board = Board(cluster)
        self.requests = [Requests(cluster, worker, client) for worker in cluster.workers]

    def begin(self, rank: int) -> None:
        if rank == 0:
            work_s = self.floats * self.client.add_s_per_float
            self.cluster.workers[0].thread.do("requests", work_s, self._next, 1)  # total = gradient.copy()
        else:
            self.requests[rank].put(self.store, self.size, partial(self._uploaded, rank))

    def _uploaded(self, rank: int) -> None:
        """The answer to it is back; others have been able to read it for half a round trip, which is left out."""
        self.there[rank] = True
        self.board.wrote()
        if rank == 0:
            self.done(0)
            return
        self.board.poll(self.requests[rank], self.store, lambda: self.there[0], partial(self._fetch_mean, rank))

    def _fetch_mean(self, rank: int) -> None:
        self.requests[rank].get(self.store, self.size, partial(self.done, rank))

    def _next(self, other: int) -> None:
        """Rank 0 comes to the gradient of `other`."""
        if other == self.cluster.n:
            self.requests[0].put(self.store, self.size, partial(self._uploaded, 0))
            return
        self.board.poll(self.requests[0], self.store, lambda: self.there[other], partial(self._add, other))

    def _add(self, other: int) -> None:
        work_s = self.floats * self.client.add_s_per_float
        self.requests[0].get(self.store, self.size, partial(self._next, other + 1), work_s=work_s, count=2)  # GET, DEL


class ParameterServers:
    """k servers, each with a part of the model: workers push their gradients' parts, and pull when all have pushed.

    Synchronous, for the same mathematics as all others here (Cirrus' own training is asynchronous). A server adds what comes
    in its one thread.
    """

    def __init__(self, cluster: Cluster, gradient: Gradient, client: Client, done: Done) -> None:
        self.cluster, self.client, self.done = cluster, client, done
        self.part = gradient.wire_bytes / len(cluster.stores)
        self.add_s = gradient.floats / len(cluster.stores) * cluster.costs.add_s_per_float
        self.pushed = [0] * len(cluster.stores)
        self.left = [len(cluster.stores)] * cluster.n

    def begin(self, rank: int) -> None:
        worker, client = self.cluster.workers[rank], self.client
        for server in self.cluster.stores:
            lane = f"server {server.number}"
            self.cluster.up(
                worker,
                server,
                lane,
                self.part + ASK_BYTES,
                1,
                self._came,
                server,
                work_s_per_byte=client.s_per_byte,
                message_s=client.message_s,
            )

    def _came(self, server: StoreNode) -> None:
        server.thread.do("sums", self.add_s, self._added, server)

    def _added(self, server: StoreNode) -> None:
        self.pushed[server.number] += 1
        if self.pushed[server.number] == self.cluster.n:
            for worker in self.cluster.workers:
                self._pull(server, worker)

    def _pull(self, server: StoreNode, worker: Worker) -> None:
        lane, client = f"server {server.number}", self.client
        size = self.part + ANSWER_BYTES
        self.cluster.down(
            server,
            worker,
            lane,
            size,
            0.0,
            self._pulled,
            worker.rank,
            work_s_per_byte=client.s_per_byte,
            message_s=client.message_s,
        )

    def _pulled(self, rank: int) -> None:
        self.left[rank] -= 1
        if self.left[rank] == 0:
            self.done(rank)
