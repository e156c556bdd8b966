"""The embedded store's settings, by what an all-reduce takes: why `smlt.store.embedded` sets what it sets.

    python -m bench.store_settings [--workers 4 8] [--floats 11000000] [--codec fp16] [--rounds 15] [--json]

A store for each variant, over its unix socket, all in one run: in each round every variant does one all-reduce after the
other. The slowest worker counts; the table gives medians, and the ratio to the store as it is (median and quartiles of
the rounds' ratios).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from smlt import Communicator
from smlt.collective.codecs import CODECS
from smlt.store.embedded import EmbeddedStore

AS_IT_IS = "as it is"
#: Name: settings, and the allocator's tunables where they differ.
VARIANTS: dict[str, tuple[dict[str, str], str | None]] = {
    AS_IT_IS: ({}, None),
    "glibc's own malloc settings": ({}, "glibc.malloc.check=0"),
    "malloc with huge pages": ({"disable-thp": "no"}, "glibc.malloc.hugetlb=1"),
    "2 I/O threads": ({"io-threads": "2"}, None),
    "replies copied": ({"min-string-size-avoid-copy-reply": "0"}, None),
}
WARM_UP = 2


def open_store(settings: dict[str, str], tunables: str | None) -> EmbeddedStore:
    if tunables is not None:
        os.environ["GLIBC_TUNABLES"] = tunables
    try:
        return EmbeddedStore(settings=settings)
    finally:
        os.environ.pop("GLIBC_TUNABLES", None)


def worker(rank: int, n: int, floats: int, codec: str, rounds: int, urls: list[str], start: Any, times: Any) -> None:
    gradient = np.random.default_rng(rank).standard_normal(floats, dtype=np.float32)
    out = np.empty_like(gradient)
    taken: list[list[float]] = [[] for _ in urls]
    with ExitStack() as stack:
        comms = [stack.enter_context(Communicator(url, job="settings", rank=rank, world_size=n, codec=codec)) for url in urls]
        for number in range(rounds + WARM_UP):
            for variant, comm in enumerate(comms):
                start.wait()
                began = time.perf_counter()
                comm.allreduce(gradient, out=out)
                if number >= WARM_UP:
                    taken[variant].append(time.perf_counter() - began)
        start.wait()
    times.put(taken)


def measure(n: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the slowest worker by variant and round."""
    fork = mp.get_context("fork")
    start, times = fork.Barrier(n), fork.Queue()
    with ExitStack() as stack:
        urls = [stack.enter_context(open_store(*variant)).url for variant in VARIANTS.values()]
        arguments = (n, options.floats, options.codec, options.rounds, urls, start, times)
        processes = [fork.Process(target=worker, args=(rank, *arguments), daemon=True) for rank in range(n)]
        for process in processes:
            process.start()
            stack.callback(process.kill)
        answers = [times.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    slowest = [[max(each) for each in zip(*rows, strict=True)] for rows in zip(*answers, strict=True)]
    return dict(zip(VARIANTS, slowest, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--floats", type=int, default=11_000_000)
    parser.add_argument("--codec", choices=list(CODECS), default="fp16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for n in options.workers:
        found = measure(n, options)
        for name, seconds in found.items():
            ratios = [mine / base for mine, base in zip(seconds, found[AS_IT_IS], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rows.append({"workers": n, "store": name, "median_s": statistics.median(seconds), "ratio": [low, middle, high]})
            if not options.json:
                print(f"n={n} {name:28} {rows[-1]['median_s'] * 1e3:7.1f} ms   {middle:5.2f} ({low:.2f} to {high:.2f})")
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
