"""A real run with a deadline: worker processes on shaped links, whose number the run changes while it trains.

    python -m bench.deadline_run [--epochs 80] [--codec fp32] [--json FILE]

Two fixed runs come first, with one worker and with as many as there are cores: their times say what a deadline between them
is, and the first one's loss curve is what the third must give. The third begins with one worker and has the deadline. Linux,
root (see bench/links.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.links import Links, links_available, shaped_links
from smlt.client.executors.local import LocalExecutor, LocalWorker
from smlt.client.progress import PlainLines
from smlt.client.request import RunRequest
from smlt.client.runs import Run
from smlt.client.scheduler import TaskScheduler
from smlt.client.tuned_runs import steered
from smlt.store.embedded import EmbeddedStore
from smlt.worker.config import WorkerConfig

SCRIPT = Path(__file__).parent / "conv_digits.py"


class LinkedExecutor(LocalExecutor):
    """Workers as processes in network namespaces of their own."""

    def __init__(self, links: Links, store: EmbeddedStore, cores: int) -> None:
        super().__init__(threads_each=1)
        self.links, self.store, self.cores, self._next = links, store, cores, 0

    def start(self, config: WorkerConfig, log_path: Path) -> LocalWorker:
        place = self._next % self.links.n
        self._next += 1
        there = replace(config, store_url=self.store.tcp_url_at(self.links.store_host(place)))
        return self.start_in(there, log_path, ["ip", "netns", "exec", self.links.namespace(place)])


def fixed_run(folder: Path, request: RunRequest, store: EmbeddedStore, executor: LinkedExecutor, name: str) -> dict[str, Any]:
    run = Run.create(folder, SCRIPT, asdict(request), name)
    began = time.monotonic()
    TaskScheduler(run, request, PlainLines(sys.stderr), store_url=store.url, executor=executor).run()
    return {"seconds": time.monotonic() - began, "losses": losses(run)}


def run_with_deadline(folder: Path, request: RunRequest, store: EmbeddedStore, executor: LinkedExecutor) -> dict[str, Any]:
    progress = PlainLines(sys.stderr)
    began = time.monotonic()
    tuned = steered(request, workers=request.workers, learn_from=None, progress=progress)
    run = Run.create(folder, SCRIPT, asdict(tuned.request), "tuned")
    steering = tuned.begin(run)
    TaskScheduler(run, tuned.request, progress, store_url=store.url, executor=executor, steering=steering).run()
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": time.monotonic() - began,
        "losses": losses(run),
        "changes": [row["reasons"] for row in rows if row["kind"] == "membership"],
        "decisions": [json.loads(line) for line in (run.path / "decisions.jsonl").read_text().splitlines()],
    }


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics() if row["kind"] == "step"]


def difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference of a step's loss; infinite when the steps are not the same."""
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--global-batch-size", type=int, default=256)
    parser.add_argument("--codec", default="fp32")
    parser.add_argument("--rate-mbit", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if why := links_available():
        raise SystemExit(why)
    cores = len(os.sched_getaffinity(0))
    request = RunRequest(
        str(SCRIPT), workers=1, epochs=options.epochs, global_batch_size=options.global_batch_size, codec=options.codec, seed=1
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        shaped_links(cores + 1, options.rate_mbit) as links,
        EmbeddedStore(bind=links.store_hosts) as store,
    ):
        folder, executor = Path(scratch), LinkedExecutor(links, store, cores)
        slow = fixed_run(folder, request, store, executor, "one")
        fast = fixed_run(folder, replace(request, workers=cores), store, executor, "all")
        deadline_s = fast["seconds"] + 0.5 * (slow["seconds"] - fast["seconds"])
        asked = replace(request, tune=True, deadline_s=deadline_s, max_workers=cores, on_miss="best-effort")
        tuned = run_with_deadline(folder, asked, store, executor)
    result = {
        "cores": cores,
        "seconds_with_1": slow["seconds"],
        f"seconds_with_{cores}": fast["seconds"],
        "deadline_s": deadline_s,
        "seconds": tuned["seconds"],
        "met": tuned["seconds"] <= deadline_s,
        "changes": tuned["changes"],
        "largest_difference": difference(tuned["losses"], slow["losses"]),
        "difference_of_the_fixed_runs": difference(fast["losses"], slow["losses"]),
    }
    for name, value in result.items():
        print(f"{name.replace('_', ' '):32} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps({**result, "decisions": tuned["decisions"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
