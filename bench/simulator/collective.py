"""An all-reduce simulated: which strategy, how long it takes, what it moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.simulator.cluster import Cluster, Place
from bench.simulator.strategies import Done, Gradient, Strategy
from bench.simulator.strategies.hierarchical import MESSAGES_MAX, Hierarchical, block_size
from bench.simulator.strategies.one_shot import OneShot
from smlt.collective import _native
from smlt.collective.plan import CHUNK_BYTES, CHUNK_BYTES_TUNED_MIN, PART_HEADER_BYTES
from smlt.collective.tuning import LOCAL, NETWORK, Tuning, choose, chunk_bytes

#: From the last worker's return to the first one's next call.
PAUSE_S = 50e-6


@dataclass(frozen=True)
class Result:
    """Of one all-reduce. `seconds`: of the slowest worker, from its own call; the rest over all rounds, by their number."""

    seconds: float
    worker_cpu_s: float  # a worker's mean
    store_cpu_s: float  # all nodes
    sent_bytes: float  # a worker's mean on its link
    received_bytes: float
    store_commands: float
    calls: dict[str, float]  # the same by command
    wakes: float  # of the store
    events: int


def tuning_of(place: Place) -> Tuning:
    """What `smlt.collective.tuning` takes without having measured: for a unix socket, or for anything further away.

    A node of a known interface is taken for what it is.
    """
    if place.link_bytes_per_s is None:
        return LOCAL
    return NETWORK if place.store_bytes_per_s is None else replace(NETWORK, store_bytes_per_s=place.store_bytes_per_s)


def run(
    place: Place,
    n: int,
    make: Callable[[Cluster, Done], Strategy],
    *,
    rounds: int = 1,
    grain: float = 1.0,
    starts_s: Any = None,
) -> Result:
    """`rounds` all-reduces one after the other; the last one's time. `starts_s`: when each worker calls it (of one round)."""
    cluster = Cluster(place, n, grain=grain)
    began, took, left, rounds_left = [0.0] * n, [0.0] * n, n, rounds

    def begin(strategy: Strategy, rank: int) -> None:
        began[rank] = cluster.engine.now
        strategy.begin(rank)

    def done(rank: int) -> None:
        nonlocal left
        took[rank] = cluster.engine.now - began[rank]
        left -= 1
        if left == 0 and rounds_left:
            cluster.engine.at(cluster.engine.now + PAUSE_S, next_round)

    def next_round() -> None:
        nonlocal left, rounds_left
        left, rounds_left = n, rounds_left - 1
        strategy = make(cluster, done)
        for rank in range(n):
            offset = starts_s[rank] if starts_s is not None else rank * place.release_s
            cluster.engine.at(cluster.engine.now + offset, begin, strategy, rank)

    next_round()
    cluster.engine.run()
    if left:
        raise AssertionError(f"{left} of {n} workers never finished: the strategy waits for what does not come")
    workers, stores = cluster.workers, cluster.stores
    each = 1 / n / rounds
    return Result(
        seconds=max(took),
        worker_cpu_s=sum(worker.thread.busy_s for worker in workers) * each,
        store_cpu_s=sum(store.thread.busy_s for store in stores) / rounds,
        sent_bytes=sum(worker.up.bytes for worker in workers if worker.up is not None) * each,
        received_bytes=sum(worker.down.bytes for worker in workers if worker.down is not None) * each,
        store_commands=sum(store.commands for store in stores) / rounds,
        calls={name: sum(store.calls[name] for store in stores) / rounds for name in sorted(stores[0].calls)},
        wakes=sum(store.thread.wakes for store in stores) / rounds,
        events=cluster.engine.events,
    )


def smlt(place: Place, n: int, gradient: Gradient, *, tuning: Tuning | None = None, rounds: int = 1, **options: Any) -> Result:
    """SMLT's all-reduce with the algorithm that `smlt.collective` would choose, or by so many `shards`."""
    tuning = tuning or tuning_of(place)
    limit = options.pop("chunk_limit", 0) or chunk_bytes(tuning, CHUNK_BYTES_TUNED_MIN, CHUNK_BYTES)
    size = gradient.wire_bytes
    fits = size <= limit and gradient.floats <= 131_072
    one_shot_limit = _native.ONE_SHOT_BYTES_MAX - PART_HEADER_BYTES if fits else -1
    name, shards = choose(tuning, "auto", n, size, one_shot_limit, place.nodes)
    if forced := options.pop("shards", 0):
        name, shards = "hierarchical", forced
    if name == "one-shot":
        return run(
            place, n, lambda cluster, done: OneShot(cluster, gradient, done), rounds=rounds, starts_s=options.get("starts_s")
        )
    messages_max = options.pop("messages_max", MESSAGES_MAX)
    grain = float(block_size(n, shards, max(1, -(-size // (shards * limit))), place.nodes, messages_max))
    return run(
        place,
        n,
        lambda cluster, done: Hierarchical(
            cluster, gradient, tuning, done, shards=shards, chunk_limit=limit, messages_max=messages_max
        ),
        rounds=rounds,
        grain=grain,
        **options,
    )
