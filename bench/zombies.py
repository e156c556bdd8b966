"""Duplicates and zombies: workers that were given up, or started twice, against those who take part.

    python -m bench.zombies [--tries 1000] [--seed 0]

Every other try is a zombie: one of three workers loses its network at a random moment of an all-reduce, a new generation begins
without it, and its bytes flow again while the new three reduce. The others are duplicates: while three workers reduce, a
fourth asks for one of their ranks, acknowledges under one of their names, and reports for a generation that is over.
Codecs, sizes, moments and in-place come of the seed. Counted as a finding (status 1): a worker whose result is not, byte for
byte, that of an undisturbed all-reduce of the same gradients; an intruder that is not told that it is one; a key that is left.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from smlt import Communicator
from smlt.errors import CollectiveError, FencedError, StoreError, WorkerLostError
from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore
from smlt.store.membership import Ack
from smlt.store.parameter import ParameterStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from proxy import Connection, Proxy

N = 3
TIMEOUT_S = 20.0


class Arena:
    """One store, one proxy, and what was found."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.store = EmbeddedStore()
        self.proxy = Proxy(self.store, seed=seed)
        self.pool = ThreadPoolExecutor(2 * N + 2)
        self.findings: list[str] = []
        self.outcomes: Counter[str] = Counter()

    def close(self) -> None:
        self.pool.shutdown()
        self.proxy.close()
        self.store.close()

    def join(self, job: str, rank: int, generation: int, *, by_proxy: bool = False) -> Communicator:
        url = self.proxy.url if by_proxy else self.store.tcp_url
        return Communicator(
            url, job=job, rank=rank, world_size=N, generation=generation, timeout_s=TIMEOUT_S, worker_id=f"g{generation}r{rank}"
        )

    def reduce(self, workers: list[Communicator], rows: list[np.ndarray], codec: str) -> list[Any]:
        """Begin an all-reduce in place on every worker; futures of the results."""

        def one(comm: Communicator, row: np.ndarray) -> np.ndarray:
            mine = row.copy()
            comm.allreduce(mine, codec=codec, out=mine)
            return mine

        return [self.pool.submit(one, comm, row) for comm, row in zip(workers, rows, strict=True)]

    def leave(self, workers: list[Communicator]) -> None:
        list(self.pool.map(lambda comm: comm.close(), workers))

    def check(self, where: str, expected: bytes, results: list[np.ndarray]) -> None:
        for rank, result in enumerate(results):
            if result.tobytes() != expected:
                self.findings.append(f"{where}: rank {rank} holds other bytes than undisturbed")


def draw(arena: Arena, number: int) -> tuple[list[np.ndarray], str, bytes]:
    """Gradients, a codec, and what an undisturbed all-reduce makes of them."""
    size = arena.chance.choice([100, 5_000, 60_000, 200_000])
    codec = arena.chance.choice(["fp32", "fp16", "bf16", "int8"])
    rows = [np.random.default_rng([number, rank]).standard_normal(size, dtype=np.float32) for rank in range(N)]
    workers = list(arena.pool.map(lambda rank: arena.join(f"calm-{number}", rank, 1), range(N)))
    results = [future.result() for future in arena.reduce(workers, rows, codec)]
    arena.leave(workers)
    return rows, codec, results[0].tobytes()


def zombie(arena: Arena, number: int) -> None:
    """See the module."""
    rows, codec, expected = draw(arena, number)
    job, who = f"zombie-{number}", arena.chance.randrange(N)
    parameters = ParameterStore(arena.store.tcp_url, job=job)
    coordination = Coordination(parameters)
    coordination.open_generation(1, "bench")
    before = len(arena.proxy.connections)
    workers = list(arena.pool.map(lambda rank: arena.join(job, rank, 1, by_proxy=rank == who), range(N)))
    lanes: list[Connection] = arena.proxy.connections[before:]
    futures = arena.reduce(workers, rows, codec)
    time.sleep(arena.chance.choice([0.0, arena.chance.uniform(0, 0.002), arena.chance.uniform(0, 0.02)]))
    for connection in lanes:
        connection.silence()
    coordination.open_generation(2, "bench")
    survivors = [rank for rank in range(N) if rank != who]
    for rank in survivors:
        try:
            arena.check(f"try {number}, generation 1", expected, [futures[rank].result(TIMEOUT_S)])
            arena.outcomes["survivors that had completed"] += 1
        except FencedError:
            arena.outcomes["survivors that were fenced"] += 1
    arena.leave([workers[rank] for rank in survivors])
    again = list(arena.pool.map(lambda rank: arena.join(job, rank, 2), range(N)))
    following = arena.reduce(again, rows, codec)
    time.sleep(arena.chance.uniform(0, 0.005))
    for connection in lanes:
        for direction in (connection.up, connection.down):
            direction.thaw()
    arena.check(f"try {number}, generation 2", expected, [future.result(TIMEOUT_S) for future in following])
    try:
        arena.check(f"try {number}, zombie", expected, [futures[who].result(TIMEOUT_S)])
        arena.outcomes["zombies that had completed"] += 1
        try:
            workers[who].allreduce(rows[who])
            arena.findings.append(f"try {number}: a zombie took part in another collective")
        except (FencedError, WorkerLostError):  # lost are, for it, those who have gone on without it
            arena.outcomes["zombies that were told then"] += 1
    except FencedError:
        arena.outcomes["zombies that were fenced"] += 1
    except (CollectiveError, StoreError) as error:
        arena.findings.append(f"try {number}: a zombie was told {type(error).__name__}: {error}")
    arena.leave([workers[who], *again])
    sweep(arena, parameters, number)


def duplicate(arena: Arena, number: int) -> None:
    """See the module."""
    rows, codec, expected = draw(arena, number)
    job = f"duplicate-{number}"
    parameters = ParameterStore(arena.store.tcp_url, job=job)
    coordination = Coordination(parameters)
    coordination.open_generation(1, "bench")
    coordination.open_generation(2, "bench")
    for rank in range(N):
        coordination.acknowledge(2, Ack(f"w{rank}"), f"process {rank}", [], "{}", TIMEOUT_S)
    workers = list(arena.pool.map(lambda rank: arena.join(job, rank, 2), range(N)))
    futures = arena.reduce(workers, rows, codec)
    rank, told = arena.chance.randrange(N), 0
    attempts = {
        "a rank that is taken": lambda: Communicator(
            arena.store.tcp_url, job=job, rank=rank, world_size=N, generation=2, worker_id="another"
        ),
        "a name that is taken": lambda: coordination.acknowledge(2, Ack(f"w{rank}"), "another", [], "{}", TIMEOUT_S),
        "a generation that is over": lambda: coordination.report(1, f"w{rank}", rank, {"rank": rank, "loss": 0.0}, TIMEOUT_S),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
            arena.findings.append(f"try {number}: {what} was given to a duplicate")
        except FencedError:
            told += 1
    arena.outcomes["duplicates that were refused"] += told
    arena.check(f"try {number}", expected, [future.result(TIMEOUT_S) for future in futures])
    if parameters.count_keys("meta:*"):
        arena.findings.append(f"try {number}: a report of an older generation was taken")
    arena.leave(workers)
    sweep(arena, parameters, number)


def sweep(arena: Arena, parameters: ParameterStore, number: int) -> None:
    """As the scheduler does at the end; nothing may come behind it."""
    with suppress(StoreError):
        parameters.sweep()
    if left := parameters.count_keys():
        arena.findings.append(f"try {number}: {left} keys are left")
    parameters.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    threading.stack_size(1 << 20)
    arena, began = Arena(options.seed), time.monotonic()
    try:
        for number in range(options.tries):
            (zombie if number % 2 else duplicate)(arena, number)
            if len(arena.findings) > 10:
                break
    finally:
        arena.close()
    print(f"{options.tries} tries in {time.monotonic() - began:.0f} s")
    for what, count in sorted(arena.outcomes.items()):
        print(f"  {what:32}{count:6}")
    for finding in arena.findings:
        print(f"FOUND: {finding}")
    print(f"{len(arena.findings)} findings")
    sys.exit(bool(arena.findings))


if __name__ == "__main__":
    main()
