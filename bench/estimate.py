"""Estimates against actual runs: the time of local training jobs, and the money of one on `smlt lambda-local`.

    python -m bench.estimate [--tasks digits digits_numpy text convolutions resnet] [--workers 1 2 4] [--rounds 3]
                             [--no-rehearsal] [--quiet 0.05] [--repeats 3] [--patience 30] [--no-lambda] [--json FILE]

In each round a task is profiled and, unless told not to, rehearsed for some seconds with a worker for each core, as
`smlt estimate --on local` does; then it is trained for real with `smlt train` by 1, 2 and 4 workers. The table has the wall
time from the run's start to its end as predicted and as it was, their ratio, and the same of the mean step and of the start. A
run or profile during which other processes took more than --quiet of the machine's cores is repeated, up to --repeats times,
each after waiting up to --patience seconds for a quiet one; the last column says how much they took in the one that counts.
The bar: the median ratio of every task and number of workers within 15 %.

On lambda-local one job is trained by functions, and its billed durations are put into the estimate's arithmetic: the sum must
equal the bill's to the cent. Exit code 1 when a bar is missed.
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
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from smlt.client.bill import ObjectUse, StoreUse, estimate, read_bill
from smlt.client.cost import Choice, CostModel, Platform
from smlt.client.invocations import read_invocations
from smlt.client.platforms import LOCAL_MEMORY_MB
from smlt.client.profiling import profile
from smlt.client.rehearsal import rehearse
from smlt.client.workload import Workload
from smlt.emulator import LambdaLocal

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


def predicted(model: CostModel, workers: int) -> dict[str, float]:
    """What the model says of it."""
    choice = Choice(workers, LOCAL_MEMORY_MB)
    job, parts = model.job(choice), model.step(choice, model.workload.global_batch_size)
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
            model = CostModel(quietly_profiled(script, batch, epochs, options), Platform.local())
            if options.rehearsal:
                model = model.with_rehearsal(rehearse(script, None, model.workload, model.platform.cores))
            for workers in options.workers:
                for attempt in range(options.repeats + 1):
                    wait_for_quiet(options.quiet, options.patience)
                    quiet.begin()
                    actual = train(script, workers, batch, epochs, runs, f"{task}-{workers}-{number}-{attempt}")
                    others = quiet.share()
                    if others <= options.quiet:
                        break
                guess = predicted(model, workers)
                rows.append({"task": task, "workers": workers, "others": others, "actual": actual, "predicted": guess})
                print(shown(rows[-1]), flush=True)
    return rows


def quietly_profiled(script: Path, batch: int, epochs: int, options: argparse.Namespace) -> Workload:
    quiet = Quiet()
    for _ in range(options.repeats + 1):
        wait_for_quiet(options.quiet, options.patience)
        quiet.begin()
        workload = profile(script, global_batch_size=batch, epochs=epochs)
        if quiet.share() <= options.quiet:
            break
    return workload


def billed(folder: Path) -> dict[str, Any]:
    """A job of functions on lambda-local: its bill, and the sum of estimates of its billed durations."""
    script, node = TASKS["digits_numpy"][0], "cache.t4g.small"
    function, bucket, role, image = "estimate", "smlt-estimate", "smlt-estimate-role", "bench/estimate:latest"
    with LambdaLocal() as local:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **local.environment()}

        def smlt(*arguments: object) -> None:
            command = [sys.executable, "-m", "smlt", *map(str, arguments)]
            subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)

        smlt("deploy", function, bucket, script, role, "--create-bucket", "--create-role", "--image", image, "--tmp", 1024)
        job = ("train", script, "--workers", 3, "--epochs", 20, "--memory", 1500, "--time-limit", 20, "--name", "billed")
        smlt(*job, "--on", "lambda", "--function", function, "--store-node", node, "--runs-dir", "runs")
    run = folder / "runs" / "billed"
    made = read_bill(run)
    assert made is not None
    status = json.loads((run / "status.json").read_text())
    rows = [row for row in read_invocations(run) if row.billed_ms is not None]
    total = Fraction(0)
    for row in rows:
        seconds: Any = Fraction(row.billed_ms or 0, 1000)
        total += estimate(1, row.memory_mb, seconds, ephemeral_mb=int(status["tmp_mb"])).total_usd
    asked = status["s3_requests"]
    objects = ObjectUse(puts=asked.get("put", 0) + asked.get("list", 0), gets=asked.get("get", 0))
    whole = estimate(1, 128, 1.0, objects=objects, store=StoreUse(node, float(status["store_s"])))
    total += whole.total_usd - estimate(1, 128, 1.0).total_usd
    return {
        "invocations": len(rows),
        "billed_s": sum(row.billed_ms or 0 for row in rows) / 1000,
        "bill_usd": float(made.total_usd),
        "estimated_usd": float(total),
    }


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
    parser.add_argument("--tasks", nargs="*", choices=sorted(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-rehearsal", dest="rehearsal", action="store_false")
    parser.add_argument("--quiet", type=float, default=0.05)
    parser.add_argument("--patience", type=float, default=30.0)
    parser.add_argument("--no-lambda", dest="on_lambda", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(HEAD)
    with tempfile.TemporaryDirectory(prefix="smlt-bench-") as folder:
        rows = compare(options, Path(folder))
        money = billed(Path(folder)) if options.on_lambda else None
    medians = middle(rows)
    if money is not None:
        print(
            f"{money['invocations']} invocations, {money['billed_s']:.1f} s billed: bill {money['bill_usd']:.12f} USD, ", end=""
        )
        print(f"estimates of the billed durations {money['estimated_usd']:.12f} USD")
    if options.json is not None:
        options.json.write_text(json.dumps({"runs": rows, "medians": medians, "money": money}))
    good = all(abs(row["ratio"] - 1) <= BAR for row in medians)
    return 0 if good and (money is None or abs(money["bill_usd"] - money["estimated_usd"]) < 0.005) else 1


def middle(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median ratio of each task and number of workers, printed."""
    found = []
    for task, workers in dict.fromkeys((row["task"], row["workers"]) for row in rows):
        alike = [row for row in rows if (row["task"], row["workers"]) == (task, workers)]
        ratios = [row["predicted"]["seconds"] / row["actual"]["seconds"] for row in alike]
        steps = [row["predicted"]["step_s"] / row["actual"]["step_s"] for row in alike]
        others = statistics.median(row["others"] for row in alike)
        ratio, step = statistics.median(ratios), statistics.median(steps)
        found.append({"task": task, "workers": workers, "ratio": ratio, "step_ratio": step, "others": others, "n": len(alike)})
        print(f"median of {len(alike)}: {task} x {workers}: {ratio:.2f} (step {step:.2f}), others took {others:.0%}")
    return found


if __name__ == "__main__":
    sys.exit(main())
