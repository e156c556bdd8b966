"""A client that asks and waits, one request after the other, as programs over redis-py or boto3 do; and how it polls."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.simulator.cluster import Cluster, StoreNode, Worker
from bench.simulator.engine import Action

#: Of a command and of a short answer.
ASK_BYTES, ANSWER_BYTES = 100, 20
#: With more workers, polls that find nothing are not followed one by one: what is there is found as late as on average.
EXPLICIT_POLLS_MAX_WORKERS = 16


@dataclass(frozen=True)
class Client:
    """What requests cost a worker. `poll_s`: the pause between polls. `listed_bytes`: what a poll brings for each key."""

    s_per_byte: float
    message_s: float
    add_s_per_float: float
    poll_s: float = 0.0005
    listed_bytes: float = 0.0

    @classmethod
    def python(cls, cluster: Cluster, *, poll_s: float = 0.0005, listed_bytes: float = 0.0) -> Client:
        """redis-py and NumPy, as they were calibrated."""
        costs = cluster.costs
        return cls(costs.python_s_per_byte, costs.python_message_s, costs.python_add_s_per_float, poll_s, listed_bytes)


class Requests:
    """One worker's requests, of which one is under way at a time."""

    def __init__(self, cluster: Cluster, worker: Worker, client: Client) -> None:
        self.cluster, self.worker, self.client = cluster, worker, client
        self._phase = random.Random(worker.rank)

    def put(self, store: StoreNode, size: float, then: Action, *, count: float = 1) -> None:
        """`count` writes of `size` bytes together, one after the other."""
        client = self.client
        self.cluster.up(
            self.worker,
            store,
            "requests",
            size + count * ASK_BYTES,
            count,
            self._answer,
            store,
            then,
            work_s_per_byte=client.s_per_byte,
            message_s=client.message_s / 2,
        )

    def _answer(self, store: StoreNode, then: Action) -> None:
        self.cluster.down(store, self.worker, "requests", ANSWER_BYTES, 0.0, then, message_s=self.client.message_s / 2)

    def get(self, store: StoreNode, size: float, then: Action, *, count: float = 1, work_s: float = 0.0) -> None:
        """`count` reads of `size` bytes together, on which the worker spends `work_s`."""
        client = self.client
        self.cluster.up(
            self.worker,
            store,
            "requests",
            count * ASK_BYTES,
            count,
            self._give,
            store,
            size,
            work_s,
            then,
            message_s=client.message_s / 2,
        )

    def _give(self, store: StoreNode, size: float, work_s: float, then: Action) -> None:
        client = self.client
        self.cluster.down(
            store,
            self.worker,
            "requests",
            size,
            work_s,
            then,
            work_s_per_byte=client.s_per_byte,
            message_s=client.message_s / 2,
        )

    def pause(self, then: Action) -> None:
        """Until the next poll."""
        engine = self.cluster.engine
        if self.client.poll_s:
            engine.at(engine.now + self.client.poll_s, then)
        else:
            then()


class Board:
    """What is there to be read, and who waits for it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.explicit = cluster.place.cores is not None or cluster.n <= EXPLICIT_POLLS_MAX_WORKERS
        self.keys = 0
        self._watchers: list[Callable[[], bool]] = []

    def wrote(self, count: int = 1) -> None:
        """`count` more keys are there. Whoever watches looks again, somewhat later."""
        self.keys += count
        self._watchers = [watcher for watcher in self._watchers if not watcher()]

    def poll(self, requests: Requests, store: StoreNode, is_there: Callable[[], bool], then: Action) -> None:
        """Ask until `is_there()`, then go on with `then`."""

        def ask() -> None:
            requests.get(store, self.keys * requests.client.listed_bytes + ANSWER_BYTES, looked)

        def looked() -> None:
            if is_there():
                then()
            elif self.explicit:
                requests.pause(ask)
            else:
                self._watchers.append(noticed)

        def noticed() -> bool:
            if not is_there():
                return False
            period_s = requests.client.poll_s + 2 * self.cluster.place.latency_s + self.cluster.place.request_s
            self.cluster.engine.at(self.cluster.engine.now + requests._phase.random() * period_s, ask)
            return True

        ask()
