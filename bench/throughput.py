"""Training the models of examples/ on n workers, through the store and by gloo's DDP: samples/s, and what a step is made of.

    python -m bench.throughput [--models resnet18 resnet50 bert-small bert-medium] [--workers 1 2 4] [--codecs fp16]
                               [--links [MBIT]] [--rounds 3] [--steps 2] [--json PATH]
    python -m bench.throughput --markdown PATH

n processes with one torch thread each share this machine with one embedded store, over its unix socket; with --links each
worker's link is shaped (bench/links.py; root), for the store and for gloo. In each round the peers train one after the
other, all with the same model, batch and optimizer (bench/workloads.py): `steps` with communication and as many without,
alternately, all workers released together. A step lasts as long as the slowest worker's; the table gives medians.

    compute        a step without communication, in which all workers compute at once
    communication  what a step takes longer with it: what does not hide behind backward
    worker         the peak of a worker's resident memory (VmHWM), with PyTorch itself; the largest of all workers, the least
                   of all rounds, for who was measured before may have left something
    store          the peak of the store's memory above what it has when it is empty
    of gloo        the step's time over gloo's in the same round, the median of the rounds

A model that there is no memory for is left out, and that is said. With --markdown nothing is measured: the file that --json has
written is shown as a table. Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing as mp
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import redis

from bench.links import INTERFACE, RATE_MBIT, links_available, shaped_links
from bench.memory import resident_bytes
from bench.workloads import WORKLOADS, Replica, Workload
from smlt import Communicator
from smlt.collective.codecs import CODECS
from smlt.store.embedded import EmbeddedStore

WARM_UP = 1
DEADLINE_S = 900.0
#: PyTorch with transformers, and activations of small batches; left free for others.
WORKER_BYTES, RESERVE_BYTES = 700 << 20, 1 << 30


class Worker:
    """In a process of its own: trains as it is told by `commands` (a pipe), until that says None."""

    def __init__(self, rank: int, n: int, links: Any, folder: str, start: Any, commands: Any) -> None:
        self.rank, self.n, self.folder, self.start, self.commands = rank, n, folder, start, commands
        self.interface = INTERFACE if links is not None else "lo"
        if links is not None:
            links.enter(rank)
        import torch

        torch.set_num_threads(1)

    def serve(self) -> None:
        while (command := self.commands.recv()) is not None:
            try:
                self.commands.send((self.train(*command), ""))
            except BaseException:
                self.start.abort()
                self.commands.send(({}, traceback.format_exc()))
                return

    def train(self, workload: Workload, batch: int, peer: str, url: str, steps: int) -> dict[str, Any]:
        """Seconds of the steps with and without communication, and memory in bytes."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident_bytes("VmRSS")
        seconds: dict[bool, list[float]] = {True: [], False: []}
        with ExitStack() as stack:
            replica = Replica(workload, self.rank, batch)
            if peer == "gloo":
                step = self._gloo(replica)
            else:
                codec = peer.removeprefix("smlt ")
                comm = Communicator(url, job="throughput", rank=self.rank, world_size=self.n, codec=codec)
                step = replica.step_of_smlt(stack.enter_context(comm))
            for number in range(WARM_UP + steps):
                for communicate in (True, False):
                    self.start.wait(DEADLINE_S)
                    began = time.perf_counter()
                    step(communicate)
                    if number >= WARM_UP:
                        seconds[communicate].append(time.perf_counter() - began)
            self.start.wait(DEADLINE_S)
        return {
            "with": seconds[True],
            "without": seconds[False],
            "before_bytes": before,
            "peak_bytes": resident_bytes("VmHWM"),
        }

    def _gloo(self, replica: Replica) -> Any:
        import torch.distributed as dist

        if not dist.is_initialized():
            os.environ["GLOO_SOCKET_IFNAME"] = self.interface
            dist.init_process_group("gloo", init_method=f"file://{self.folder}/gloo", rank=self.rank, world_size=self.n)
        return replica.step_of_gloo()


def run_worker(*arguments: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Worker(*arguments).serve()


class Group:
    """n workers, for as long as the stack lives."""

    def __init__(self, n: int, links_mbit: float | None, stack: ExitStack) -> None:
        spawn = mp.get_context("spawn")
        self.n = n
        self.links = stack.enter_context(shaped_links(n, links_mbit)) if links_mbit is not None else None
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self.start = start = spawn.Barrier(n)
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(n):
            here, there = spawn.Pipe()
            process = spawn.Process(target=run_worker, args=(rank, n, self.links, folder, start, there), daemon=True)
            process.start()
            stack.callback(process.kill)
            self.pipes.append(here)
            self.processes.append(process)

    def train(self, workload: Workload, batch: int, peer: str, steps: int) -> dict[str, Any]:
        """What `Worker.train` gives: of each step the slowest worker's seconds, of memory the largest; and the store's peak."""
        links = self.links
        with (
            EmbeddedStore(bind=links.store_hosts if links is not None else ()) as store,
            redis.Redis.from_url(store.url) as client,
        ):
            client.config_set("hz", "500")  # it looks for its peak so often
            empty: Any = client.info("memory")
            for rank, pipe in enumerate(self.pipes):
                url = store.url if links is None else store.tcp_url_at(links.store_host(rank))
                pipe.send((workload, batch, peer, url, steps))
            answers = [self._answer(pipe) for pipe in self.pipes]
            peak: Any = client.info("memory")
        if errors := [error for _, error in answers if error]:
            raise RuntimeError("a worker failed:\n" + max(errors, key=len))
        found = [answer for answer, _ in answers]
        return {
            "with": [max(row) for row in zip(*(one["with"] for one in found), strict=True)],
            "without": [max(row) for row in zip(*(one["without"] for one in found), strict=True)],
            "worker_bytes": max(one["peak_bytes"] for one in found),
            "worker_before_bytes": max(one["before_bytes"] for one in found),
            "store_bytes": peak["used_memory_peak"] - empty["used_memory"],
        }

    def _answer(self, pipe: Any) -> tuple[dict[str, Any], str]:
        if not pipe.poll(DEADLINE_S):
            raise RuntimeError(f"a worker has not answered for {DEADLINE_S:.0f} s")
        try:
            answer: tuple[dict[str, Any], str] = pipe.recv()
        except (EOFError, ConnectionResetError):
            return {}, "a worker has ended: was there memory for it?"
        return answer

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def needed_bytes(workload: Workload, n: int) -> int:
    """Model, gradients, and DDP's buckets or the store's copies; and RESERVE_BYTES."""
    return n * (3 * workload.model_bytes + WORKER_BYTES) + RESERVE_BYTES


def measure(group: Group, name: str, peers: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each peer."""
    workload, n = WORKLOADS[name], group.n
    batch = options.batch or workload.batch
    found: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    for number in range(options.rounds):
        for peer in peers if number % 2 == 0 else peers[::-1]:
            found[peer].append(group.train(workload, batch, peer, options.steps))
    rows = []
    for peer, rounds in found.items():
        step_s = statistics.median(second for one in rounds for second in one["with"])
        compute_s = statistics.median(second for one in rounds for second in one["without"])
        rows.append(
            {
                "model": name,
                "million_parameters": workload.million_parameters,
                "workers": n,
                "batch_a_worker": batch,
                "peer": peer,
                "links_mbit": options.links,
                "samples_per_s": n * batch / step_s,
                "step_s": step_s,
                "compute_s": compute_s,
                "communication_s": step_s - compute_s,
                "worker_peak_bytes": min(one["worker_bytes"] for one in rounds),
                "store_peak_bytes": max(one["store_bytes"] for one in rounds) if peer != "gloo" and n > 1 else 0,
                "rounds": rounds,
            }
        )
    for row in rows:  # round by round: what else the machine does varies less within one
        ratios = [
            statistics.median(own["with"]) / statistics.median(other["with"])
            for own, other in zip(found[row["peer"]], found["gloo"], strict=True)
        ]
        row["of_gloo"] = statistics.median(ratios)
    return rows


HEADER = "model         n  batch  peer        samples/s  step ms  compute ms  communication ms  worker MB  store MB  of gloo"


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:12} {row['workers']:2} {row['batch_a_worker']:6}  {row['peer']:10} {row['samples_per_s']:10.2f}"
        f" {row['step_s'] * 1e3:8.0f} {row['compute_s'] * 1e3:11.0f} {row['communication_s'] * 1e3:17.0f}"
        f" {row['worker_peak_bytes'] / 1e6:10.0f} {row['store_peak_bytes'] / 1e6:9.0f} {row['of_gloo']:8.2f}"
    )


COLUMNS = ("model", "n", "peer", "samples/s", "step, ms", "compute + communication, ms", "worker, MB", "store, MB", "of gloo")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a document."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        compute, communication = row["compute_s"] * 1e3, max(0.0, row["communication_s"] * 1e3)
        cells = (
            *(row["model"], row["workers"], f"{row['peer']}", f"{row['samples_per_s']:.1f}", f"{row['step_s'] * 1e3:.0f}"),
            *(f"{compute:.0f} + {communication:.0f}", f"{row['worker_peak_bytes'] / 1e6:.0f}"),
            *(f"{row['store_peak_bytes'] / 1e6:.0f}" if row["store_peak_bytes"] else "", f"{row['of_gloo']:.2f}"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def measure_models(n: int, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """All models with n workers: to `rows`, and printed."""
    peers = [*(f"smlt {codec}" for codec in options.codecs), "gloo"]
    for name in options.models:
        needed, there = needed_bytes(WORKLOADS[name], n), available_bytes()
        if needed > there:
            missing = f"it may take {needed / 1e9:.1f} GB, {there / 1e9:.1f} GB are there"
            print(f"{name:12} {n:2}  left out: {missing}", flush=True)
            continue
        with ExitStack() as stack:
            group = Group(n, options.links, stack)  # anew: what PyTorch keeps of one model is not the next one's memory
            found = measure(group, name, peers, options)
            group.end()
        print(*map(line, found), sep="\n", flush=True)
        rows += found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=list(WORKLOADS), default=[name for name in WORKLOADS if name != "bert-large"]
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--codecs", nargs="+", choices=list(CODECS), default=["fp16"])
    parser.add_argument("--batch", type=int, help="samples a worker and step, instead of each model's own")
    parser.add_argument("--links", type=float, nargs="?", const=RATE_MBIT, metavar="MBIT", help="shaped links, 600 by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of each kind, round and peer, behind one that warms up")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="show what --json has written")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())["rows"]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that links, stores and workers are cleaned up
    if options.links is not None and (reason := links_available()):
        sys.exit(f"nothing was measured: {reason}")
    rows: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    try:
        for n in options.workers:
            measure_models(n, options, rows)
    finally:
        if options.json:
            machine = {"cores": os.cpu_count(), "machine": platform.machine()}
            options.json.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
