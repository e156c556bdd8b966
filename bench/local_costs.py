"""What a step of a local run costs beside the task itself: processor time of scheduler, store and workers.

    python -m bench.local_costs [--script examples/digits_numpy.py] [--batch 64] [--workers 1 2 4] [--epochs 80]

The constants of `smlt.client.cost` for runs on one machine come from here. Each run is looked at from its 50th step to its last
but some, once the processes' times are read at both; divided by the steps between. `worker`: what one takes, on average;
`beside`: without the forward, backward and optimizer that `smlt.client.profiling` measures of the same task. The last lines fit
scheduler = a + b n by least squares, and tell start and end of the runs.

Processor time hardly depends on what else the machine does, but it does: others in the caches make it longer by a third or so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from smlt.client.profiling import profile

ROOT = Path(__file__).parents[1]
FIRST_STEP = 50


def steps_of(run: Path) -> int:
    """Steps that the run has reported."""
    try:
        return (run / "metrics.jsonl").read_text().count('"kind": "step"')
    except FileNotFoundError:
        return 0


def times_of(process: psutil.Process) -> dict[str, list[float]]:
    """Processor seconds so far by kind of process; one number for each worker."""
    found: dict[str, list[float]] = {"scheduler": [_seconds(process)], "store": [0.0], "worker": []}
    for child in sorted(process.children(recursive=True), key=lambda child: child.pid):
        try:
            line = " ".join(child.cmdline())
            if "smlt.worker.main" in line:
                found["worker"].append(_seconds(child))
            elif "valkey-server" in line:
                found["store"][0] += _seconds(child)
        except psutil.Error:
            continue
    return found


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def watched(script: Path, workers: int, batch: int, epochs: int, steps: int, folder: Path) -> dict[str, Any]:
    """Processor milliseconds a step of each kind, and the seconds of start and end."""
    run = folder / f"n{workers}"
    command = [sys.executable, "-m", "smlt", "train", str(script), "--workers", str(workers), "--epochs", str(epochs)]
    command += ["--global-batch-size", str(batch), "--runs-dir", str(folder), "--name", run.name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as started:
        process = psutil.Process(started.pid)
        while steps_of(run) < FIRST_STEP and started.poll() is None:
            time.sleep(0.02)
        before, begun = times_of(process), steps_of(run)
        while steps_of(run) < 0.9 * steps and started.poll() is None:
            time.sleep(0.02)
        after, ended = times_of(process), steps_of(run)
    if started.returncode or ended <= begun:
        raise SystemExit(f"the run with {workers} workers has failed, or was over too soon: give more --epochs")
    mean = {
        kind: 1e3 * float(np.mean(np.subtract(after[kind], before[kind]))) / (ended - begun)
        for kind in ("scheduler", "store", "worker")
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows if row["kind"] == "step"]
    status = json.loads((run / "status.json").read_text())
    return {"workers": workers, **mean, "start_s": times[0] - status["started"], "end_s": status["ended"] - times[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, default=ROOT / "examples" / "digits_numpy.py")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    task = profile(options.script, global_batch_size=options.batch, epochs=options.epochs, crowd=False)
    steps = task.epochs * task.steps_per_epoch
    print(f"{options.script.name}: import {task.import_s:.2f} s, load {task.load_s:.2f} s, exit {task.exit_s:.2f} s")
    print("workers  scheduler ms  store ms  worker ms  beside ms  start s  end s")
    rows = []
    with tempfile.TemporaryDirectory(prefix="smlt-bench-") as folder:
        for n in options.workers:
            row = watched(options.script, n, options.batch, options.epochs, steps, Path(folder))
            row["beside"] = row["worker"] - 1e3 * (task.compute_s(-(-options.batch // n)) + task.optimizer_s)
            rows.append(row)
            numbers = (row["scheduler"], row["store"], row["worker"], row["beside"])
            print(f"{n:7}" + "".join(f"{v:{w}.3f}" for v, w in zip(numbers, (14, 10, 11, 11), strict=True)), end="")
            print(f"{row['start_s']:9.2f}{row['end_s']:7.2f}", flush=True)
    if len(rows) > 1:
        slope, constant = np.polyfit([row["workers"] for row in rows], [row["scheduler"] for row in rows], 1)
        print(f"scheduler: {constant:.3f} ms + {slope:.3f} ms for each worker")
    if options.json is not None:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
