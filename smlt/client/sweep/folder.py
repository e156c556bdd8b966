"""A sweep's folder: what it leaves behind, and how it is found again.

<runs_dir>/<sweep>/sweep.json       what was asked for, how it stands, the best trial
                   trials.jsonl     a line for each trial: hyper-parameters, state, the metric at the end of each rung
                   code/            the copy of the script that all trials train
                   logs/            what each trial's scheduler said on stderr; store.log
                   sweep.lock       locked by the process that runs the sweep, as long as it lives
                   <sweep>-<number>/   a trial's run: `smlt status`, `watch`, `report`, `logs`, `stop`, `resume` take it
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smlt.client.artifacts import local_modules
from smlt.client.folders import make_folder, read_object, replace_file
from smlt.client.records import json_line
from smlt.client.runs import Run
from smlt.client.sweep.halving import Trial
from smlt.client.sweep.request import SweepRequest
from smlt.errors import CheckpointError, ConfigError

#: A trial's run has the sweep's name and a number, and 48 characters at most.
NAME_MAX = 42


class SweepFolder:
    """A sweep's folder. Files are replaced whole: whoever reads them sees the state before or behind a change."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self.name = self.path.name

    @classmethod
    def create(cls, runs_dir: Path, script: Path, name: str | None = None) -> SweepFolder:
        """A new one, with a copy of the script and its modules. ConfigError when the name is taken or none, StoreError when
        it cannot be made, TaskError when the script is missing or is not Python.
        """
        files = local_modules(script)
        to_resume = "a sweep goes on with --resume"
        folder = cls(make_folder(runs_dir, script, name, kind="sweep", name_max=NAME_MAX, to_resume=to_resume))
        for file in files:
            copy = folder.path / "code" / file.relative_to(script.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
        return folder

    @classmethod
    def open(cls, runs_dir: Path, name: str) -> SweepFolder:
        """An existing one, by its path or by its name in `runs_dir`. CheckpointError when there is none."""
        for path in (Path(name), Path(runs_dir) / name):
            if (path / "sweep.json").is_file():
                return cls(path)
        raise CheckpointError(f"there is no sweep {name}, nor one of that name in {runs_dir}")

    def run_name(self, number: int) -> str:
        """The name of a trial's run."""
        return f"{self.name}-{number:03d}"

    def run(self, number: int) -> Run:
        """A trial's run; there may be nothing of it yet."""
        return Run(self.path, self.run_name(number))

    @property
    def script(self) -> Path:
        """The copy that the trials train."""
        return self.path / "code" / Path(self.request.script).name

    @property
    def request(self) -> SweepRequest:
        """What was asked for."""
        try:
            return SweepRequest(**self.state["request"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path / 'sweep.json'} is not a sweep's: {error}") from error

    @property
    def state(self) -> dict[str, Any]:
        """sweep.json."""
        return read_object(self.path / "sweep.json", f"sweep {self.name}")

    def write(self, request: SweepRequest, **state: Any) -> None:
        """Replace sweep.json, keeping what is not named."""
        old = self.state if (self.path / "sweep.json").exists() else {}
        replace_file(self.path / "sweep.json", json.dumps({**old, "request": asdict(request), **state}, indent=1) + "\n")

    def trials(self) -> list[Trial]:
        """trials.jsonl."""
        path = self.path / "trials.jsonl"
        try:
            return [Trial.from_json(json.loads(line)) for line in path.read_text().splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def write_trials(self, trials: Iterable[Trial]) -> None:
        """Replace trials.jsonl."""
        replace_file(self.path / "trials.jsonl", "".join(json_line(trial.as_json()) + "\n" for trial in trials))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the one who runs this sweep. ConfigError when another process is. The lock goes with the process."""
        with (self.path / "sweep.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"sweep {self.name} is still running (process {self.state.get('pid')})") from None
            yield
