"""SMLT's all-reduce beside what an expert writes with redis-py, hiredis and NumPy, interleaved in one run.

    python -m bench.compare [--workers 4] [--floats 11000000] [--rounds 7] [--json]

n processes and one embedded store share this machine. In each round every peer does one all-reduce after the other, all
workers released together; a peer's time is the slowest worker's. The table gives medians, the spread (middle half) and
the ratio to redis-py with float32. Every peer's result is checked once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import redis

from smlt import Communicator
from smlt.store.embedded import EmbeddedStore

Floats = npt.NDArray[np.float32]


def redis_py_allreduce(client: redis.Redis, rank: int, n: int, gradient: Floats, step: int, wire: type, prefix: str) -> Floats:
    """Scatter-reduce with MSET, MGET and a 0.5 ms poll: one shard a worker, keys deleted as in SMLT."""
    cut = [gradient.size * i // n for i in range(n + 1)]
    coded = gradient.astype(wire, copy=False)
    client.mset({f"{prefix}{step}:s:{rank}:{i}": coded[cut[i] : cut[i + 1]].tobytes() for i in range(n)})
    total = np.zeros(cut[rank + 1] - cut[rank], np.float32)
    shards = [f"{prefix}{step}:s:{j}:{rank}" for j in range(n)]
    for value in _when_there(client, shards):
        total += np.frombuffer(value, wire)
    client.set(f"{prefix}{step}:a:{rank}", (total / n).astype(wire).tobytes())
    client.delete(*shards)
    if step > 1:
        client.delete(f"{prefix}{step - 2}:a:{rank}")
    result = np.empty(gradient.size, np.float32)
    for i, value in enumerate(_when_there(client, [f"{prefix}{step}:a:{i}" for i in range(n)])):
        result[cut[i] : cut[i + 1]] = np.frombuffer(value, wire)
    return result


def _when_there(client: redis.Redis, keys: list[str]) -> list[bytes]:
    found: dict[str, bytes] = {}
    while True:
        missing = [key for key in keys if key not in found]
        if not missing:
            return [found[key] for key in keys]
        values: Any = client.mget(missing)
        found.update({key: value for key, value in zip(missing, values, strict=True) if value is not None})
        if len(found) < len(keys):
            time.sleep(0.0005)


def worker(rank: int, n: int, floats: int, rounds: int, url: str, start: Any, times: Any) -> None:
    gradient = np.random.default_rng(rank).standard_normal(floats, dtype=np.float32)
    expected = sum(np.random.default_rng(r).standard_normal(floats, dtype=np.float32) for r in range(n)) / n
    out = np.empty_like(gradient)
    client = redis.Redis.from_url(url)
    with Communicator(url, job="compare", rank=rank, world_size=n) as comm:
        peers: dict[str, Callable[[int], Floats]] = {
            "redis-py float32": lambda step: redis_py_allreduce(client, rank, n, gradient, step, np.float32, "a:"),
            "redis-py float16": lambda step: redis_py_allreduce(client, rank, n, gradient, step, np.float16, "b:"),
            "smlt fp32": lambda step: comm.allreduce(gradient, codec="fp32", out=out),
            "smlt fp16": lambda step: comm.allreduce(gradient, codec="fp16", out=out),
        }
        for step in range(rounds + 2):  # the first two warm up
            for name, allreduce in peers.items():
                start.wait()
                began = time.perf_counter()
                result = allreduce(step)
                seconds = time.perf_counter() - began
                if step == 0:
                    np.testing.assert_allclose(result, expected, atol=5e-3 if "16" in name else 1e-5)
                elif step >= 2:
                    times.put((name, step, seconds))


def measure(n: int, floats: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the slowest worker by peer and round."""
    start, times = mp.Barrier(n), mp.Queue()
    with EmbeddedStore() as store:
        processes = [mp.Process(target=worker, args=(r, n, floats, rounds, store.tcp_url, start, times)) for r in range(n)]
        for process in processes:
            process.start()
        rows = [times.get(timeout=300) for _ in range(n * rounds * 4)]
        for process in processes:
            process.join()
    slowest: dict[str, dict[int, float]] = {}
    for name, step, seconds in rows:
        by_step = slowest.setdefault(name, {})
        by_step[step] = max(by_step.get(step, 0.0), seconds)
    return {name: list(by_step.values()) for name, by_step in slowest.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[4])
    parser.add_argument("--floats", type=int, default=11_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for n in options.workers:
        times = measure(n, options.floats, options.rounds)
        base = statistics.median(times["redis-py float32"])
        for name, seconds in sorted(times.items()):
            low, _, high = statistics.quantiles(seconds, n=4)
            median = statistics.median(seconds)
            rows.append(
                {"workers": n, "floats": options.floats, "peer": name, "median_ms": median * 1e3, "speedup": base / median}
            )
            if not options.json:
                spread = f"{low * 1e3:.1f} to {high * 1e3:.1f}"
                print(f"n={n} {name:17} {median * 1e3:8.1f} ms  ({spread} ms)  {base / median:5.2f}x", flush=True)
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
