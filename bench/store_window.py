"""How much of the store's memory an all-reduce takes, with and without a window.

    python -m bench.store_window [--workers 8] [--floats 33554432] [--windows 16 64 256] [--nodes 1] [--calls 3] [--json PATH]

n processes (each forks before it connects) all-reduce a float32 gradient as fp16 through embedded store nodes. For each
window (in MB of 10^6 bytes; 0: none) all connect, the peak is reset (CONFIG RESETSTAT), then all make their calls at once.
A line a window: the node's used_memory_peak above what it used before the first call, at the fullest node, beside the
window; and the time of a call. Results are checked: all workers have the same bits, within fp16's bound of the mean.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing as mp
import statistics
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import redis

from smlt import Communicator
from smlt.store.embedded import EmbeddedStore

DEADLINE_S = 600


def work(options: argparse.Namespace, rank: int, url: str, window_bytes: int, start: Any, results: Any) -> None:
    """One worker; its seconds a call and its result's digest go to `results`, or its error."""
    try:
        gradient = np.random.default_rng(rank).standard_normal(options.floats, dtype=np.float32)
        out, seconds = np.empty_like(gradient), []
        with Communicator(
            url,
            job=f"window{window_bytes}",
            rank=rank,
            world_size=options.workers,
            store_window_bytes=window_bytes,
            timeout_s=DEADLINE_S,
        ) as communicator:
            for _ in range(options.calls):
                start.wait(DEADLINE_S)
                began = time.perf_counter()
                communicator.allreduce(gradient, codec="fp16", out=out)
                seconds.append(time.perf_counter() - began)
            start.wait(DEADLINE_S)
        results.put((rank, seconds, hashlib.sha256(out).hexdigest(), out[:1000].tolist(), ""))
    except BaseException:
        results.put((rank, [], "", [], traceback.format_exc()))
        start.abort()


def used(url: str, field: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.info("memory")[field])


def measure(options: argparse.Namespace, window_bytes: int) -> dict[str, Any]:
    """The row of one window."""
    fork, n = mp.get_context("fork"), options.workers
    with ExitStack() as stack:
        urls = [stack.enter_context(EmbeddedStore()).url for _ in range(options.nodes)]
        start, results = fork.Barrier(n + 1), fork.Queue()
        for rank in range(n):
            process = fork.Process(target=work, args=(options, rank, ",".join(urls), window_bytes, start, results), daemon=True)
            process.start()
            stack.callback(process.kill)
        while start.n_waiting < n and not start.broken:
            time.sleep(0.01)
        before = [used(url, "used_memory") for url in urls]
        for url in urls:
            with redis.Redis.from_url(url) as client:
                client.config_resetstat()
        try:
            for _ in range(options.calls + 1):
                start.wait(DEADLINE_S)
        except BaseException:  # a worker has failed: its error is told below
            start.abort()
        answers = [results.get(timeout=DEADLINE_S) for _ in range(n)]
        peaks = [used(url, "used_memory_peak") - least for url, least in zip(urls, before, strict=True)]
    if errors := [error for *_, error in answers if error]:
        raise RuntimeError("a worker failed:\n" + max(errors, key=len))
    if len({digest for _, _, digest, _, _ in answers}) != 1:
        raise RuntimeError("the workers' results differ")
    mean = np.mean(
        [np.random.default_rng(rank).standard_normal(options.floats, dtype=np.float32)[:1000] for rank in range(n)], 0
    )
    np.testing.assert_allclose(answers[0][3], mean, atol=5e-3)
    seconds = [max(row) for row in zip(*(answer[1] for answer in answers), strict=True)]
    return {"window_bytes": window_bytes, "peak_bytes": max(peaks), "median_s": statistics.median(seconds), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--floats", type=int, default=1 << 25)
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 256, 64, 16], metavar="MB")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    print(f"n = {options.workers}, {options.floats:,} floats as fp16, {options.nodes} store node(s)")
    rows = []
    for megabytes in options.windows:
        row = measure(options, megabytes * 1_000_000)
        rows.append(row)
        beside = f"{(row['peak_bytes'] - row['window_bytes']) / 1e6:+.2f} MB beside the window" if megabytes else ""
        peak = f"peak {row['peak_bytes'] / 1e6:8.2f} MB"
        print(f"  window {megabytes or 'none':>4} MB: {peak} {beside}, {row['median_s']:.3f} s a call")
        sys.stdout.flush()
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
