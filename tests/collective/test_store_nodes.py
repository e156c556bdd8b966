"""A store of several independent nodes: the same results to the bit, and each of them may go away and come back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import redis
from groups import Group, in_parallel
from proxy import Proxy

from smlt import Communicator
from smlt.errors import ConfigError
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[EmbeddedStore]]:
    with ExitStack() as stack:
        yield [stack.enter_context(EmbeddedStore()) for _ in range(4)]


def url_of(nodes: list[EmbeddedStore]) -> str:
    return ",".join(node.url for node in nodes)


def everything(comm: Communicator, gradient: np.ndarray) -> list[bytes]:
    """One of each kind of collective, small ones and such of many chunks. First those with a lossy codec."""
    results: list[Any] = [
        comm.allreduce(gradient, codec="fp16"),
        comm.allreduce(gradient, codec="int8", op="sum"),
        comm.allreduce(gradient[:1000], codec="fp32"),
        comm.allreduce(gradient, codec="fp32"),
        comm.allreduce(gradient[:50_001].astype(np.int64), op="max"),
        comm.broadcast(gradient * (comm.rank + 1), root=comm.world_size - 1),
        comm.allgather(gradient[: 70_001 + comm.world_size]),
        comm.allreduce({"a": gradient[:7], "b": gradient[7:300_000]}, codec="fp32")["b"],
    ]
    comm.barrier()
    return [np.asarray(result).tobytes() for result in results]


@pytest.mark.parametrize("n", [2, 5])
def test_any_number_of_nodes_gives_the_same_bits(nodes: list[EmbeddedStore], n: int) -> None:
    gradients = [np.random.default_rng(rank).standard_normal(600_000).astype(np.float32) for rank in range(n)]
    first: list[bytes] = []
    for k in (1, 2, 3, 4):
        workers = Group(url_of(nodes[:k]), f"bits-{n}-{k}", n, chunk_bytes=64 * 1024)
        everyones = workers.run(lambda comm: everything(comm, gradients[comm.rank]))
        first = first or everyones[0]
        for results in everyones:
            assert results == everyones[0]
            assert results[2:] == first[2:]  # with a lossy codec it matters who owns what, and so the number of shards
        workers.close()
    for node in nodes:
        with redis.Redis.from_url(node.url) as client:
            assert client.dbsize() == 0


def test_every_node_carries_its_part(nodes: list[EmbeddedStore]) -> None:
    workers = Group(url_of(nodes), "parts", 4, chunk_bytes=64 * 1024)
    clients = [redis.Redis.from_url(node.url) for node in nodes]
    for client in clients:
        client.config_resetstat()
    gradient = np.ones(2_000_000, np.float32)
    workers.run(lambda comm: comm.allreduce(gradient))
    carried = [int(client.info("stats")["total_net_input_bytes"]) for client in clients]
    assert max(carried) < 1.15 * min(carried), carried
    workers.close()
    for client in clients:
        client.close()


@pytest.mark.parametrize("which", [0, 1], ids=["first", "another"])
def test_a_node_that_comes_back_empty_changes_nothing(which: int) -> None:
    """In mid-collective, several times: what lay there is done again, what lay elsewhere is still used."""
    with EmbeddedStore() as one, EmbeddedStore() as other:
        nodes = [one, other]
        workers = Group(url_of(nodes), "back", 3, timeout_s=60, chunk_bytes=64 * 1024)
        rows = [np.random.default_rng(rank).standard_normal(400_000).astype(np.float32) for rank in range(3)]
        expected = np.mean(rows, axis=0, dtype=np.float64)
        begin = threading.Event()

        def work(comm: Communicator) -> Any:
            if comm.rank == 2:
                assert begin.wait(30)
            return comm.allreduce(rows[comm.rank], codec="fp32")

        for _ in range(5):
            begin.clear()
            results: list[Any] = []
            thread = threading.Thread(target=lambda kept=results: kept.extend(workers.attempt(work)))
            thread.start()
            deadline = time.monotonic() + 20
            with redis.Redis.from_url(nodes[which].url) as client:
                while not any(b":u:" in key for key in client.scan_iter(count=1000)):
                    assert time.monotonic() < deadline
            os.kill(nodes[which].pid, signal.SIGKILL)
            begin.set()
            while nodes[which].alive:
                time.sleep(0.005)
            nodes[which].restart()
            thread.join(60)
            assert [outcome.error for outcome in results] == [None] * 3
            for outcome in results:
                np.testing.assert_allclose(outcome.value, expected, atol=1e-5)
                assert outcome.value.tobytes() == results[0].value.tobytes()
        workers.close()
        left = ParameterStore(url_of(nodes), job="back")
        assert left.count_keys() == 0
        left.close()


def test_connections_to_one_node_may_end_at_any_byte(nodes: list[EmbeddedStore]) -> None:
    with Proxy(nodes[1], seed=3) as proxy:
        url = f"{nodes[0].url},{proxy.url}"
        rng = np.random.default_rng(3)
        comms: list[Communicator] = []

        def join(rank: int) -> None:
            comms.append(
                Communicator(url, job="cut", rank=rank, world_size=3, timeout_s=60, chunk_bytes=16 * 1024, codec="fp32")
            )

        for outcome in in_parallel([lambda rank=rank: join(rank) for rank in range(3)]):  # type: ignore[misc]
            assert outcome.error is None
        gradient = np.arange(60_000, dtype=np.float32)
        for _ in range(12):
            for connection in proxy.connections[-9:]:
                if rng.random() < 0.3:
                    connection.down.at(int(rng.integers(1, 200_000)), "reset")
                if rng.random() < 0.3:
                    connection.up.at(int(rng.integers(1, 200_000)), "close")
            outcomes = in_parallel([lambda comm=comm: comm.allreduce(gradient + comm.rank) for comm in comms])  # type: ignore[misc]
            for outcome in outcomes:
                assert outcome.error is None
                np.testing.assert_array_equal(outcome.value, gradient + 1)
        proxy.on_connect = lambda connection: None
        in_parallel([comm.close for comm in comms])


def test_workers_with_other_lists_of_nodes_are_told(nodes: list[EmbeddedStore]) -> None:
    with Communicator(url_of(nodes[:2]), job="lists", rank=0, world_size=2):
        with pytest.raises(ConfigError, match="another order"):
            Communicator(url_of(nodes[1::-1]), job="lists", rank=1, world_size=2)
        with pytest.raises(ConfigError, match="3 nodes"):
            Communicator(url_of(nodes[:3]), job="lists", rank=1, world_size=2)
