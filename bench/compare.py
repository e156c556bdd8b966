"""All-reduce through a store by SMLT and by its peers, interleaved in one run.

    python -m bench.compare [--workers 2 4 8] [--floats 11000000] [--rounds 7] [--transport unix tcp | --links [MBIT]]
                            [--peers NAME ...] [--codecs NAME ...] [--json PATH]

n processes and one embedded store share this machine: over a unix socket, over loopback TCP, or with `--links` over
links of a known rate (bench/links.py; root). In each round every peer of bench/peers.py does one all-reduce after the
other, all workers released together; a peer's time is the slowest worker's. Every result is checked once against NumPy.

A line a peer: median, quartiles, and how many times longer it takes than smlt fp16 (median and quartiles of the rounds'
ratios). Below: bytes through the store in a second beside the raw limit (bench/limit.py), and on shaped links the time
beside the least that the links allow, max(sent, received) / rate. Below a million floats there are up to ten times as
many rounds, for they vary more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bench.limit import volumes
from bench.links import INTERFACE, RATE_MBIT, Links, links_available, shaped_links
from bench.peers import Floats, Peer, Place, all_peers
from smlt.collective.codecs import CODECS, wire_size
from smlt.store.embedded import EmbeddedStore

WARM_UP = 2
OURS = "smlt fp16"
MANY_FLOATS = 1_000_000  # fewer floats, more rounds: up to ten times as many
DEADLINE_S = 1800


@dataclass(frozen=True)
class Setting:
    """One block of the table. `transport` is "unix", "tcp" or "links"."""

    transport: str
    n: int
    floats: int
    rounds: int
    rate_mbit: float

    def __str__(self) -> str:
        over = {"unix": "unix socket", "tcp": "loopback TCP", "links": f"links of {self.rate_mbit:g} Mbit/s"}[self.transport]
        return f"{over}, n = {self.n}, {self.floats:,} floats, {self.rounds} rounds"


def worker(
    setting: Setting, place: Place, start: Any, links: Links | None, peers: dict[str, Peer], mean: Floats
) -> dict[str, Any]:
    """Seconds of this worker by peer, a number a round."""
    if links is not None:
        links.enter(place.rank)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    with ExitStack() as stack:
        allreduces = {name: stack.enter_context(peer.open(place)) for name, peer in peers.items()}
        names = list(peers)
        for step in range(setting.rounds + WARM_UP):
            for name in names[step % len(names) :] + names[: step % len(names)]:  # nobody always comes behind the same peer
                start.wait(DEADLINE_S)
                began = time.perf_counter()
                result = allreduces[name]()
                took = time.perf_counter() - began
                if step >= WARM_UP:
                    seconds[name].append(took)
                tolerance = peers[name].tolerance
                if step == 0 and result is not None and tolerance is not None:
                    np.testing.assert_allclose(result, mean, rtol=0, atol=tolerance, err_msg=name)
                del result
        start.wait(DEADLINE_S)
    return seconds


def run_worker(results: Any, start: Any, setting: Setting, place: Place, *arguments: Any) -> None:
    """`worker` in a process; its answer or its error goes to `results`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        results.put((worker(setting, place, start, *arguments), ""))
    except threading.BrokenBarrierError:
        results.put(({}, "broken"))  # another worker says why
    except BaseException:
        results.put(({}, traceback.format_exc()))
        start.abort()


def measure(setting: Setting, peers: dict[str, Peer]) -> dict[str, list[float]]:
    """Seconds of the slowest worker by peer and round."""
    fork = mp.get_context("fork")
    n = setting.n
    gradients = [np.random.default_rng(rank).standard_normal(setting.floats, dtype=np.float32) for rank in range(n)]
    mean = np.add.reduce(gradients) / np.float32(n)
    start, results = fork.Barrier(n), fork.Queue()
    with ExitStack() as stack:
        links = stack.enter_context(shaped_links(n, setting.rate_mbit)) if setting.transport == "links" else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(EmbeddedStore(bind=links.store_hosts if links is not None else ()))
        processes = []
        for rank in range(n):
            if links is not None:
                url, interface = store.tcp_url_at(links.store_host(rank)), INTERFACE
            else:
                url = store.url if setting.transport == "unix" else store.tcp_url
                interface = "lo" if sys.platform == "linux" else "lo0"
            place = Place(rank, n, gradients[rank], url, folder, interface)
            arguments = (results, start, setting, place, links, peers, mean)
            processes.append(fork.Process(target=run_worker, args=arguments, daemon=True))
        for process in processes:
            process.start()
            stack.callback(process.kill)  # when this is interrupted; they have ended otherwise
        answers = [results.get(timeout=DEADLINE_S) for _ in range(n)]
        for process in processes:
            process.join()
    errors = [error for _, error in answers if error]
    if errors:
        raise RuntimeError("a worker failed:\n" + max(errors, key=len))
    return {name: [max(row) for row in zip(*(seconds[name] for seconds, _ in answers), strict=True)] for name in peers}


def summary(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def rows_of(setting: Setting, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """What goes to the JSON file: a row a peer."""
    rows = []
    ours, limit = times.get(OURS), times.get("raw limit")
    for name, seconds in times.items():
        low, middle, high = summary(seconds)
        row: dict[str, Any] = {
            "transport": setting.transport,
            "rate_mbit": setting.rate_mbit if setting.transport == "links" else None,
            "workers": setting.n,
            "floats": setting.floats,
            "peer": name,
            "median_ms": middle * 1e3,
            "quartiles_ms": [low * 1e3, high * 1e3],
            "rounds_ms": [value * 1e3 for value in seconds],
        }
        if ours is not None:
            row["times_ours"] = summary([other / own for other, own in zip(seconds, ours, strict=True)])
        codec = name.removeprefix("smlt ") if name.startswith("smlt ") else "fp16"
        if name.startswith("smlt ") or name == "raw limit":
            encoded = wire_size("float32", codec, setting.floats)
            sent, received = volumes(setting.n, encoded)
            row["store_bytes_per_s"] = setting.n * (sent + received) / middle
            if limit is not None:
                _, of_limit, _ = summary(limit)
                factor = encoded / wire_size("float32", "fp16", setting.floats)
                row["of_raw_limit"] = of_limit * factor / middle
            if setting.transport == "links":
                row["bound_ms"] = max(sent, received) * 8 / setting.rate_mbit / 1e3
                row["over_bound"] = middle * 1e3 / row["bound_ms"]
        rows.append(row)
    return rows


def show(setting: Setting, rows: list[dict[str, Any]], to: TextIO) -> None:
    """The table of one setting."""
    print(f"\n{setting}", file=to)
    compared = f"takes, times {OURS}" if any("times_ours" in row for row in rows) else ""
    print(f"  {'':17} {'median':>10}  {'quartiles':>19}  {compared:>24}", file=to)
    for row in rows:
        low, high = row["quartiles_ms"]
        line = f"  {row['peer']:17} {row['median_ms']:7.1f} ms  {f'{low:.1f} to {high:.1f} ms':>19}"
        if "times_ours" in row:
            least, middle, most = row["times_ours"]
            line += f"  {f'{middle:.2f} ({least:.2f} to {most:.2f})':>24}"
        print(line, file=to)
    for row in rows:
        if "store_bytes_per_s" in row:
            line = f"  {row['peer']:17} {row['store_bytes_per_s'] / 1e6:7.0f} MB/s through the store"
            if "of_raw_limit" in row:
                line += f", {row['of_raw_limit'] * 100:.0f} % of the raw limit"
            if "bound_ms" in row:
                line += f"; {row['over_bound']:.3f} times the links' bound of {row['bound_ms']:.1f} ms"
            print(line, file=to)
    to.flush()


def chosen_peers(names: list[str] | None, codecs: list[str], to: TextIO) -> dict[str, Peer]:
    """The peers whose name holds one of `names` and that can run here."""
    peers = all_peers(codecs)
    if unknown := [part for part in names or [] if not any(part in name for name in peers)]:
        raise SystemExit(f"no peer is called {', '.join(unknown)}; there are {', '.join(peers)}")
    if names:
        peers = {name: peer for name, peer in peers.items() if any(part in name for part in names)}
    reasons = {name: peer.missing() for name, peer in peers.items()}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} is left out: {reason}", file=to)
    return {name: peer for name, peer in peers.items() if not reasons[name]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[4])
    parser.add_argument("--floats", type=int, nargs="+", default=[11_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--transport", choices=["unix", "tcp"], nargs="+", default=["unix", "tcp"], help="of local workers")
    parser.add_argument("--links", type=float, nargs="?", const=RATE_MBIT, metavar="MBIT", help="shaped links instead")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="peers whose name holds one of these; all by default")
    parser.add_argument("--codecs", nargs="+", choices=list(CODECS), default=list(CODECS), help="of SMLT")
    parser.add_argument("--json", metavar="PATH", help="write the rows there; - for stdout, the table then goes to stderr")
    options = parser.parse_args()
    to = sys.stderr if options.json == "-" else sys.stdout
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that links, store and workers are cleaned up
    if options.links is not None and (reason := links_available()):
        sys.exit(f"nothing was measured: {reason}")
    peers = chosen_peers(options.peers, options.codecs, to)
    rows = []
    for transport in ["links"] if options.links is not None else options.transport:
        for n in options.workers:
            for floats in options.floats:
                rounds = options.rounds * max(1, min(10, MANY_FLOATS // floats))
                setting = Setting(transport, n, floats, rounds, options.links or 0.0)
                rows += rows_of(setting, measure(setting, peers))
                show(setting, rows[-len(peers) :], to)
    if options.json:
        text = json.dumps({"cores": os.cpu_count(), "machine": platform.machine(), "rows": rows}, indent=1) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)


if __name__ == "__main__":
    main()
