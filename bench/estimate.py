"""Estimates against actual runs: the time of local training jobs, and the money of one on `smlt lambda-local`.

    python -m bench.estimate [--tasks digits digits_numpy resnet ...] [--workers 1 2 4] [--rounds 3] [--quiet 0.05]
                             [--no-lambda] [--json FILE]

Each task is profiled in each round, then trained for real with `smlt train` by 1, 2 and 4 workers; the table has the wall time
from the run's start to its end as predicted and as it was, their ratio, and the same for the mean step. A run during which
other processes took more than --quiet of the machine's cores is repeated, up to --rounds times more; the last column
says how much they took. The bar: every median ratio within 15 %.

On lambda-local one job is trained by functions, and its billed durations are put into the estimate's arithmetic: the sum must
equal the bill's to the cent (it does to the last fraction). Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from smlt.client.cost import Choice, CostModel, Platform
from smlt.client.platforms import LOCAL_MEMORY_MB
from smlt.client.profiling import profile
from smlt.client.workload import Workload

ROOT = Path(__file__).parents[1]
#: Script, global batch size, epochs.
TASKS = {
    "digits": (ROOT / "examples" / "digits.py", 64, 60),
    "digits_numpy": (ROOT / "examples" / "digits_numpy.py", 64, 60),
    "text": (ROOT / "examples" / "text.py", 256, 1),
    "convolutions": (ROOT / "bench" / "convolutions_task.py", 128, 3),
    "resnet": (ROOT / "bench" / "resnet_task.py", 32, 1),
}
BAR = 0.15


@dataclass
class Quiet:
    """Between `begin` and `share`: what processes that are not ours took of the machine's cores."""

    busy: float = 0.0
    own: float = 0.0
    began: float = 0.0

    @staticmethod
    def _now() -> tuple[float, float]:
        ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]  # without idle and waiting for disks
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return busy / os.sysconf("SC_CLK_TCK"), sum(use.ru_utime + use.ru_stime for use in own)

    def begin(self) -> None:
        self.busy, self.own = self._now()
        self.began = time.monotonic()

    def share(self) -> float:
        busy, own = self._now()
        cores = os.cpu_count() or 1
        return max(0.0, (busy - self.busy) - (own - self.own)) / cores / (time.monotonic() - self.began)


def wait_for_quiet(limit: float, patience_s: float) -> None:
    """Until a second in which others took less than that."""
    until, quiet = time.monotonic() + patience_s, Quiet()
    while time.monotonic() < until:
        quiet.begin()
        time.sleep(1)
        if quiet.share() <= limit:
            return


def train(script: Path, workers: int, batch: int, epochs: int, runs: Path, name: str) -> dict[str, float]:
    """A real run; its seconds by part, and the mean step's."""
    command = [sys.executable, "-m", "smlt", "train", str(script), "--workers", str(workers), "--epochs", str(epochs)]
    command += ["--global-batch-size", str(batch), "--runs-dir", str(runs), "--name", name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    status = json.loads((runs / name / "status.json").read_text())
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    times = [row["time"] for row in steps]
    parts = {part: statistics.mean(max(row[part]) for row in steps) for part in ("compute_s", "communication_s", "data_s")}
    return {
        "seconds": status["ended"] - status["started"],
        "start_s": times[0] - status["started"],
        "end_s": status["ended"] - times[-1],
        "step_s": (times[-1] - times[0]) / max(1, len(times) - 1),
        "median_step_s": statistics.median(b - a for a, b in pairwise(times)),
        **parts,
    }


def predicted(workload: Workload, workers: int) -> dict[str, float]:
    """What the model says of it."""
    model, choice = CostModel(workload, Platform.local()), Choice(workers, LOCAL_MEMORY_MB)
    job, parts = model.job(choice), model.step(choice, workload.global_batch_size)
    return {
        "seconds": job.seconds,
        "start_s": job.start_s,
        "end_s": job.end_s,
        "step_s": parts.total_s,
        "median_step_s": parts.total_s - parts.epoch_end_s,
        "compute_s": parts.compute_s,
        "communication_s": parts.communication_s,
        "data_s": parts.data_s,
    }


def compare(options: argparse.Namespace, runs: Path) -> list[dict[str, Any]]:
    """Rows of predicted and actual, one a run."""
    rows = []
    quiet = Quiet()
    for task in options.tasks:
        script, batch, epochs = TASKS[task]
        for number in range(options.rounds):
            workload = quietly_profiled(script, batch, epochs, options.quiet)
            for workers in options.workers:
                for attempt in range(options.rounds + 1):
                    wait_for_quiet(options.quiet, options.patience)
                    quiet.begin()
                    actual = train(script, workers, batch, epochs, runs, f"{task}-{workers}-{number}-{attempt}")
                    others = quiet.share()
                    if others <= options.quiet:
                        break
                guess = predicted(workload, workers)
                rows.append({"task": task, "workers": workers, "others": others, "actual": actual, "predicted": guess})
                print(shown(rows[-1]), flush=True)
    return rows


def quietly_profiled(script: Path, batch: int, epochs: int, limit: float) -> Workload:
    quiet = Quiet()
    for _ in range(4):
        wait_for_quiet(limit, 30)
        quiet.begin()
        workload = profile(script, global_batch_size=batch, epochs=epochs)
        if quiet.share() <= limit:
            break
    return workload


HEAD = f"{'task':14}{'workers':>8}{'predicted s':>12}{'actual s':>10}{'ratio':>7}"
HEAD += f"{'step ms':>9}{'actual':>9}{'ratio':>7}{'start s':>9}{'actual':>8}{'others':>8}"


def shown(row: dict[str, Any]) -> str:
    guess, actual = row["predicted"], row["actual"]
    text = f"{row['task']:14}{row['workers']:8}{guess['seconds']:12.2f}{actual['seconds']:10.2f}"
    text += f"{guess['seconds'] / actual['seconds']:7.2f}{guess['step_s'] * 1e3:9.2f}{actual['step_s'] * 1e3:9.2f}"
    text += f"{guess['step_s'] / actual['step_s']:7.2f}{guess['start_s']:9.2f}{actual['start_s']:8.2f}{row['others']:8.0%}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quiet", type=float, default=0.05)
    parser.add_argument("--patience", type=float, default=30.0)
    parser.add_argument("--no-lambda", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(HEAD)
    with tempfile.TemporaryDirectory(prefix="smlt-bench-") as folder:
        rows = compare(options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
