"""Lost connections in collectives whose results are for some workers only: the result is right (invariant 5)."""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from groups import in_parallel
from processes import keys_left
from proxy import Connection, Proxy

from smlt import Communicator
from smlt.errors import SmltError
from smlt.store.embedded import EmbeddedStore
from smlt.torch import Options, ProcessGroup

N = 3


def options(kind: type, **values: object) -> object:
    made = kind()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def rounds(group: ProcessGroup, size: int) -> None:
    """Every such collective, twice, some together."""
    rank = group.communicator.rank
    for turn in range(2):
        x = [torch.arange(size, dtype=torch.float32) + 10 * rank + other + turn for other in range(N)]

        def column(other: int, turn: int = turn) -> torch.Tensor:
            """What rank `other` has for this one."""
            return torch.arange(size, dtype=torch.float32) + 10 * other + rank + turn

        summed = sum((column(other) for other in range(N)), torch.zeros(size))
        scattered, output = torch.empty(size), torch.empty(size)
        exchanged, gathered = [torch.empty(size) for _ in range(N)], [torch.empty(size) for _ in range(N)]
        reduced = x[turn].clone()
        works = [
            group.reduce_scatter([output], [x]),
            group.alltoall(exchanged, x),
            group.scatter([scattered], [x] if rank == turn else [], options(dist.ScatterOptions, rootRank=turn)),
            group.gather([gathered] if rank == turn else [], [x[turn]], options(dist.GatherOptions, rootRank=turn)),
            group.reduce([reduced], options(dist.ReduceOptions, rootRank=2 - turn)),
        ]
        for work in works:
            assert work.wait()
        assert torch.equal(output, summed)
        for other in range(N):
            assert torch.equal(exchanged[other], column(other))
        assert torch.equal(scattered, torch.arange(size, dtype=torch.float32) + 10 * turn + rank + turn)
        if rank == turn:
            for other in range(N):
                assert torch.equal(gathered[other], torch.arange(size, dtype=torch.float32) + 10 * other + turn + turn)
        if rank == 2 - turn:
            own = sum(torch.arange(size, dtype=torch.float32) + 10 * other + turn + turn for other in range(N))
            assert torch.equal(reduced, own)
        else:
            assert torch.equal(reduced, x[turn])
    group.barrier().wait()


def made(urls: list[str], timeout_s: float) -> list[ProcessGroup]:
    job = f"recovery-{uuid.uuid4().hex[:8]}"
    groups = []
    for rank, url in enumerate(urls):
        comm = Communicator(url, job=job, rank=rank, world_size=N, timeout_s=timeout_s, codec="fp32", chunk_bytes=8 * 1024)
        groups.append(ProcessGroup(comm, Options(), lambda: None))
    return groups


def run(urls: list[str], store: EmbeddedStore, size: int) -> None:
    groups = made(urls, 20)
    outcomes = in_parallel([lambda group=group: rounds(group, size) for group in groups])  # type: ignore[misc]
    assert [outcome.error for outcome in outcomes] == [None] * N
    in_parallel([group.shutdown for group in groups])
    assert keys_left(store, groups[0].communicator.job) == []


@pytest.mark.parametrize("size", [5, 5000, 100_000])
def test_an_undisturbed_network(store: EmbeddedStore, size: int) -> None:
    run([store.tcp_url] * N, store, size)


@pytest.mark.parametrize("seed", range(8))
def test_connections_that_end_at_any_byte(store: EmbeddedStore, seed: int) -> None:
    chance = random.Random(seed)
    with Proxy(store, seed=seed) as proxy:
        ends = 12

        def on_lane(connection: Connection, lane: int) -> None:
            nonlocal ends
            if ends > 0 and chance.random() < 0.8:
                ends -= 1
                direction = chance.choice([connection.up, connection.down])
                direction.at(int(chance.expovariate(1 / 20_000)) + 150, chance.choice(["reset", "close"]))

        proxy.on_lane = on_lane
        run(
            [proxy.url] * N if seed % 2 else [store.tcp_url, proxy.url, store.tcp_url],
            store,
            chance.choice([300, 9000, 40_000]),
        )


@pytest.mark.parametrize("after_s", [0.005, 0.03])
def test_a_store_that_comes_back_empty_gives_no_wrong_result(after_s: float) -> None:
    """Who has only sent may have forgotten what is lost: then it ends in words."""
    with EmbeddedStore() as own:
        groups = made([own.tcp_url] * N, 3)

        def kill() -> None:
            time.sleep(after_s)
            os.kill(own.pid, signal.SIGKILL)
            while own.alive:
                time.sleep(0.005)
            own.restart()

        outcomes = in_parallel([*(lambda group=group: rounds(group, 60_000) for group in groups), kill])  # type: ignore[misc]
        assert outcomes[-1].error is None
        for outcome in outcomes[:-1]:
            assert outcome.error is None or isinstance(outcome.error, SmltError)
        in_parallel([group.shutdown for group in groups])


def test_the_timeout_can_be_changed(store: EmbeddedStore) -> None:
    comm = Communicator(None, world_size=1)
    group = ProcessGroup(comm, Options(), lambda: None)
    group.set_timeout(timedelta(seconds=7))
    assert comm.timeout_s == 7
    works = [group.allreduce([torch.ones(2)]), group.barrier()]
    assert all(work.wait() for work in works)
    group.shutdown()
