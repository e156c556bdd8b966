"""A store that comes back empty, or without the last writes: what is under way is done again from the workers' memory."""

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
from by_hand import DOWN, TOKENS, UP, ByHand, finish
from groups import Group
from proxy import Proxy
from stores import Everywhere

from smlt import Communicator
from smlt.collective import _native
from smlt.errors import ConfigError, FencedError, StoreDataLost
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore


@pytest.fixture
def own() -> Iterator[EmbeddedStore]:
    with EmbeddedStore() as server:
        yield server


def kill(store: EmbeddedStore) -> None:
    os.kill(store.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while store.alive:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_keys(store: EmbeddedStore, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 20
    with redis.Redis.from_url(store.url) as client:
        while sum(1 for _ in client.scan_iter(match=pattern, count=1000)) < count:
            assert time.monotonic() < deadline
            time.sleep(0.002)


def test_a_store_that_has_ended_is_started_again_where_it_was(own: EmbeddedStore) -> None:
    with pytest.raises(ConfigError, match="runs"):
        own.restart()
    before = own.url, own.tcp_url, own.pid
    for _ in range(3):
        kill(own)
        assert not own.alive
        own.restart()
        assert own.alive
    assert (own.url, own.tcp_url) == before[:2]
    assert own.pid != before[2]
    own.close()
    with pytest.raises(ConfigError, match="was closed"):
        own.restart()


@pytest.mark.parametrize("in_place", [False, True], ids=["elsewhere", "in-place"])
@pytest.mark.parametrize("size", [1000, 400_000], ids=["one-shot", "hierarchical"])
def test_a_store_that_comes_back_empty_changes_nothing(own: EmbeddedStore, size: int, in_place: bool) -> None:
    """Twenty times in a row in mid-collective: two have sent all they have, the third has not begun."""
    workers = Group(own.tcp_url, "lost", 3, timeout_s=60, chunk_bytes=64 * 1024)
    rows = [np.random.default_rng(rank).standard_normal(size).astype(np.float32) for rank in range(3)]
    expected = np.mean(rows, axis=0, dtype=np.float64)
    begin = threading.Event()

    def work(comm: Communicator) -> Any:
        mine = rows[comm.rank].copy()
        if comm.rank == 2:
            assert begin.wait(30)
        return comm.allreduce(mine, codec="fp32", out=mine if in_place else None)

    for number in range(20):
        begin.clear()
        results: list[Any] = []
        thread = threading.Thread(target=lambda kept=results: kept.extend(workers.attempt(work)))
        thread.start()
        wait_for_keys(own, "smlt:*:in:*" if size > 1000 else "smlt:*:agg", 1)
        if number % 2:
            begin.set()  # and all three move while it goes
        kill(own)
        begin.set()
        own.restart()
        thread.join(60)
        assert [outcome.error for outcome in results] == [None] * 3, (number, [outcome.error for outcome in results])
        for outcome in results:
            np.testing.assert_allclose(outcome.value, expected, atol=1e-5)
            assert outcome.value.tobytes() == results[0].value.tobytes()
    workers.close()
    left = ParameterStore(own.url, job="lost")
    assert left.count_keys() == 0
    left.close()


def test_who_wants_to_know_is_told_at_once(own: EmbeddedStore) -> None:
    workers = Group(own.url, "lost", 2, timeout_s=60, on_data_loss="raise")
    kill(own)
    own.restart()
    began = time.monotonic()
    for outcome in workers.attempt(lambda comm: comm.allreduce(1.0)):
        assert isinstance(outcome.error, StoreDataLost), outcome.error
        assert "has lost the data of job lost" in str(outcome.error)
    assert time.monotonic() - began < 10
    workers.close()
    with pytest.raises(ConfigError, match="neither"):
        Communicator(own.url, world_size=2, on_data_loss="shrug")  # type: ignore[arg-type]


def test_a_newer_generation_is_met_when_connecting_again(store: EmbeddedStore, job: str, parameters: ParameterStore) -> None:
    workers = Group(store.url, job, 2, timeout_s=30)
    parameters.open_generation(2)
    parameters.client.delete(parameters.key("ctl"))  # nobody hears of it but by looking
    with Everywhere(store) as client:
        for other in client.client_list():
            if other["name"].startswith(f"smlt-{job}"):
                client.kill(other)
    for outcome in workers.attempt(lambda comm: comm.allreduce(np.ones(100_000))):
        assert isinstance(outcome.error, FencedError), outcome.error
    workers.close()
    parameters.sweep()


def test_another_session_is_not_written_over(own: EmbeddedStore) -> None:
    workers = Group(own.url, "lost", 2, timeout_s=30)
    kill(own)
    own.restart()
    parameters = ParameterStore(own.url, job="lost")
    parameters.client.set(parameters.key("session:1"), "other")
    assert workers.run(lambda comm: comm.allreduce(comm.rank, op="sum")) == [1, 1]
    assert parameters.client.get(parameters.key("session:1")) == b"other"
    workers.close()
    parameters.sweep()
    parameters.close()


def test_what_another_worker_has_completed_and_forgotten_ends_in_words(own: EmbeddedStore) -> None:
    """Rank 0 broadcasts and goes on; before rank 1 has read it the store loses all."""
    workers = Group(own.url, "lost", 2, timeout_s=3)
    x = np.arange(1000, dtype=np.float32)
    begun = threading.Event()

    def call(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.broadcast(x, root=1)
            kill(own)
            own.restart()
            begun.set()
            comm.barrier()
        else:
            assert begun.wait(20)
            comm.broadcast(np.zeros_like(x), root=1)
            comm.barrier()

    outcomes = workers.attempt(call)
    assert "what another worker had completed by then cannot be redone" in str(outcomes[0].error), outcomes[0].error
    workers.close()


@pytest.fixture
def replica(own: EmbeddedStore) -> Iterator[EmbeddedStore]:
    """Of `own`, with the same password, so that a proxy can lead to the one or the other."""
    with redis.Redis.from_url(own.url) as client:
        client.config_set("repl-diskless-sync-delay", 0)
    password, port = own.tcp_url.partition("://:")[2].partition("@")[0], int(own.tcp_url.rpartition(":")[2])
    with EmbeddedStore(settings={"masterauth": password}) as server:
        with redis.Redis.from_url(server.tcp_url) as client:
            client.config_set("requirepass", password)
            server._password = password
            client.replicaof("127.0.0.1", port)
            deadline = time.monotonic() + 20
            while client.info("replication")["master_link_status"] != "up":
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield server


@pytest.mark.parametrize("in_place", [False, True], ids=["elsewhere", "in-place"])
@pytest.mark.parametrize("written", [5, 10, 20])
def test_a_failover_to_a_replica_that_lacks_the_last_writes(
    own: EmbeddedStore, replica: EmbeddedStore, in_place: bool, written: int
) -> None:
    with Proxy(own) as proxy:
        workers = Group(proxy.url, "failover", 3, timeout_s=60, chunk_bytes=64 * 1024)
        rows = [np.random.default_rng(rank).standard_normal(600_000).astype(np.float32) for rank in range(3)]
        assert workers.run(lambda comm: comm.allreduce(1.0)) == [1.0] * 3
        begin = threading.Event()

        def work(comm: Communicator) -> Any:
            mine = rows[comm.rank].copy()
            if comm.rank == 2:
                assert begin.wait(30)
            return comm.allreduce(mine, codec="fp32", out=mine if in_place else None)

        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.extend(workers.attempt(work)))
        thread.start()
        wait_for_keys(own, "smlt:*:u:*", written)
        with redis.Redis.from_url(replica.tcp_url) as client:
            client.replicaof("NO", "ONE")  # cut off here: what the primary takes from now on is lost
        if written > 10:
            begin.set()
        time.sleep(0.05)
        proxy.lead_to(replica)
        kill(own)
        begin.set()
        thread.join(60)
        for outcome in results:
            assert outcome.error is None, outcome.error
            np.testing.assert_allclose(outcome.value, np.mean(rows, axis=0, dtype=np.float64), atol=1e-5)
        workers.close()


@pytest.mark.parametrize("algorithm", ["one-shot", "hierarchical", "centralised"])
@pytest.mark.parametrize("after", range(16))
def test_data_lost_at_any_moment_is_sent_again(own: EmbeddedStore, algorithm: str, after: int) -> None:
    """Engines by hand: so many turns of the first two lanes, then the store is emptied under all of them."""
    workers = [ByHand(own, "lost", rank, 3) for rank in range(3)]
    size = 60_000 if algorithm != "one-shot" else 5_000
    x = [np.random.default_rng(rank).standard_normal(size, dtype=np.float32) for rank in range(3)]
    expected = np.mean(x, axis=0)
    for worker, mine in zip(workers, x, strict=True):
        worker.reduce(mine, algorithm=algorithm)
    for turn in range(after):
        workers[turn % 3].move([(UP, TOKENS, DOWN)[(turn // 3) % 3]])
        time.sleep(0.001)
    if any(worker.status(1) != _native.ACTIVE for worker in workers):
        pytest.skip("one is complete: what it has forgotten cannot be done again")
    with redis.Redis.from_url(own.url) as client:
        client.flushall()
    for worker in workers:
        worker._connections.open(worker._urls)
        worker.engine.reconnected([0])
    finish(workers, 1)
    for mine in x:
        np.testing.assert_array_equal(mine, x[0])
        np.testing.assert_allclose(mine, expected, atol=1e-6)
    for worker in workers:
        worker.close(own)
