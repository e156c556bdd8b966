"""A bound on what lies in the store: kept, whatever is reduced, and nothing waits for ever for want of room."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
from groups import Group, in_parallel
from proxy import Proxy

from smlt import Communicator
from smlt.collective.window import least_window_bytes
from smlt.errors import ConfigError
from smlt.store.embedded import EmbeddedStore

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[EmbeddedStore]]:
    with EmbeddedStore() as one, EmbeddedStore() as other:
        yield [one, other]


def gradients_of(n: int, size: int) -> list[np.ndarray]:
    return [np.random.default_rng(rank).standard_normal(size).astype(np.float32) for rank in range(n)]


@pytest.mark.parametrize("k", [1, 2])
def test_a_nodes_memory_stays_within_the_window(nodes: list[EmbeddedStore], k: int) -> None:
    n, window = 4, 3 * MEGABYTE
    gradients = gradients_of(n, 4_000_000)
    workers = Group(",".join(node.url for node in nodes[:k]), f"within-{k}", n, store_window_bytes=window, timeout_s=60)
    clients = [redis.Redis.from_url(node.url) for node in nodes[:k]]
    workers.run(lambda comm: comm.barrier())
    chunks = 2 * gradients[0].size // workers.members[0].chunks.bounded
    assert workers.members[0].chunks.bounded < workers.members[0].chunk_bytes
    before = [client.info("memory")["used_memory"] for client in clients]
    for client in clients:
        client.config_resetstat()
    results = workers.run(lambda comm: [comm.allreduce(gradients[comm.rank]) for _ in range(2)][-1])
    peaks = [client.info("memory")["used_memory_peak"] - least for client, least in zip(clients, before, strict=True)]
    assert max(peaks) <= window + MEGABYTE, peaks
    sets = sum(client.info("commandstats")["cmdstat_set"]["calls"] for client in clients)
    assert sets >= 2 * n * chunks  # so small that an owner's MGET of all contributions is within its credit
    np.testing.assert_allclose(results[0], np.mean(gradients, axis=0), atol=5e-3)
    assert len({result.tobytes() for result in results}) == 1
    workers.close()
    for client in clients:
        assert client.dbsize() == 0
        client.close()


@pytest.mark.parametrize("n", [2, 3, 8])
def test_every_collective_passes_through_the_smallest_window(nodes: list[EmbeddedStore], n: int) -> None:
    """Many at once, of sizes beside each other that fit and do not."""
    rows = gradients_of(n, 300_000)
    workers = Group(nodes[0].url, f"least-{n}", n, store_window_bytes=least_window_bytes(n), timeout_s=60)

    def work(comm: Communicator) -> list[Any]:
        mine = rows[comm.rank]
        works = [comm.allreduce_async(mine[: 200_000 // (number + 1)], codec="fp32") for number in range(6)]
        copies = [comm.broadcast(mine, root=root % n) for root in range(3)]
        return [*(work.wait() for work in works), *copies, comm.allgather(mine[:40_000])]

    results = workers.run(work)
    for number in range(6):
        expected = np.mean([row[: 200_000 // (number + 1)] for row in rows], axis=0)
        for result in results:
            np.testing.assert_allclose(result[number], expected, atol=1e-5)
            assert result[number].tobytes() == results[0][number].tobytes()
    for result in results:
        for root in range(3):
            np.testing.assert_array_equal(result[6 + root], rows[root % n])
        np.testing.assert_array_equal(np.reshape(result[9], (n, -1)), [row[:40_000] for row in rows])
    workers.close()


def test_the_window_outlasts_lost_connections(nodes: list[EmbeddedStore]) -> None:
    n, rng = 3, np.random.default_rng(5)
    rows = gradients_of(n, 200_000)
    with Proxy(nodes[0], seed=5) as proxy:
        workers = Group(proxy.url, "lost", n, store_window_bytes=500_000, timeout_s=60)
        for _ in range(8):
            for connection in proxy.connections[-3 * n :]:
                if rng.random() < 0.3:
                    connection.down.at(int(rng.integers(1, 400_000)), "reset")
                if rng.random() < 0.3:
                    connection.up.at(int(rng.integers(1, 400_000)), "close")
            for result in workers.run(lambda comm: comm.allreduce(rows[comm.rank], codec="fp32")):
                np.testing.assert_allclose(result, np.mean(rows, axis=0), atol=1e-5)
        proxy.on_connect = lambda connection: None
        workers.close()


def test_the_window_outlasts_a_store_that_comes_back_empty() -> None:
    rows = gradients_of(3, 400_000)
    with EmbeddedStore() as store:
        workers = Group(store.url, "empty", 3, store_window_bytes=500_000, timeout_s=60)
        for _ in range(4):
            results: list[Any] = []
            thread = threading.Thread(
                target=lambda kept=results: kept.extend(
                    workers.attempt(lambda comm: comm.allreduce(rows[comm.rank], codec="fp32"))
                )
            )
            thread.start()
            with redis.Redis.from_url(store.url) as client:
                while thread.is_alive() and not any(b":a:" in key for key in client.scan_iter(count=1000)):
                    pass
            os.kill(store.pid, signal.SIGKILL)
            while store.alive:
                time.sleep(0.005)
            store.restart()
            thread.join(60)
            assert [outcome.error for outcome in results] == [None] * 3
            for outcome in results:
                np.testing.assert_allclose(outcome.value, np.mean(rows, axis=0), atol=1e-5)
        workers.close()


def test_a_window_that_cannot_work_is_refused_with_the_number_that_can() -> None:
    with EmbeddedStore(memory_bytes=20 * MEGABYTE) as store:

        def join(rank: int = 0, n: int = 4, **settings: Any) -> Communicator:
            return Communicator(store.url, job="refused", rank=rank, world_size=n, timeout_s=5, **settings)

        with pytest.raises(ConfigError, match=f"at least {least_window_bytes(4)} bytes"):
            join(store_window_bytes=1000)
        with pytest.raises(ConfigError, match="maxmemory is 20000000 bytes"):
            join(store_window_bytes=21 * MEGABYTE)
        with join(n=2, store_window_bytes=MEGABYTE), pytest.raises(ConfigError, match="give all the same"):
            join(rank=1, n=2, store_window_bytes=2 * MEGABYTE)


def test_what_cannot_fit_is_refused_before_anything_is_sent() -> None:
    with EmbeddedStore(memory_bytes=20 * MEGABYTE) as store:
        workers = Group(store.url, "large", 2, store_window_bytes=0)
        for outcome in workers.attempt(lambda comm: comm.allreduce(np.ones(6_000_000, np.float32))):
            assert isinstance(outcome.error, ConfigError)
            assert "may need 24000000 bytes" in str(outcome.error)
        assert workers.run(lambda comm: comm.allreduce(1.0)) == [1.0, 1.0]
        workers.close()


def test_memory_that_is_limited_is_a_window_by_itself() -> None:
    """60 MB of contributions pass through a store of 20 MB."""
    rows = gradients_of(2, 10_000_000)
    with EmbeddedStore(memory_bytes=20 * MEGABYTE) as store:
        workers = Group(store.url, "limited", 2, timeout_s=60)
        outcomes = in_parallel([lambda comm=comm: comm.allreduce(rows[comm.rank], codec="fp32") for comm in workers.members])  # type: ignore[misc]
        for outcome in outcomes:
            assert outcome.error is None
            np.testing.assert_allclose(outcome.value, np.mean(rows, axis=0), atol=1e-5)
        workers.close()
