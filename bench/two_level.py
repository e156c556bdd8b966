"""Two-level aggregation: what it spares workers that share machines, and what a machine alone takes.

    python -m bench.two_level [--machines 2] [--per-machine 2] [--rate 600] [--floats 11000000] [--codec fp16] [--rounds 9]
    python -m bench.two_level --alone [--per-machine 4] ...                                   [--json PATH]

Every machine is a network namespace whose link to the store, on this machine, is shaped (bench/links.py; root): its
workers share that link. In each round all workers reduce the same gradients (float32, in place), first every worker through
the store for itself ("flat"), then two-level, all released together; a round lasts as long as the slowest worker. The bytes
are those of one machine's link, sent and received, as its interface counts them.

With --alone there is one machine and no link: two-level (which needs no store), against a store on this machine over its
unix socket, and against gloo, float32, over loopback. Ratios are of one round, the table gives their median and quartiles.
Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import summary
from bench.links import INTERFACE, RATE_MBIT, Links, links_available, shaped_links
from bench.peers import Floats, Place, gloo, gloo_missing, smlt_peer
from smlt.collective.codecs import CODECS
from smlt.collective.two_level import TwoLevelCommunicator
from smlt.store.embedded import EmbeddedStore

WARM_UP, DEADLINE_S = 2, 300.0
Open = Callable[[Place], AbstractContextManager[Callable[[], Floats]]]


@dataclass(frozen=True)
class Setting:
    """How many machines with how many workers each."""

    machines: int
    per_machine: int
    floats: int
    codec: str
    rounds: int
    rate_mbit: float | None  # None: one machine, no link

    @property
    def n(self) -> int:
        return self.machines * self.per_machine


@contextmanager
def two_level(place: Place, setting: Setting) -> Iterator[Callable[[], Floats]]:
    local_rank, each = place.rank % setting.per_machine, setting.per_machine
    out = np.empty_like(place.gradient)
    url = place.url if setting.machines > 1 else None
    with TwoLevelCommunicator(
        url, job="bench-two", rank=place.rank, world_size=place.n, local_rank=local_rank, local_size=each
    ) as comm:
        yield lambda: comm.allreduce(place.gradient, codec=setting.codec, out=out)


def peers_of(setting: Setting) -> dict[str, Open]:
    """What is compared, by name; all others are set against "two-level"."""
    found: dict[str, Open] = {"two-level": partial(two_level, setting=setting)}
    if setting.rate_mbit is not None:
        found["flat"] = partial(smlt_peer, codec=setting.codec)
        return found
    found["store"] = partial(smlt_peer, codec=setting.codec)
    if reason := gloo_missing():
        print(f"gloo is left out: {reason}", file=sys.stderr)
    else:
        found["gloo float32"] = gloo
    return found


def link_bytes() -> tuple[int, int]:
    """What this network namespace's interface has received and sent."""
    line = re.search(rf"^\s*{INTERFACE}:(.*)$", Path("/proc/net/dev").read_text(), re.MULTILINE)
    if line is None:
        return 0, 0
    numbers = line[1].split()
    return int(numbers[0]), int(numbers[8])


def work(setting: Setting, place: Place, start: Any, links: Links | None, mean: Floats) -> dict[str, Any]:
    """Seconds and bytes (received, sent) of this worker's machine by peer, one of each a round."""
    if links is not None:
        links.enter(place.rank // setting.per_machine)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        peers = peers_of(setting)
        calls = {name: stack.enter_context(peer(place)) for name, peer in peers.items()}
        for number in range(WARM_UP + setting.rounds):
            for name, call in calls.items():
                start.wait(DEADLINE_S)
                before = link_bytes()
                start.wait(DEADLINE_S)
                began = time.perf_counter()
                result = call()
                took = time.perf_counter() - began
                start.wait(DEADLINE_S)
                after = link_bytes()
                if number >= WARM_UP:
                    row = found.setdefault(name, {"seconds": [], "received": [], "sent": []})
                    row["seconds"].append(took)
                    row["received"].append(after[0] - before[0])
                    row["sent"].append(after[1] - before[1])
                elif number == 0:
                    np.testing.assert_allclose(
                        result, mean, rtol=0, atol=0.1 if setting.codec == "int8" else 5e-3, err_msg=name
                    )
        start.wait(DEADLINE_S)
    return found


def run_worker(results: Any, start: Any, *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    setting, place, links, mean = arguments
    try:
        results.put((place.rank, work(setting, place, start, links, mean), ""))
    except threading.BrokenBarrierError:
        results.put((place.rank, {}, "broken"))  # another worker says why
    except BaseException:
        results.put((place.rank, {}, traceback.format_exc()))
        start.abort()


def measure(setting: Setting) -> dict[str, dict[str, list[float]]]:
    """By peer and round: the slowest worker's seconds, the bytes that the first machine received and sent."""
    fork = mp.get_context("fork")
    n = setting.n
    gradients = [np.random.default_rng(rank).standard_normal(setting.floats, dtype=np.float32) for rank in range(n)]
    mean = np.add.reduce(gradients) / np.float32(n)
    start, results = fork.Barrier(n), fork.Queue()
    with ExitStack() as stack:
        links = stack.enter_context(shaped_links(setting.machines, setting.rate_mbit)) if setting.rate_mbit else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(EmbeddedStore(bind=links.store_hosts if links is not None else ()))
        processes = []
        for rank in range(n):
            host = links.store_host(rank // setting.per_machine) if links is not None else ""
            url = store.tcp_url_at(host) if links is not None else store.url
            place = Place(rank, n, gradients[rank], url, folder, "lo")
            processes.append(fork.Process(target=run_worker, args=(results, start, setting, place, links, mean), daemon=True))
        for process in processes:
            process.start()
            stack.callback(process.kill)
        answers = sorted((results.get(timeout=DEADLINE_S) for _ in range(n)), key=lambda answer: answer[0])
        for process in processes:
            process.join()
    errors = [error for _, _, error in answers if error]
    if errors:
        raise RuntimeError("a worker failed:\n" + max(errors, key=len))
    rows = [row for _, row, _ in answers]
    return {
        name: {
            "seconds": [max(all_of) for all_of in zip(*(row[name]["seconds"] for row in rows), strict=True)],
            "received": rows[0][name]["received"],
            "sent": rows[0][name]["sent"],
        }
        for name in rows[0]
    }


def show(setting: Setting, found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Print the table; returns its rows for JSON."""
    over = "one machine alone" if setting.rate_mbit is None else f"links of {setting.rate_mbit:g} Mbit/s"
    print(
        f"{setting.machines} x {setting.per_machine} workers, {over}, {setting.floats:,} floats, {setting.codec}, "
        f"{setting.rounds} rounds"
    )
    rows = []
    for name, values in found.items():
        _, middle, _ = summary(values["seconds"])
        ratios = [other / ours for other, ours in zip(values["seconds"], found["two-level"]["seconds"], strict=True)]
        ratio = summary(ratios)
        received, sent = summary(values["received"])[1], summary(values["sent"])[1]
        line = f"  {name:13} {middle * 1e3:8.1f} ms  times two-level {ratio[1]:5.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"
        row: dict[str, Any] = {"peer": name, "median_ms": middle * 1e3, "times_two_level": ratio}
        if setting.rate_mbit is not None:
            ours = found["two-level"]
            of = (received + sent) / (summary(ours["received"])[1] + summary(ours["sent"])[1])
            line += f"  a link carries {received / 1e6:6.1f} MB down, {sent / 1e6:6.1f} MB up, times two-level {of:.2f}"
            row |= {"received_bytes": received, "sent_bytes": sent, "bytes_times_two_level": of}
        print(line)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", action="store_true", help="one machine, no link")
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument("--per-machine", type=int, help="workers of a machine; default 2, with --alone 4")
    parser.add_argument("--rate", type=float, default=RATE_MBIT, metavar="MBIT")
    parser.add_argument("--floats", type=int, default=11_000_000)
    parser.add_argument("--codec", choices=CODECS, default="fp16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.alone and (reason := links_available()):
        parser.error(reason)
    machines, rate = (1, None) if options.alone else (options.machines, options.rate)
    each = options.per_machine or (4 if options.alone else 2)
    setting = Setting(machines, each, options.floats, options.codec, options.rounds, rate)
    rows = show(setting, measure(setting))
    if options.json is not None:
        options.json.write_text(json.dumps({"setting": vars(setting), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
