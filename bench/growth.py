"""What many collectives leave behind: keys in the store, and growth of a worker's memory.

    python -m bench.growth [--collectives 1000] [--workers 4] [--floats 100000]

Sizes vary from call to call as in a training run (gradient, scalars, barrier). Bars: no key, less than 1 MB.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing as mp
from typing import Any

import numpy as np
import redis

from smlt import Communicator
from smlt.store.embedded import EmbeddedStore
from smlt.worker.trainer import resident_mb

WARM_UP = 100


def worker(rank: int, n: int, collectives: int, floats: int, url: str, results: Any) -> None:
    gradient = np.ones(floats, np.float32)
    with Communicator(url, job="growth", rank=rank, world_size=n) as comm:
        before = 0.0
        for i in range(collectives + WARM_UP):
            if i == WARM_UP:
                gc.collect()
                before = resident_mb()
            comm.allreduce(gradient, out=gradient)
            if i % 10 == 0:
                comm.allreduce({"loss": 1.0, "count": 3}, op="sum")
                comm.barrier()
        gc.collect()
        results.put(resident_mb() - before)
        comm.barrier()
        results.put(int(comm.parameter_store.count_keys()) if comm.parameter_store is not None and rank == 0 else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collectives", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--floats", type=int, default=100_000)
    options = parser.parse_args()
    results: Any = mp.Queue()
    with EmbeddedStore() as store:
        client = redis.Redis.from_url(store.url)
        arguments = (options.workers, options.collectives, options.floats, store.url, results)
        processes = [mp.Process(target=worker, args=(rank, *arguments)) for rank in range(options.workers)]
        for process in processes:
            process.start()
        rows = [results.get(timeout=600) for _ in range(2 * options.workers)]
        for process in processes:
            process.join()
        growth = max(row for row in rows if isinstance(row, float))
        alive = next(row for row in rows if isinstance(row, int))
        left: Any = client.dbsize()
    print(f"{options.collectives} collectives, {options.workers} workers: growth of resident memory {growth:.2f} MB at most")
    print(f"keys while the job lives (between collectives): {alive}; after it: {left}")


if __name__ == "__main__":
    main()
