"""What living through faults costs when none comes: an all-reduce of a job that is watched against one that is not.

    python -m bench.overhead [--workers 4] [--floats 11000000] [--rounds 40] [--baseline CHECKOUT]

In each round the workers do one all-reduce as members of a job (a heartbeat that renews the metadata key, a report after the
collective, the scheduler's stream of words watched) and one on a communicator of a job of its own without any of that,
in turn, all released together; which comes first alternates. Printed: medians of the slowest worker's milliseconds of the
collective, and the median of the rounds' ratios. The report itself, which comes behind the collective, is shown beside it.

`--baseline`: another checkout of this project, built in place; its collective takes the place of the one that is not
watched, in processes of its own that alternate with ours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.burst_worker import BurstWorker
from smlt import Communicator
from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore
from smlt.store.membership import Ack, Coordinator
from smlt.store.parameter import ParameterStore
from smlt.worker.config import WorkerConfig
from smlt.worker.member import Member

WARM_UP = 3


def worker(rank: int, n: int, floats: int, rounds: int, url: str, baseline: Path | None, start: Any, results: Any) -> None:
    """Seconds of this worker: watched, unwatched, reporting; a number a round."""
    x = np.random.default_rng(rank).standard_normal(floats, dtype=np.float32)
    out = np.empty_like(x)
    config = WorkerConfig("run", "watched", rank, n, "", "", 1, 64, worker_id=f"w{rank}", store_url=url)
    parameters = ParameterStore(url, job="watched")
    coordination = Coordination(parameters)
    member = Member(config, parameters)
    coordination.acknowledge(1, Ack(f"w{rank}"), member.process, [], "{}", config.liveness_s)
    member.generation = 1
    watched = Communicator(url, job="watched", rank=rank, world_size=n, worker_id=f"w{rank}")
    other = None
    if baseline is not None:
        other = BurstWorker(baseline, rank, n, floats, url, "baseline", baseline / ".venv/bin/python")
    plain = None if other is not None else Communicator(url, job="unwatched", rank=rank, world_size=n)
    if other is not None:
        other.ready()
    seconds: dict[str, list[float]] = {"watched": [], "unwatched": [], "report": []}

    def on(step: int) -> None:
        with member.heartbeat:  # as in a run, whose workers have one from beginning to end
            start.wait()
            began = time.perf_counter()
            watched.allreduce(x, out=out)
            took = time.perf_counter() - began
            member.report({"rank": rank, "step": step, "loss": 0.5, "samples": 64, "time": time.time()})
            seconds["watched"].append(took)
            seconds["report"].append(time.perf_counter() - began - took)

    def off(step: int) -> None:
        start.wait()
        if other is not None:
            other.start(1)
            seconds["unwatched"] += other.seconds()
            return
        assert plain is not None
        began = time.perf_counter()
        plain.allreduce(x, out=out)
        seconds["unwatched"].append(time.perf_counter() - began)

    for step in range(rounds + WARM_UP):
        for action in (on, off) if step % 2 else (off, on):
            action(step)
    start.wait()
    watched.close()
    if plain is not None:
        plain.close()
    if other is not None:
        other.close()
    results.put({name: values[WARM_UP:] for name, values in seconds.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--floats", type=int, default=11_000_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    fork = mp.get_context("fork")
    start, results = fork.Barrier(options.workers), fork.Queue()
    with ExitStack() as stack:
        store = stack.enter_context(EmbeddedStore())
        with_store = ParameterStore(store.url, job="watched")
        coordinator = Coordinator()
        Coordination(with_store).open_generation(coordinator.freeze(f"w{r}" for r in range(options.workers)), "bench")
        processes = [
            fork.Process(
                target=worker,
                args=(rank, options.workers, options.floats, options.rounds, store.url, options.baseline, start, results),
            )
            for rank in range(options.workers)
        ]
        for process in processes:
            process.start()
        rows = [results.get(timeout=1800) for _ in processes]
        for process in processes:
            process.join()
    slowest = {name: [max(row[name][i] for row in rows) for i in range(options.rounds)] for name in rows[0]}
    ratios = [on / off for on, off in zip(slowest["watched"], slowest["unwatched"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    for name, values in slowest.items():
        print(f"{name:10} {statistics.median(values) * 1e3:8.2f} ms")
    print(f"watched / unwatched: median {statistics.median(ratios):.4f} (quartiles {quartiles[0]:.4f} to {quartiles[2]:.4f})")
    if options.json:
        options.json.write_text(json.dumps({"seconds": slowest, "ratios": ratios}))
    sys.exit(0)


if __name__ == "__main__":
    main()
