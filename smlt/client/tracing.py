"""`smlt trace`: one all-reduce under a magnifying glass, by n processes on this machine."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from smlt.collective.communicator import Communicator
from smlt.collective.trace import Trace, record
from smlt.errors import CollectiveError
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore

WARM_UP = 3
PATIENCE_S = 120.0


def _worker(rank: int, workers: int, floats: int, codec: str, algorithm: str, url: str, job: str, results: Any) -> None:
    gradient = np.random.default_rng(rank).standard_normal(floats, dtype=np.float32)
    with Communicator(url, job=job, rank=rank, world_size=workers, codec=codec, algorithm=algorithm) as comm:
        for _ in range(WARM_UP):
            comm.allreduce(gradient, out=gradient)
        comm.barrier()
        with record(comm) as trace:
            began = time.perf_counter()
            comm.allreduce(gradient, out=gradient)
            seconds = time.perf_counter() - began
        results.put((trace, seconds))
        comm.barrier()


def trace_allreduce(
    workers: int, floats: int, codec: str, algorithm: str, store_url: str | None
) -> tuple[list[Trace], list[float]]:
    """The traces of `workers` processes for one all-reduce of `floats` float32, and its seconds, by rank.

    CollectiveError when a worker fails.
    """
    context = mp.get_context("spawn")
    with ExitStack() as stack:
        url = store_url or stack.enter_context(EmbeddedStore()).url
        job = f"trace-{os.urandom(6).hex()}"
        parameters = ParameterStore(url, job=job)
        stack.callback(parameters.close)
        parameters.check()
        stack.callback(parameters.sweep)
        results: Any = context.Queue()
        arguments = (workers, floats, codec, algorithm, url, job, results)
        processes = [context.Process(target=_worker, args=(rank, *arguments), daemon=True) for rank in range(workers)]
        for process in processes:
            process.start()
            stack.callback(process.join, 10)
            stack.callback(process.terminate)
        rows = [_next_result(results, processes) for _ in processes]
        for process in processes:
            process.join(10)
    rows.sort(key=lambda row: row[0].rank)
    return [trace for trace, _ in rows], [seconds for _, seconds in rows]


def _next_result(results: Any, processes: list[Any]) -> tuple[Trace, float]:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            found: tuple[Trace, float] = results.get(timeout=0.2)
            return found
        except queue.Empty:
            if any(process.exitcode not in (None, 0) for process in processes):
                raise CollectiveError("a traced worker has failed: its error stands above") from None
    raise CollectiveError(f"the traced workers did not finish within {PATIENCE_S:g} s")
