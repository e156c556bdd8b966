"""The scheduler of the run, in a process of its own that can be killed: `python -m bench.chaos.scheduler SETTINGS`.

It is `smlt train` (or, with "resume", `smlt resume`) with an executor that writes down how it starts each worker, so that
duplicates can be started beside it, and that cannot end some of them, as nobody can end a frozen function.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from smlt.client.executors.local import LocalExecutor, LocalWorker
from smlt.client.progress import make_progress
from smlt.client.request import RunRequest
from smlt.client.runs import Run
from smlt.client.scheduler import TaskScheduler, take_over
from smlt.errors import SmltError
from smlt.worker.config import WorkerConfig


class NotedWorker(LocalWorker):
    """A worker that `kill` leaves alone when its number lies in the folder `folder`/immortal."""

    folder: Path

    def kill(self) -> None:
        if not (self.folder / "immortal" / str(self.process.pid)).exists():
            super().kill()


class NotingExecutor(LocalExecutor):
    """Writes the configuration of each worker to `folder`/workers/<pid>, for this user alone."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def start(self, config: WorkerConfig, log_path: Path) -> LocalWorker:
        worker = super().start(config, log_path)
        noted = NotedWorker(worker.process)
        noted.folder = self.folder
        target = self.folder / "workers" / str(worker.process.pid)
        target.with_suffix(".new").touch(mode=0o600)
        target.with_suffix(".new").write_text(config.to_json())
        os.replace(target.with_suffix(".new"), target)
        return noted


def main() -> int:
    """Run or resume; the exit code of `smlt train`."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    request, runs_dir, store = RunRequest(**settings["request"]), Path(settings["runs_dir"]), os.environ["SMLT_STORE"]
    try:
        if settings["resume"]:
            run = Run.open(runs_dir, settings["name"])
            take_over(run, store)
        else:
            run = Run.create(runs_dir, Path(request.script), asdict(request), settings["name"])
        executor = NotingExecutor(Path(settings["folder"]))
        scheduler = TaskScheduler(
            run, request, make_progress(as_json=True), store_url=store, executor=executor, resume=settings["resume"]
        )
        scheduler.run()
    except SmltError as error:
        print(f"chaos: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
