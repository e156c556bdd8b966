"""Run folders: what a run leaves behind, and how it is found again.

<runs_dir>/<run>/config.json       what was asked for
                 status.json       state, progress, process; rewritten as the run goes on
                 metrics.jsonl     a row for each step and each epoch
                 events.jsonl      workers' starts and ends, generations, warnings (`smlt.client.events`)
                 logs/             worker-<rank>.log, store.log
                 scheduler.lock    locked by the process that schedules the run, as long as it lives
                 invocations.jsonl, bill.json   of a run on Lambda: every invocation, and what they cost
                 code/, data/, checkpoints/   the object store's, when it is the default directory
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smlt.client.folders import make_folder, read_object, replace_file
from smlt.errors import CheckpointError, ConfigError

DEFAULT_RUNS_DIR = Path("smlt-runs")
_LOCK = "scheduler.lock"


class Run:
    """A run's folder."""

    def __init__(self, runs_dir: Path, name: str) -> None:
        self.runs_dir, self.name = Path(runs_dir).absolute(), name
        self.path = self.runs_dir / name

    @classmethod
    def create(cls, runs_dir: Path, script: Path, config: dict[str, Any], name: str | None = None) -> Run:
        """A new run. ConfigError when the name is taken or no name at all, StoreError when the folder cannot be made."""
        to_resume = f"resume it with --resume {name}"
        path = make_folder(runs_dir, script, name, kind="run", name_max=48, to_resume=to_resume)
        run = cls(runs_dir, path.name)
        run.write_config(config)
        return run

    @classmethod
    def open(cls, runs_dir: Path, name: str) -> Run:
        """An existing run, by name or by the path of its folder. CheckpointError naming what is missing."""
        path = Path(name)
        run = cls(path.parent, path.name) if path.is_dir() and path.name != name else cls(runs_dir, name)
        if not run.path.is_dir():
            known = [r.name for r in list_runs(run.runs_dir)][-5:]
            raise CheckpointError(
                f"there is no run {name} in {run.runs_dir}" + (f"; the latest: {', '.join(known)}" if known else "")
            )
        if (run.path / "sweep.json").is_file():
            raise CheckpointError(f"{name} is a sweep: its trials are runs, such as {run.path / f'{run.name}-000'}")
        for file in ("config.json", "status.json"):
            if not (run.path / file).is_file():
                raise CheckpointError(f"run {name} is incomplete: {run.path / file} is missing")
        return run

    @property
    def config(self) -> dict[str, Any]:
        """What was asked for."""
        return self._read("config.json")

    @property
    def status(self) -> dict[str, Any]:
        """State ("running", "done", "stopped", "failed", "lost"), progress and metrics. Lost: its process is gone."""
        status = self._read("status.json")
        if status.get("state") == "running" and not self.is_held:
            status = self._read("status.json")  # it may have ended in order between the two looks
            if status.get("state") == "running":
                status["state"] = "lost"
        return status

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the one who schedules this run. ConfigError when another process is. The lock goes with the process."""
        with (self.path / _LOCK).open("a") as file:
            for attempt in range(5):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if attempt == 4:
                        pid = self._read("status.json").get("pid")
                        raise ConfigError(f"run {self.name} is still running (process {pid})") from None
                    time.sleep(0.02)  # whoever looks at the status has it for a moment
            yield

    @property
    def is_held(self) -> bool:
        """Whether a process schedules the run, or is at its last words."""
        try:
            with (self.path / _LOCK).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def write_config(self, values: dict[str, Any]) -> None:
        """Replace the configuration: a resumed run may go on with other epochs or workers."""
        self._write("config.json", values)

    def write_status(self, **values: Any) -> None:
        """Replace the status, keeping what is not named."""
        old = self._read("status.json") if (self.path / "status.json").exists() else {}
        self._write("status.json", {**old, **values})

    def log_path(self, name: str) -> Path:
        """Where a process of the run writes its log."""
        return self.path / "logs" / f"{name}.log"

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that was cut short is left out."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    return

    def request_scale(self, workers: int) -> None:
        """Ask whoever schedules the run for another number of workers."""
        self._write("scale.json", {"workers": workers})

    def take_scale_request(self) -> int | None:
        """The number of workers that was asked for since the last time, None when none was."""
        taken = self.path / ".scale.json-taken"
        try:
            (self.path / "scale.json").rename(taken)  # the next one may come at any moment
        except OSError:
            return None
        try:
            return int(self._read(taken.name)["workers"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            return None
        finally:
            taken.unlink(missing_ok=True)

    def truncate_metrics(self, step: int) -> None:
        """Drop rows of steps after `step`: a resumed run does them again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        replace_file(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _read(self, name: str) -> dict[str, Any]:
        return read_object(self.path / name, f"run {self.name}")

    def _write(self, name: str, value: dict[str, Any]) -> None:
        replace_file(self.path / name, json.dumps(value, indent=1) + "\n")


def list_runs(runs_dir: Path) -> list[Run]:
    """The runs in a folder, oldest first."""
    if not runs_dir.is_dir():
        return []
    found = [Run(runs_dir, path.name) for path in runs_dir.iterdir() if (path / "config.json").is_file()]
    return sorted(found, key=lambda run: ((run.path / "config.json").stat().st_mtime, run.name))


def latest_run(runs_dir: Path) -> Run:
    """The newest one. CheckpointError when there is none."""
    runs = list_runs(runs_dir)
    if not runs:
        raise CheckpointError(f"there are no runs in {runs_dir}")
    return Run.open(runs_dir, runs[-1].name)
