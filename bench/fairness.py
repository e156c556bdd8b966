"""Jobs that share a store: do equal ones get equal shares, and does a large one starve a small one?

    python -m bench.fairness [--workers 2] [--floats 1000000] [--large 11000000] [--small 1000 10000 250000] [--rounds 5]
                             [--seconds 2] [--links [MBIT]] [--json PATH]

Every job is processes of its own on one embedded store over its unix socket (with --links over a link of that rate for each
worker, bench/links.py; root), and does one all-reduce after the other (fp16) for
so many seconds. All settings are interleaved: each round runs every one of them.

1. One to four equal jobs: all-reduces a second of each, and Jain's index of them, (sum x)^2 / (n sum x^2): 1 when all get the
   same, 1/n when one gets all (R. Jain, D. Chiu, W. Hawe, "A Quantitative Measure of Fairness and Discrimination", DEC-TR-301,
   1984). "Together" is the sum beside what one job alone does.
2. A small job: milliseconds of its all-reduce alone; beside a large job on the same store; and beside a large job that has
   a store of its own. The last shares the machine's cores as well: what the same store adds to it is the store's doing.

3. Two jobs of which one has twice as many workers: bytes that a worker of each moves in a second. The store serves its
   connections in turn: what is fair to it is an equal share for each worker, not for each job.
4. How long a single command keeps everybody else waiting, by the store's own clock (INFO latencystats).

Of a round the median and the 95th percentile of the small job's all-reduces; shown is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import signal
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis

from bench.limit import volumes
from bench.links import RATE_MBIT, Links, shaped_links
from smlt import Communicator
from smlt.collective.codecs import wire_size
from smlt.store.embedded import EmbeddedStore

JOBS = (1, 2, 3, 4)
WARM_UP = 3
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Job:
    """`n` workers that average so many floats, over and over, on the store number `store`."""

    n: int
    floats: int
    store: int = 0


def worker(
    job: Job, name: str, rank: int, url: str, seconds: float, start: Any, results: Any, links: Links | None, place: int
) -> None:
    """What each all-reduce has taken, from rank 0. The request to end travels in the all-reduce, so that all end together."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if links is not None:
        links.enter(place)
    gradient = np.random.default_rng(rank).standard_normal(job.floats, dtype=np.float32)
    out, stop, took = np.empty_like(gradient), np.zeros(1, np.float32), list[float]()
    with Communicator(url, job=name, rank=rank, world_size=job.n) as comm:

        def once() -> bool:
            flag = np.empty_like(stop)
            comm.allreduce([gradient, stop], out=[out, flag])
            return bool(flag[0] > 0)

        for _ in range(WARM_UP):
            once()
        start.wait(DEADLINE_S)
        end = time.perf_counter() + seconds
        while True:
            began = time.perf_counter()
            stop[0] = rank == 0 and began > end
            if once():
                break
            took.append(time.perf_counter() - began)
    if rank == 0:
        results.put((name, took))


def run(jobs: list[Job], stores: list[EmbeddedStore], links: Links | None, seconds: float, label: str) -> list[list[float]]:
    """Seconds of every all-reduce of each of these jobs, which run at once."""
    fork = mp.get_context("fork")
    start, results = fork.Barrier(sum(job.n for job in jobs)), fork.Queue()
    names = [f"{label}-{number}-{time.monotonic_ns()}" for number in range(len(jobs))]
    everyone = [(job, name, rank) for job, name in zip(jobs, names, strict=True) for rank in range(job.n)]
    processes = []
    for place, (job, name, rank) in enumerate(everyone):
        store = stores[job.store]
        url = store.url if links is None else store.tcp_url_at(links.store_host(place))
        processes.append(fork.Process(target=worker, args=(job, name, rank, url, seconds, start, results, links, place)))
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=DEADLINE_S) for _ in jobs)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [found[name] for name in names]


def jain(shares: list[float]) -> float:
    """1: all alike; 1/n: one has it all."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def settings(options: argparse.Namespace) -> dict[str, list[Job]]:
    """What runs at once, by name; a small job comes first."""
    n = options.workers
    found = {f"{count} equal": [Job(n, options.floats)] * count for count in JOBS}
    found["large alone"] = [Job(n, options.large)]
    for small in options.small:
        found[f"{small} alone"] = [Job(n, small)]
        found[f"{small} beside large, same store"] = [Job(n, small), Job(n, options.large)]
        found[f"{small} beside large, own stores"] = [Job(n, small), Job(n, options.large, store=1)]
    found["unequal"] = [Job(n, options.floats), Job(2 * n, options.floats)]
    return found


def measure(options: argparse.Namespace) -> tuple[dict[str, list[list[list[float]]]], dict[str, Any]]:
    """Seconds of every all-reduce, by setting, round and job; and the microseconds of the store's commands."""
    found: dict[str, list[list[list[float]]]] = {name: [] for name in settings(options)}
    most = max(sum(job.n for job in jobs) for jobs in settings(options).values())
    with ExitStack() as stack:
        links = stack.enter_context(shaped_links(most, options.links)) if options.links else None
        hosts = links.store_hosts if links is not None else ()
        one, other = (stack.enter_context(EmbeddedStore(bind=hosts)) for _ in range(2))
        for turn in range(options.rounds):
            named = list(settings(options).items())
            for name, jobs in named[turn % len(named) :] + named[: turn % len(named)]:
                found[name].append(run(jobs, [one, other], links, options.seconds, f"fair{turn}"))
        with redis.Redis.from_url(one.url) as client:
            statistics_us: dict[str, Any] = client.info("latencystats")
    return found, {name.removeprefix("latency_percentiles_usec_"): us for name, us in statistics_us.items()}


def median_ms(rounds: list[list[list[float]]], job: int = 0, percent: int = 50) -> float:
    """Over the rounds the median of a round's percentile."""
    return statistics.median(float(np.percentile(one[job], percent)) for one in rounds) * 1e3


def show(found: dict[str, list[list[list[float]]]], latencies: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Print the tables; what they hold."""
    shown: dict[str, Any] = {}
    alone = statistics.median(len(one[0]) / sum(one[0]) for one in found["1 equal"])
    print(f"equal jobs, n = {options.workers}, {options.floats:,} floats: all-reduces a second, {options.rounds} rounds")
    for count in JOBS:
        rates = [[len(took) / sum(took) for took in one] for one in found[f"{count} equal"]]
        index = [jain(one) for one in rates]
        each = [statistics.median(column) for column in zip(*rates, strict=True)]
        together = statistics.median(sum(one) for one in rates) / alone
        text = " ".join(f"{rate:7.1f}" for rate in each)
        print(f"  {count}: Jain {statistics.median(index):.4f} (least {min(index):.4f}), together {together:.2f}  each {text}")
        shown[f"{count} equal"] = {"jain": index, "rates": rates}
    large = median_ms(found["large alone"])
    print(f"a small job beside one of {options.large:,} floats (alone {large:.1f} ms): ms of the small one, median and 95 %")
    for small in options.small:
        names = [f"{small} {where}" for where in ("alone", "beside large, same store", "beside large, own stores")]
        cells = [(median_ms(found[name]), median_ms(found[name], percent=95)) for name in names]
        slower = median_ms(found[names[1]], 1) / large
        text = "   ".join(f"{middle:8.3f} {high:8.3f}" for middle, high in cells)
        same, own = cells[1][0] / cells[0][0], cells[2][0] / cells[0][0]
        print(f"  {small:>9,}: alone, same, own {text}   x {same:.2f} and x {own:.2f}; the large one x {slower:.2f}")
        shown[f"{small}"] = {"alone": cells[0], "same": cells[1], "own": cells[2], "large": slower}
    shares = [
        [_mb_per_s(took, job) for took, job in zip(one, settings(options)["unequal"], strict=True)] for one in found["unequal"]
    ]
    few, many = (statistics.median(column) for column in zip(*shares, strict=True))
    print(f"jobs of {options.workers} and {2 * options.workers} workers: MB/s that each worker moves {few:.0f} and {many:.0f}")
    print("microseconds that one command keeps the others waiting, by the store's clock")
    for name in ("set", "mget", "xread", "xadd"):
        print(f"  {name:6} " + ", ".join(f"{key} {value:g}" for key, value in latencies.get(name, {}).items()))
    return {**shown, "unequal": shares, "latencies": latencies}


def _mb_per_s(took: list[float], job: Job) -> float:
    sent, received = volumes(job.n, wire_size("float32", "fp16", job.floats))
    return (sent + received) / 1e6 * len(took) / sum(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--floats", type=int, default=1_000_000)
    parser.add_argument("--large", type=int, default=11_000_000)
    parser.add_argument("--small", type=int, nargs="+", default=[1000, 10_000, 250_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--links", type=float, nargs="?", const=RATE_MBIT, metavar="MBIT")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shown = show(*measure(options), options)
    if options.json:
        options.json.write_text(json.dumps(shown))


if __name__ == "__main__":
    main()
