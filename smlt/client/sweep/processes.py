"""A trial's rung as a process of its own: `smlt train`, which knows how to begin, to go on, and to stop at a checkpoint.

Processes, not threads of the sweep: a task's crash or a scheduler's ends one trial; Ctrl-C reaches each as the signal that it
knows; `smlt status`, `watch` and `stop` work on a trial as on any run, for a process schedules it. Its price is the start of an
interpreter a rung, which is little beside that of the workers.
"""

from __future__ import annotations

import json
import math
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from smlt.client.runs import Run
from smlt.client.sweep.request import split, value_text
from smlt.errors import CheckpointError, ConfigError
from smlt.worker.process import this_package

#: What comes from a trial: an event that it has printed, or None when it has ended.
Events = queue.SimpleQueue[tuple[int, dict[str, Any] | None]]


class TrialProcess:
    """`smlt train` for one rung of a trial. Its events go to `events`, with its number; what else it says to `log`.

    Its stdout is the life line: when the sweep is gone, whatever it prints next fails, and it stops at a checkpoint.
    """

    def __init__(
        self,
        number: int,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        shared: Sequence[int],
        events: Events,
    ) -> None:
        self.number, self.log = number, log
        self._began, self._first, self._last = time.monotonic(), 0.0, 0.0
        self.log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "smlt", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**environment, **this_package()},
                start_new_session=True,  # Ctrl-C in the terminal reaches the sweep alone
                pass_fds=list(shared),
            )
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    def trains(self) -> None:
        """It has trained a step, or ended an epoch."""
        self._last = time.monotonic()
        self._first = self._first or self._last

    def start_s(self) -> float:
        """What it has taken so far beside training: to start, and to end."""
        return time.monotonic() - self._began - (self._last - self._first)

    def stop(self) -> None:
        """End at a checkpoint; asked a second time, at once."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def finish(self) -> int:
        """When its last event has come: its exit code."""
        self._reader.join()
        return self.process.wait()

    def kill(self) -> None:
        """End it now. Its workers notice."""
        self.process.kill()
        self.finish()

    def last_words(self) -> str:
        """The last line that it has said on stderr in this rung."""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode(errors="replace").strip().splitlines()
            return lines[-1].removeprefix("smlt: ") if lines else ""
        return ""

    def _read(self, events: Events) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # cut off when it was killed
                if isinstance(event, dict):
                    events.put((self.number, event))
        events.put((self.number, None))


def arguments_of(
    run: Run, script: Path, point: Mapping[str, Any], workers: int, epochs: int, options: Sequence[str]
) -> list[str]:
    """The arguments of `smlt` that train a trial until it has so many epochs behind it: from its checkpoint if it has begun.

    What a start has left that was ended before its code was uploaded is removed.
    """
    whose = ["--runs-dir", str(run.runs_dir), "--epochs", str(epochs), "--json"]
    if _has_begun(run):
        return ["train", "--resume", run.name, *whose]
    shutil.rmtree(run.path, ignore_errors=True)
    chosen, hyperparameters = split(point)
    for name, value in chosen.items():
        whose += [f"--{name.replace('_', '-')}", value_text(value)]
    for name, value in hyperparameters.items():
        whose += ["--set", f"{name}={json.dumps(value)}"]
    return ["train", str(script), "--name", run.name, "--workers", str(workers), *options, *whose]


def _has_begun(run: Run) -> bool:
    try:
        return bool(run.config) and "code_sha256" in run.status
    except CheckpointError:
        return False


def metric_of(run: Run, metric: str) -> float:
    """The metric at the end of the run's last epoch, nan when it is no finite number.

    "loss", where evaluate() gives none, is the mean training loss of that epoch. ConfigError names what there is.
    """
    losses: list[tuple[float, int]] = []
    epoch, found = -1, dict[str, Any]()
    for row in run.metrics():
        if row.get("kind") == "epoch":
            found = row["metrics"]
        elif row.get("kind") == "step":
            if row["epoch"] != epoch:
                epoch, losses = row["epoch"], []
            losses.append((math.nan if row["loss"] is None else float(row["loss"]), int(row["samples"])))
    if metric in found:
        return math.nan if found[metric] is None else float(found[metric])
    if metric == "loss" and losses:
        return sum(loss * samples for loss, samples in losses) / sum(samples for _, samples in losses)
    has = f"it gives {', '.join(sorted(found))}" if found else "it gives nothing"
    raise ConfigError(f"--metric {metric}: evaluate() has no {metric} ({has}); --metric loss is the training loss")
