"""What a store spends on a collective of many workers: processor's time, commands, connections, memory.

    python -m bench.many_workers [--workers 8 16 32 64 128] [--floats 100000 1000] [--rounds 20] [--passes 3] [--json PATH]
    python -m bench.many_workers --workers 64 --shards 1 2 4 8 16 32 64     each number of shards, in turn
    python -m bench.many_workers --tuning network ...     as the model has it for functions beside a store of 10 Gbit/s
    python -m bench.many_workers --simulated ...          beside what bench/simulator makes of the same

The workers are threads of a few processes, each with connections of its own: a collective releases the GIL. All check
their result against NumPy's mean, and every round's bits against one another's. The store is a valkey-server with a
unix socket; what it spends is INFO's used_cpu_user + used_cpu_sys and commandstats, after less before, over all rounds;
of the passes, which take all cases in turn, that with the least time counts, for others on the machine only add.
The last column is the exponent e of n^e by which the store's time has grown since the smallest n; bar for 100,000
floats: 1.1 from 8 to 128. Linux.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import statistics
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import redis

from smlt import Communicator
from smlt.collective import plan
from smlt.collective.codecs import wire_size
from smlt.collective.tuning import LOCAL, NETWORK, Tuning, choose
from smlt.store.embedded import EmbeddedStore

WARM_UP = 3
DEADLINE_S = 300
BAR = 1.1
TUNINGS = {"local": LOCAL, "network": NETWORK}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`shards` 0: what `smlt.collective.tuning` chooses."""

    workers: int
    floats: int
    tuning: str = "local"
    shards: int = 0
    codec: str = "fp16"
    nodes: int = 1

    @property
    def chosen(self) -> tuple[str, int]:
        """Algorithm and number of shards."""
        if self.shards:
            return "hierarchical", self.shards
        size = wire_size("float32", self.codec, self.floats)
        return choose(TUNINGS[self.tuning], "auto", self.workers, size, 1 << 16, self.nodes)


def gradient(rank: int, floats: int) -> Any:
    """Float32, of shape (floats,)."""
    return np.random.default_rng(0).standard_normal(floats, dtype=np.float32) * np.float32(1 + rank / 8)


def mean(n: int, floats: int) -> Any:
    """Of n workers' gradients."""
    return gradient(0, floats) * np.float32(1 + (n - 1) / 16)


class _Group:
    """The workers of one process, a thread each, which do each task together with those of all others."""

    def __init__(self, case: Case, ranks: range, url: str, everyone: Any) -> None:
        if case.shards:
            plan.choose = lambda *_, **__: ("hierarchical", case.shards)  # type: ignore[assignment]
        self.everyone = everyone  # the barrier of the processes
        tuning: Tuning = TUNINGS[case.tuning]
        self.comms: list[Communicator | None] = [None] * len(ranks)
        self.gradients = [gradient(rank, case.floats) for rank in ranks]
        self.sums: list[list[int]] = [[] for _ in ranks]  # of each round's bytes
        self.seconds: list[list[float]] = [[] for _ in ranks]

        def open_one(index: int) -> None:
            self.comms[index] = Communicator(
                url,
                job="many",
                rank=ranks[index],
                world_size=case.workers,
                codec=case.codec,
                tuning=tuning,
                timeout_s=DEADLINE_S,
            )

        self.together(open_one)
        assert self.comms[0] is not None
        self.chunk_bytes = self.comms[0].chunk_bytes

    def together(self, task: Callable[[int], None]) -> None:
        """`task(index)` for each worker, in threads; the first error is raised."""
        errors: list[BaseException] = []

        def run(index: int) -> None:
            try:
                task(index)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(self.comms))]
        self.everyone.wait(DEADLINE_S)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def reduce(self, rounds: int) -> None:
        """So many all-reduces, one after the other."""
        results = [np.empty_like(value) for value in self.gradients]
        threads = threading.Barrier(len(self.comms))

        def task(index: int) -> None:
            comm, mine = self.comms[index], results[index]
            assert comm is not None
            for _ in range(rounds):
                threads.wait(DEADLINE_S)
                began = time.perf_counter()
                comm.allreduce(self.gradients[index], out=mine)
                self.seconds[index].append(time.perf_counter() - began)
                self.sums[index].append(zlib.crc32(mine))

        self.together(task)
        self.results = results

    def check(self, expected: Any) -> list[int]:
        """Each round's bits, which must be the same on all workers here; the mean must be NumPy's."""
        assert all(sums == self.sums[0] for sums in self.sums), "workers of one process have different bits"
        for result in self.results:
            np.testing.assert_allclose(result, expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())
        return self.sums[0]

    def close(self) -> None:
        def close_one(index: int) -> None:
            comm = self.comms[index]
            assert comm is not None
            comm.close()

        self.together(close_one)


def _process(case: Case, ranks: range, url: str, rounds: int, everyone: Any, measuring: Any, results: Any) -> None:
    try:
        group = _Group(case, ranks, url, everyone)
        group.reduce(WARM_UP)
        measuring.wait(DEADLINE_S)  # who measures looks at the store
        measuring.wait(DEADLINE_S)
        group.seconds = [[] for _ in ranks]
        group.reduce(rounds)
        measuring.wait(DEADLINE_S)
        measuring.wait(DEADLINE_S)
        sums = group.check(mean(case.workers, case.floats))
        group.close()
        results.put((sums, [max(row) for row in zip(*group.seconds, strict=True)], group.chunk_bytes, ""))
    except BaseException as error:
        everyone.abort()
        measuring.abort()
        results.put(([], [], 0, f"{type(error).__name__}: {error}"))
        raise


def _look(clients: list[redis.Redis]) -> dict[str, Any]:
    """All nodes' processor seconds, calls and microseconds by command, connections, bytes of memory and their peak."""
    found: dict[str, Any] = {"cpu_s": 0.0, "calls": Counter(), "us": Counter(), "clients": 0, "bytes": 0, "peak_bytes": 0}
    for client in clients:
        info: Any = client.info("everything")
        found["cpu_s"] += info["used_cpu_user"] + info["used_cpu_sys"]
        found["clients"] += info["connected_clients"] - 1
        found["bytes"] += info["used_memory"]
        found["peak_bytes"] += info["used_memory_peak"]
        for name, value in info.items():
            if name.startswith("cmdstat_") and name not in ("cmdstat_info", "cmdstat_config|resetstat"):
                found["calls"][name.removeprefix("cmdstat_")] += int(value["calls"])
                found["us"][name.removeprefix("cmdstat_")] += float(value["usec"])
    return found


def measure(case: Case, rounds: int, processes: int) -> Row:
    """One case. RuntimeError when a worker fails, AssertionError when bits differ."""
    fork = mp.get_context("fork")
    count = min(processes, case.workers)
    cuts = [case.workers * i // count for i in range(count + 1)]
    everyone, measuring, results = fork.Barrier(count), fork.Barrier(count + 1), fork.Queue()
    with ExitStack() as stack:
        stores = [stack.enter_context(EmbeddedStore()) for _ in range(case.nodes)]
        url = ",".join(store.url for store in stores)
        started = [
            fork.Process(target=_process, args=(case, range(a, b), url, rounds, everyone, measuring, results), daemon=True)
            for a, b in pairwise(cuts)
        ]
        for process in started:
            process.start()
        try:
            clients = [stack.enter_context(redis.Redis.from_url(store.url)) for store in stores]
            measuring.wait(DEADLINE_S)
            for client in clients:
                client.config_resetstat()  # and the peak of memory
            before = _look(clients)
            measuring.wait(DEADLINE_S)
            measuring.wait(DEADLINE_S)
            after = _look(clients)
            measuring.wait(DEADLINE_S)
        except threading.BrokenBarrierError:
            pass
        answers = [results.get(timeout=DEADLINE_S) for _ in started]
        for process in started:
            process.join(DEADLINE_S)
    if errors := [error for *_, error in answers if error]:
        raise RuntimeError(max(errors, key=len))
    assert all(sums == answers[0][0] for sums, *_ in answers), "processes have different bits"
    seconds = [max(row) for row in zip(*(took for _, took, *_ in answers), strict=True)]
    algorithm, shards = case.chosen
    return {
        "workers": case.workers,
        "floats": case.floats,
        "tuning": case.tuning,
        "codec": case.codec,
        "nodes": case.nodes,
        "algorithm": algorithm,
        "shards": shards,
        "chunk_bytes": answers[0][2],
        "store_cpu_ms": (after["cpu_s"] - before["cpu_s"]) / rounds * 1e3,
        "seconds": statistics.median(seconds),
        "commands": {name: count / rounds for name, count in sorted((after["calls"] - before["calls"]).items())},
        "command_us": {name: us / rounds for name, us in sorted((after["us"] - before["us"]).items())},
        "connections": after["clients"],
        "used_memory_bytes": before["bytes"],
        "peak_memory_bytes": after["peak_bytes"],
        "rounds": rounds,
        "same_bits": True,
    }


def show(rows: list[Row]) -> None:
    widths = {
        "n": 4,
        "floats": 8,
        "algorithm": 15,
        "store CPU": 10,
        "all-reduce": 11,
        "commands": 9,
        "clients": 8,
        "peak MB": 8,
    }
    print(" ".join(f"{name:>{width}}" for name, width in widths.items()) + "  exponent")
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["floats"], row["tuning"], row["codec"], row["nodes"])
        start = first.setdefault(key, row)
        e = ""
        if row["workers"] > start["workers"]:
            e = f"{math.log(row['store_cpu_ms'] / start['store_cpu_ms']) / math.log(row['workers'] / start['workers']):.2f}"
        how = row["algorithm"] if row["algorithm"] == "one-shot" else f"m = {row['shards']}"
        print(
            f"{row['workers']:4} {row['floats']:8,} {how:>15} {row['store_cpu_ms']:7.2f} ms {row['seconds'] * 1e3:8.2f} ms"
            f" {sum(row['commands'].values()):9,.0f} {row['connections']:8} {row['peak_memory_bytes'] / 1e6:8.1f} {e:>9}"
        )
        parts = (f"{name} {count:,.0f} ({row['command_us'][name] / 1e3:.2f} ms)" for name, count in row["commands"].items())
        print("       " + ", ".join(parts))


#: Commands whose number follows from the plan alone; that of the others depends on how many tokens are read together.
PLANNED = ("set", "xadd", "unlink")


def simulate(row: Row) -> Row:
    """The same all-reduce in the simulator, on constants fitted to up to eight workers."""
    from bench.simulator import calibration, collective
    from bench.simulator.strategies import Gradient

    tuning, place = TUNINGS[row["tuning"]], calibration.load().places["local"]
    gradient = Gradient(row["floats"], row["codec"])
    place = place.with_nodes(row["nodes"])
    found = collective.smlt(
        place, row["workers"], gradient, tuning=tuning, rounds=3, shards=row["shards"], chunk_limit=row["chunk_bytes"]
    )
    return {"store_cpu_ms": found.store_cpu_s * 1e3, "seconds": found.seconds, "commands": found.calls}


def show_simulated(rows: list[Row]) -> None:
    """Simulated over measured. AssertionError when a number of commands differs that a plan fixes."""
    print("\nsimulated / measured (commands: simulated, measured)")
    for row in rows:
        found = row["simulated"] = simulate(row)
        made, counted = found["commands"], row["commands"]
        for name in PLANNED:
            assert round(made.get(name, 0)) == round(counted.get(name, 0)), f"{name}: {made} simulated, {counted} measured"
        others = ", ".join(f"{name} {made.get(name, 0):,.0f}, {counted.get(name, 0):,.0f}" for name in ("mget", "xread"))
        cpu, seconds = found["store_cpu_ms"] / row["store_cpu_ms"], found["seconds"] / row["seconds"]
        print(
            f"{row['workers']:4} {row['floats']:8,} m = {row['shards']:<3} store CPU {cpu:5.2f}   time {seconds:5.2f}"
            f"   set, xadd, unlink the same; {others}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--floats", type=int, nargs="+", default=[100_000, 1_000])
    parser.add_argument("--shards", type=int, nargs="+", default=[0], help="0: what the model chooses")
    parser.add_argument("--tuning", choices=list(TUNINGS), default="local")
    parser.add_argument("-k", "--nodes", type=int, default=1, help="of the store, all together in the figures")
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    cases = [
        Case(n, floats, options.tuning, shards, options.codec, options.nodes)
        for floats, n, shards in product(options.floats, options.workers, options.shards)
        if shards <= n
    ]
    passes = [[measure(case, options.rounds, options.processes) for case in cases] for _ in range(options.passes)]
    rows = [min(of_case, key=lambda row: row["store_cpu_ms"]) for of_case in zip(*passes, strict=True)]
    show(rows)
    if options.simulated:
        show_simulated(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
