"""How much memory an all-reduce takes, in the store and in each worker.

    python -m bench.memory [--workers 8] [--floats 11000000] [--codec fp16] [--rounds 5] [--json]

In place (`out` is the gradient itself), on a fresh embedded store, over its unix socket. The store: its peak
(INFO used_memory_peak; the server looks 500 times a second) above what it used before, over n encoded gradients; bar 1.3.
A worker: its peak of resident memory (VmHWM, set back before) above what it used with the gradient, before it opened its
communicator, over one encoded gradient; bar 1.1. Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import re
from pathlib import Path
from typing import Any

import numpy as np
import redis

from smlt import Communicator
from smlt.collective.codecs import CODECS, wire_size
from smlt.store.embedded import EmbeddedStore

STORE_BAR, WORKER_BAR = 1.3, 1.1


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def worker(rank: int, n: int, floats: int, codec: str, rounds: int, url: str, start: Any, results: Any) -> None:
    gradient = np.full(floats, rank + 1, np.float32)
    start.wait()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with Communicator(url, job="memory", rank=rank, world_size=n) as comm:
        for _ in range(rounds):
            comm.allreduce(gradient, codec=codec, out=gradient)
        peak = resident_bytes("VmHWM")
    np.testing.assert_allclose(gradient, (n + 1) / 2, rtol=1e-2)
    results.put(peak - before)


def measure(n: int, floats: int, codec: str, rounds: int) -> dict[str, Any]:
    """The peaks in bytes, and over what they are compared with."""
    encoded = wire_size("float32", codec, floats)
    start = mp.Barrier(n)
    results: Any = mp.Queue()
    with EmbeddedStore() as store, redis.Redis.from_url(store.url) as client:
        client.config_set("hz", "500")
        before: dict[str, Any] = client.info("memory")
        arguments = (n, floats, codec, rounds, store.url, start, results)
        processes = [mp.Process(target=worker, args=(rank, *arguments)) for rank in range(n)]
        for process in processes:
            process.start()
        extra = max(results.get(timeout=600) for _ in processes)
        for process in processes:
            process.join()
        peak = client.info("memory")["used_memory_peak"] - before["used_memory"]
    return {
        "workers": n,
        "floats": floats,
        "codec": codec,
        "encoded_bytes": encoded,
        "store_peak_bytes": peak,
        "store_ratio": peak / (n * encoded),
        "worker_extra_bytes": extra,
        "worker_ratio": extra / encoded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--floats", type=int, default=11_000_000)
    parser.add_argument("--codec", choices=list(CODECS), default="fp16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    row = measure(options.workers, options.floats, options.codec, options.rounds)
    if options.json:
        print(json.dumps(row))
        return
    print(f"{row['workers']} workers, {row['floats']:,} floats, {row['codec']}: {row['encoded_bytes'] / 1e6:.1f} MB encoded")
    store, extra = row["store_peak_bytes"] / 1e6, row["worker_extra_bytes"] / 1e6
    print(f"store: {store:.1f} MB at its peak, {row['store_ratio']:.2f} times n encoded gradients (bar {STORE_BAR})")
    print(f"worker: {extra:.1f} MB at its peak, {row['worker_ratio']:.2f} times its encoded gradient (bar {WORKER_BAR})")


if __name__ == "__main__":
    main()
