"""The command line as a person uses it: real processes, run in a folder of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import redis

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 60.0

TASK = '''
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import smlt
from smlt.worker.frameworks.numpy import SGD


class Tiny(smlt.Task):
    """Three weights; 4 steps an epoch with a global batch of 16."""

    calls = 0

    def data(self):
        rng = np.random.default_rng(1)
        x = rng.normal(size=(64, 3)).astype("f4")
        y = x @ np.array([1, -2, 0.5], "f4")
        return {"train": (x, y), "test": (x, y)}

    def model(self):
        return {"w": np.zeros(3, "f4")}

    def loss(self, model, batch):
        self.calls += 1
        self.before_step(self.calls)
        x, y = batch
        error = x @ model["w"] - y
        return float((error**2).mean()), {"w": 2 * x.T @ error / len(y)}

    def before_step(self, number):
        pass

    def optimizer(self, model):
        return SGD(model, lr=0.005, momentum=0.5)

    def evaluate(self, model, batch):
        x, y = batch
        return {"accuracy": float((np.abs(x @ model["w"] - y) < 0.3).mean())}


def one_worker(folder):
    """True in the first worker that asks."""
    try:
        os.close(os.open(Path(folder) / "taken", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
'''

#: In `before_step`: wait at step 30 while the folder in $HOLD is there and holds no file "go".
HOLD = """
        hold = Path(os.environ.get("HOLD", "/nonexistent"))
        while number == 30 and hold.is_dir() and not (hold / "go").exists():
            time.sleep(0.005)
        if (hold / "go").exists():
            time.sleep(float(os.environ.get("PACE", "0")))
"""

#: In `before_step`: take so long for each step as $PACE says, for a test to have time to disturb it, until it lets go.
PACED = """
        if not os.path.exists(os.environ.get("LET_GO", "")):
            time.sleep(float(os.environ.get("PACE", "0")))
"""


def write_task(folder: Path, before_step: str = "\n        pass\n", *, name: str = "tiny.py") -> Path:
    """A task in `folder` that runs the lines `before_step` (of 8 spaces) before each of its steps."""
    script = folder / name
    script.write_text(TASK.replace("\n        pass\n", before_step))
    return script


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SMLT_") and name != "PYTHONPATH"}
    return {**kept, "PYTHONPATH": str(REPOSITORY), **more}


def smlt(*arguments: object, cwd: Path, stdin: int = subprocess.DEVNULL, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `smlt` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "smlt", *map(str, arguments)],
        cwd=cwd,
        env=environment(**more),
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


class Running:
    """A `smlt` that runs, its events (--json) as they come, and every process below it."""

    def __init__(self, *arguments: object, cwd: Path, **more: str) -> None:
        self.errors, self._let_go = cwd / "stderr", cwd / "let-go"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "smlt", *map(str, arguments)],
                cwd=cwd,
                env=environment(LET_GO=str(self._let_go), **more),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.events: list[dict[str, Any]] = []

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read events until one is wanted."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if wanted(self.events[-1]):
                return self.events[-1]
        raise AssertionError(f"the output ended before: {self.events[-3:]} {self.errors.read_text()}")

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[tuple[int, psutil.Process]]:
        """Its workers that live, each with the rank it was started for; spares have the number behind the last."""
        found: list[tuple[int, psutil.Process]] = []
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                if "smlt.worker.main" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    names = [Path(file.path).stem for file in process.open_files()]
                    rank = next(int(name.removeprefix("worker-")) for name in names if name.startswith("worker-"))
                    found.append((rank, process))
        return found

    def let_go(self) -> None:
        """From here on a task that is PACED takes no longer for its steps than it must."""
        self._let_go.touch()

    def finish(self) -> int:
        """Read the rest and wait; returns the exit code."""
        assert self.process.stdout is not None
        self.events += [json.loads(line) for line in self.process.stdout]
        return self.process.wait(LIMIT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def eventually(condition: Callable[[], bool], limit_s: float = 20.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether every process has ended (waits a while)."""
    return eventually(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))


def keys_of(url: str, run: str) -> list[str]:
    """The keys in the store that have to do with a run."""
    with redis.Redis.from_url(url) as client:
        return [key.decode() for key in client.scan_iter(match=f"smlt:{{{run}*", count=1000)]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[tuple[int, float]]:
    """(step, loss) as metrics.jsonl has them."""
    return [(row["step"], row["loss"]) for row in rows(run) if row["kind"] == "step"]


def parameters(run: Path) -> bytes:
    """The last checkpoint's tensors, model and optimizer."""
    return (max((run / "checkpoints").iterdir()) / "tensors.safetensors").read_bytes()


def same_end(run: Path, undisturbed: Path) -> None:
    """That a run has come to the very end of another one: every step once and in order, the same losses, metrics, bits."""
    assert status(run)["state"] == "done"
    assert steps(run) == steps(undisturbed)
    assert [(row["step"], row["metrics"]) for row in rows(run) if row["kind"] == "epoch"] == [
        (row["step"], row["metrics"]) for row in rows(undisturbed) if row["kind"] == "epoch"
    ]
    assert parameters(run) == parameters(undisturbed)


def status(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "status.json").read_text())
    return value
