"""All-reduce through 1, 2, 4 store nodes, every worker and every node on a link of its own, interleaved in one run.

    python -m bench.store_nodes [--workers 4] [--floats 11000000] [--nodes 1 2 4] [--rounds 7] [--links MBIT]
                                [--codec fp16] [--json PATH]

Linux, root (bench/links.py). As many store nodes as the largest number wants run in network namespaces of their own; with
fewer nodes the first ones serve. In each round every number of nodes has its turn, all workers released together; a time
is the slowest worker's. Every number's first result is checked against NumPy, and all must have the same bits.

A line a number of nodes: median, quartiles, speed-up over the first number (median and quartiles of the rounds' ratios), and
the time beside two bounds: what the workers' links allow, max(sent, received) / rate, and what the nodes' links allow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import summary
from bench.limit import volumes
from bench.links import RATE_MBIT, Links, links_available, shaped_links
from smlt import Communicator
from smlt.collective.codecs import wire_size
from smlt.store.embedded import EmbeddedStore

WARM_UP = 2
DEADLINE_S = 600


def serve(links: Links, place: int, told: Any) -> None:
    """A store node in the namespace of `place`, until this process is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    links.enter(place)
    host = links.worker_host(place)
    with EmbeddedStore(bind=[host]) as store:
        told.send(store.tcp_url_at(host))
        signal.pause()


def work(options: argparse.Namespace, links: Links, rank: int, urls: list[str], start: Any, results: Any) -> None:
    """One worker; its seconds by number of nodes go to `results`, or its error."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        results.put((measure(options, links, rank, urls, start), ""))
    except BaseException:
        results.put(({}, traceback.format_exc()))
        start.abort()


def measure(options: argparse.Namespace, links: Links, rank: int, urls: list[str], start: Any) -> dict[str, Any]:
    links.enter(rank)
    n, seconds, digests = options.workers, {k: [] for k in options.nodes}, set()
    gradients = [np.random.default_rng(r).standard_normal(options.floats, dtype=np.float32) for r in range(n)]
    mean = np.add.reduce(gradients) / np.float32(n)
    gradient = gradients[rank]
    del gradients
    out = np.empty_like(gradient)
    with ExitStack() as stack:
        communicators = {
            k: stack.enter_context(Communicator(",".join(urls[:k]), job=f"nodes{k}", rank=rank, world_size=n))
            for k in options.nodes
        }
        for step in range(options.rounds + WARM_UP):
            for k, communicator in communicators.items():
                start.wait(DEADLINE_S)
                began = time.perf_counter()
                communicator.allreduce(gradient, codec=options.codec, out=out)
                took = time.perf_counter() - began
                if step >= WARM_UP:
                    seconds[k].append(took)
                elif step == 0:
                    np.testing.assert_allclose(out, mean, rtol=0, atol=0.1 if options.codec == "int8" else 5e-3)
                    digests.add(hashlib.sha256(out).hexdigest())
        start.wait(DEADLINE_S)
    return {"seconds": seconds, "digests": digests}


def run(options: argparse.Namespace) -> dict[int, list[float]]:
    """Seconds of the slowest worker by number of nodes and round."""
    fork, n, most = mp.get_context("fork"), options.workers, max(options.nodes)
    with ExitStack() as stack:
        links = stack.enter_context(shaped_links(n + most, options.links))
        urls = []
        for node in range(most):
            told, tell = fork.Pipe(duplex=False)
            process = fork.Process(target=serve, args=(links, n + node, tell))
            process.start()
            stack.callback(process.join, 10)
            stack.callback(process.terminate)
            if not told.poll(30):
                raise RuntimeError(f"store node {node} did not start")
            urls.append(told.recv())
        start, results = fork.Barrier(n), fork.Queue()
        for rank in range(n):
            worker = fork.Process(target=work, args=(options, links, rank, urls, start, results), daemon=True)
            worker.start()
            stack.callback(worker.kill)
        answers = [results.get(timeout=DEADLINE_S) for _ in range(n)]
        time.sleep(0.5)  # they leave the store
    if errors := [error for _, error in answers if error]:
        raise RuntimeError("a worker failed:\n" + max(errors, key=len))
    if len(set.union(*(answer["digests"] for answer, _ in answers))) != 1:
        raise RuntimeError("results differ in their bits between workers or numbers of nodes")
    return {k: [max(row) for row in zip(*(answer["seconds"][k] for answer, _ in answers), strict=True)] for k in options.nodes}


def rows_of(options: argparse.Namespace, times: dict[int, list[float]]) -> list[dict[str, Any]]:
    """What goes to the JSON file: a row a number of nodes."""
    n, rate = options.workers, options.links * 1e6 / 8
    sent, received = volumes(n, wire_size("float32", options.codec, options.floats))
    rows, first = [], times[options.nodes[0]]
    for k, seconds in times.items():
        low, middle, high = summary(seconds)
        rows.append(
            {
                "nodes": k,
                "median_ms": middle * 1e3,
                "quartiles_ms": [low * 1e3, high * 1e3],
                "rounds_ms": [value * 1e3 for value in seconds],
                "speed_up": summary([a / b for a, b in zip(first, seconds, strict=True)]),
                "workers_bound_ms": max(sent, received) / rate * 1e3,
                "nodes_bound_ms": max(sent, received) * n / k / rate * 1e3,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--floats", type=int, default=11_000_000)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--links", type=float, default=RATE_MBIT, metavar="MBIT")
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--json", metavar="PATH")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that links, stores and workers are cleaned up
    if reason := links_available():
        sys.exit(f"nothing was measured: {reason}")
    rows = rows_of(options, run(options))
    print(f"n = {options.workers}, {options.floats:,} floats as {options.codec}, links of {options.links:g} Mbit/s")
    for row in rows:
        low, middle, high = row["speed_up"]
        quartiles = f"{row['quartiles_ms'][0]:.0f} to {row['quartiles_ms'][1]:.0f}"
        print(
            f"  {row['nodes']} nodes: {row['median_ms']:6.0f} ms ({quartiles}), "
            f"speed-up {middle:.2f} ({low:.2f} to {high:.2f}); "
            f"{row['median_ms'] / row['workers_bound_ms']:.3f} times the workers' bound of {row['workers_bound_ms']:.0f} ms, "
            f"{row['median_ms'] / row['nodes_bound_ms']:.3f} times the nodes' bound of {row['nodes_bound_ms']:.0f} ms"
        )
    if options.json:
        Path(options.json).write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
