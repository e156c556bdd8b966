"""What many collectives leave behind: keys and memory in the store, and growth of a worker's memory.

    python -m bench.growth [--collectives 10000] [--workers 4] [--floats 100000]

Sizes vary from call to call as in a training run (gradient, scalars, barrier). Memory is compared with what it was after a
warm-up, while no collective is under way; a worker's is what is resident, the store's INFO used_memory. Bars: no key left
behind, less than 1 MB.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing as mp
import time
from typing import Any

import numpy as np
import redis

from smlt import Communicator
from smlt.store.embedded import EmbeddedStore
from smlt.worker.trainer import resident_mb

WARM_UP = 200
#: The store counts buffers of its clients in; it gives those that were used little back within a few seconds.
SETTLE_S = 3.0


def state(comm: Communicator, url: str) -> dict[str, float]:
    """Memory in MB and keys between two collectives; all workers call it."""
    gc.collect()
    comm.barrier()
    found = {"worker MB": resident_mb()}
    if comm.rank == 0:
        time.sleep(SETTLE_S)
        with redis.Redis.from_url(url) as client:
            found["store MB"] = client.info("memory")["used_memory"] / 1e6
            found["keys"] = float(client.dbsize())
    comm.barrier()
    return found


def worker(rank: int, n: int, collectives: int, floats: int, url: str, results: Any) -> None:
    gradient = np.ones(floats, np.float32)
    done = 0

    def some(comm: Communicator, count: int) -> None:
        nonlocal done
        until = done + count
        while done < until:
            comm.allreduce(gradient, out=gradient)
            done += 1
            if done % 10 == 0:
                comm.allreduce({"loss": 1.0, "count": 3}, op="sum")
                comm.barrier()
                done += 2

    with Communicator(url, job="growth", rank=rank, world_size=n) as comm:
        some(comm, WARM_UP)
        before = state(comm, url)
        began = time.perf_counter()
        some(comm, collectives)
        seconds = time.perf_counter() - began
        after = state(comm, url)
    results.put((before, after, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collectives", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--floats", type=int, default=100_000)
    options = parser.parse_args()
    results: Any = mp.Queue()
    with EmbeddedStore() as store, redis.Redis.from_url(store.url) as client:
        arguments = (options.workers, options.collectives, options.floats, store.url, results)
        processes = [mp.Process(target=worker, args=(rank, *arguments)) for rank in range(options.workers)]
        for process in processes:
            process.start()
        rows = [results.get(timeout=3600) for _ in processes]
        for process in processes:
            process.join()
        left: Any = client.dbsize()
    growth = {
        key: max(after[key] - before[key] for before, after, _ in rows if key in before) for key in ("worker MB", "store MB")
    }
    first, last = next((before["keys"], after["keys"]) for before, after, _ in rows if "keys" in before)
    seconds = max(seconds for _, _, seconds in rows)
    print(f"{options.collectives} collectives, {options.workers} workers, {options.floats:,} floats: {seconds:.1f} s")
    print(f"growth of memory: a worker's {growth['worker MB']:.2f} MB at most, the store's {growth['store MB']:.2f} MB")
    print(f"keys between two collectives: {first:.0f} at first, {last:.0f} at last; after the job: {left}")


if __name__ == "__main__":
    main()
