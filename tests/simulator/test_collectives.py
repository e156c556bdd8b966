"""Simulated all-reduces: they end, move what they must, beat no bound, and give the same each time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import redis
from groups import Group

from bench.simulator.collective import run, smlt
from bench.simulator.strategies import Gradient
from bench.simulator.strategies.centralised import Centralised, ParameterServers
from bench.simulator.strategies.hierarchical import Hierarchical
from bench.simulator.strategies.requests import Client
from bench.simulator.strategies.scatter_reduce import ScatterReduce
from smlt import Communicator
from smlt.collective.tuning import NETWORK
from smlt.store.embedded import EmbeddedStore
from tests.simulator.conftest import COSTS, FREE, LINKS, LOCAL

SIZES = (1_000, 100_000, 1_000_000)
CLIENT = Client(3e-10, 60e-6, 4e-10)
STRATEGIES = {
    "centralised": lambda gradient: lambda cluster, done: Centralised(cluster, gradient, CLIENT, done),
    "servers": lambda gradient: lambda cluster, done: ParameterServers(cluster, gradient, CLIENT, done),
    "scatter": lambda gradient: lambda cluster, done: ScatterReduce(cluster, gradient, CLIENT, done),
}


@pytest.mark.parametrize("place", [LINKS, LOCAL], ids=["links", "local"])
@pytest.mark.parametrize("n", [2, 3, 8, 20])
@pytest.mark.parametrize("floats", SIZES)
def test_every_worker_ends_and_the_same_call_gives_the_same_result(place, n: int, floats: int) -> None:
    assert smlt(place, n, Gradient(floats), rounds=2) == smlt(place, n, Gradient(floats), rounds=2)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("codec", ["fp16", "fp32"])
def test_the_links_bound_is_never_beaten_and_is_near_when_nothing_else_costs(n: int, codec: str) -> None:
    gradient = Gradient(4_000_000, codec)
    bound_s = max(1.0, 2 * (n - 1) / n) * gradient.wire_bytes / 75e6
    assert bound_s < smlt(LINKS, n, gradient).seconds
    free = replace(LINKS, costs=FREE, latency_s=1e-6, store_bytes_per_s=None)
    assert bound_s < smlt(free, n, gradient).seconds < 1.25 * bound_s


@pytest.mark.parametrize("n", [2, 5, 8])
def test_what_a_worker_sends_and_receives_is_what_the_algorithm_says(n: int) -> None:
    size = Gradient(2_000_000).wire_bytes
    found = smlt(LINKS, n, Gradient(2_000_000))
    assert found.sent_bytes == pytest.approx(size, rel=0.02)  # n - 1 contributions and one aggregate of n shards
    assert found.received_bytes == pytest.approx(2 * (n - 1) / n * size, rel=0.02)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("n", [2, 4, 20])
def test_others_strategies_end_and_beat_no_bound(name: str, n: int) -> None:
    gradient = Gradient(1_000_000, "fp32")
    size = gradient.wire_bytes
    least = {"centralised": (n - 1) * size, "servers": size, "scatter": 2 * (n - 1) / n * size}[name]
    assert run(LINKS, n, STRATEGIES[name](gradient)).seconds > least / 75e6


def test_more_bytes_take_longer() -> None:
    times = [smlt(LINKS, 4, Gradient(floats)).seconds for floats in (200_000, 400_000, 800_000, 1_600_000)]
    assert times == sorted(times)


def test_a_faster_link_is_never_slower() -> None:
    times = [smlt(replace(LINKS, link_bytes_per_s=rate), 4, Gradient(1_000_000)).seconds for rate in (150e6, 75e6, 37.5e6)]
    assert times == sorted(times)


def test_a_store_that_is_the_limit_gets_faster_with_its_nodes() -> None:
    slow = replace(LINKS, store_bytes_per_s=150e6)
    times = [smlt(slow.with_nodes(k), 16, Gradient(1_000_000)).seconds for k in (4, 2, 1)]
    assert times == sorted(times)
    assert times[2] > 1.5 * times[1]


def test_its_node_is_the_bound_of_one_aggregator() -> None:
    ours, central = (
        smlt(LINKS, 8, Gradient(1_000_000, "fp32")),
        run(LINKS, 8, STRATEGIES["centralised"](Gradient(1_000_000, "fp32"))),
    )
    assert central.seconds > 3 * ours.seconds


def test_blocks_of_owners_change_the_time_by_little() -> None:
    exact, coarse = (smlt(LINKS, 48, Gradient(2_000_000), messages_max=limit) for limit in (10**9, 600))
    assert coarse.events < exact.events
    assert coarse.seconds == pytest.approx(exact.seconds, rel=0.15)


def test_a_straggler_delays_everyone_by_no_more_than_it_is_late() -> None:
    together, late = (smlt(LINKS, 4, Gradient(1_000_000), starts_s=[0.0, 0.0, 0.0, lag]).seconds for lag in (0.0, 0.5))
    assert 0.5 < late < together + 0.5


def test_a_small_value_goes_in_one_shot_with_a_command_for_each_part() -> None:
    found = smlt(LINKS, 4, Gradient(1_000))
    assert 8 <= found.store_commands <= 4 * 4 + 4


@pytest.mark.parametrize("floats", [100_000, 1_000_000])
def test_the_number_of_shards_that_is_chosen_is_near_the_best_for_many_workers(floats: int) -> None:
    times = {m: smlt(LINKS, 48, Gradient(floats), shards=m).seconds for m in (4, 8, 16, 24, 48)}
    tuning = replace(NETWORK, command_s=COSTS.store_command_s)
    assert smlt(LINKS, 48, Gradient(floats), tuning=tuning).seconds < 1.1 * min(times.values())
    assert max(times.values()) > 1.5 * min(times.values()), "there is something to be chosen"


def test_chunks_of_one_shard_lie_on_all_nodes() -> None:
    clusters = []

    def make(cluster, done):
        clusters.append(cluster)
        return Hierarchical(cluster, Gradient(400_000), NETWORK, done, shards=1)

    run(LINKS.with_nodes(4), 4, make)
    counts = [node.calls["set"] for node in clusters[0].stores]
    assert min(counts) > 0
    assert max(counts) - min(counts) <= 4  # a chunk more


def test_a_real_store_counts_the_commands_that_are_simulated(store: EmbeddedStore, job: str) -> None:
    n, rounds, gradient = 6, 4, Gradient(100_000)

    def reduce(comm: Communicator) -> None:
        value = np.ones(gradient.floats, np.float32)
        for _ in range(rounds):
            comm.allreduce(value)

    def counted() -> dict[str, int]:
        with redis.Redis.from_url(store.url) as client:
            return {name.removeprefix("cmdstat_"): row["calls"] for name, row in client.info("commandstats").items()}

    workers = Group(store.url, job, n, tuning=NETWORK, codec="fp16")
    try:
        workers.run(reduce)
        before = counted()
        workers.run(reduce)
        after = counted()
    finally:
        workers.close()
    found = smlt(LOCAL, n, gradient, tuning=NETWORK, rounds=3)
    for name in ("set", "xadd", "unlink"):
        # The aggregates of a step go in the next one, on some workers a moment after the count.
        assert (after[name] - before[name]) / rounds == pytest.approx(found.calls[name], abs=2 if name == "unlink" else 0), name
