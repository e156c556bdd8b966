"""A short real run on this machine, to see what a local one takes: starting, its steps, ending."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from smlt.client.cost import Choice, Rehearsal
from smlt.client.optimizer.observations import Observation
from smlt.client.platforms import LOCAL_MEMORY_MB
from smlt.client.workload import Workload
from smlt.errors import TaskError
from smlt.worker.process import this_package

#: Steps go on for so long, or until there are so many; the first are left out: connections, allocators.
SECONDS, STEPS_MIN, STEPS_MAX, WARM_UP = 3.0, 12, 400, 3
PATIENCE_S = 120.0


def rehearse(script: Path, data: Path | None, workload: Workload, workers: int) -> Rehearsal:
    """Train the task with `smlt train` in a folder of its own for some seconds, then stop it.

    TaskError when it fails, or has not begun after PATIENCE_S.
    """
    with tempfile.TemporaryDirectory(prefix="smlt-rehearsal-") as folder:
        command = [sys.executable, "-m", "smlt", "train", str(script), "--workers", str(workers), "--name", "rehearsal"]
        command += ["--runs-dir", folder, "--epochs", "1000000", "--global-batch-size", str(workload.global_batch_size)]
        command += ["--codec", workload.codec, "--bucket-mb", str(workload.bucket_mb)]
        command += ["--data", str(data)] if data is not None else []
        environment = {name: value for name, value in os.environ.items() if name != "SMLT_STORE"}  # the embedded one
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**environment, **this_package()},
            text=True,
            start_new_session=True,
        )
        try:
            _until_enough(process, Path(folder) / "rehearsal")
            process.terminate()  # as Ctrl-C does; SIGINT itself is ignored in the background of a shell
            process.wait(timeout=PATIENCE_S)
        finally:
            if process.poll() is None:  # this was interrupted: it ends in order, and takes its workers with it
                process.terminate()
                process.wait()
            if process.stderr is not None:
                process.stderr.close()
        return _seen(Path(folder) / "rehearsal", workers)


def _until_enough(process: subprocess.Popen[str], run: Path) -> None:
    """Wait for the steps. TaskError when the run ends by itself."""
    until = time.monotonic() + PATIENCE_S
    began: float | None = None
    while True:
        if process.poll() is not None:
            said = process.stderr.read().strip().splitlines() if process.stderr is not None else []
            raise TaskError(f"the rehearsal has ended: {said[-1] if said else f'exit code {process.returncode}'}")
        steps = len(_steps(run))
        began = began or (time.monotonic() if steps else None)
        if began is not None and steps >= STEPS_MIN and (time.monotonic() - began > SECONDS or steps >= STEPS_MAX):
            return
        if time.monotonic() > until:
            if steps > WARM_UP + 2:
                return
            raise TaskError(f"the rehearsal has done {steps} steps in {PATIENCE_S:g} s: its task is too heavy for this machine")
        time.sleep(0.1)


def _steps(run: Path) -> list[dict[str, Any]]:
    """Rows of steps; a last line that is being written is left out."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


def _seen(run: Path, workers: int) -> Rehearsal:
    rows, status = _steps(run), json.loads((run / "status.json").read_text())
    counted = rows[WARM_UP:]
    # Not over the end of an epoch.
    times = [after["time"] - before["time"] for before, after in pairwise(counted) if before["epoch"] == after["epoch"]]
    if not times:
        times = [(counted[-1]["time"] - counted[0]["time"]) / max(1, len(counted) - 1)]
    mean = statistics.fmean(times)
    observation = Observation(
        Choice(workers, LOCAL_MEMORY_MB),
        mean,
        len(times),
        max(row["samples"] for row in rows),
        noise=statistics.pstdev(times) / mean / len(times) ** 0.5,
        compute_s=statistics.fmean(max(row["compute_s"]) for row in counted),
        communication_s=statistics.fmean(max(row["communication_s"]) for row in counted),
    )
    return Rehearsal(observation, rows[0]["time"] - status["started"], status["ended"] - rows[-1]["time"])
