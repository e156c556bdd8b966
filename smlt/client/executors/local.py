"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import smlt
from smlt.client.executors import account_of
from smlt.store.secrets import without_store_secrets
from smlt.worker.config import WorkerConfig
from smlt.worker.processors import VARIABLES


class LocalWorker:
    """A worker process. Its stdin is the life line: when this process ends, however it ends, the worker does too."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self._group_lives = process, True

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None:
            self._end_group()
        return code

    def refused(self) -> float:
        return 0.0

    def account(self) -> str:
        return account_of(self.process.returncode or 0)

    def invoke(self, config: WorkerConfig) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(config.to_json().encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it has ended, or is closed: its exit code tells
            return False
        return self.process.poll() is None

    def kill(self) -> None:
        if self.poll() is None:
            self._end_group()
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended before it had read its configuration
                self.process.stdin.close()

    def _end_group(self) -> None:
        """It leads a process group of its own: what the task started (data loaders) goes with it."""
        if self._group_lives:  # once: the number may be another's later
            self._group_lives = False
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


class LocalExecutor:
    """Starts workers as `python -m smlt.worker.main`.

    `shared`: open files that are to live as long as any worker does. `threads_each`: None: the cores are
    shared out.
    """

    def __init__(self, shared: Sequence[int] = (), threads_each: int | None = None) -> None:
        self.shared, self.threads_each = list(shared), threads_each
        self.concurrency: int | None = None
        self.requests: Counter[str] = Counter()

    def start(self, config: WorkerConfig, log_path: Path) -> LocalWorker:
        return self.start_in(config, log_path)

    def start_in(self, config: WorkerConfig, log_path: Path, before: Sequence[str] = ()) -> LocalWorker:
        """Start a worker by the command `before`, which replaces itself by what follows it, as `ip netns exec` does."""
        threads = str(config.threads)
        environment = {
            **without_store_secrets(os.environ),  # the worker has the store's URL from its configuration
            # The workers share the cores: none of them may take all.
            **dict.fromkeys(VARIABLES, threads),
            "PYTHONUNBUFFERED": "1",
            **this_package(),
        }
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [*before, sys.executable, "-m", "smlt.worker.main"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal reaches the client alone
                pass_fds=self.shared,
            )
        worker = LocalWorker(process)
        worker.invoke(config)
        return worker

    def threads(self, world_size: int) -> int:
        return self.threads_each or threads_per_worker(world_size)

    def make_ready(self, memory_mb: int) -> bool:
        return True

    def use(self, memory_mb: int) -> None:
        """A process takes the memory that it needs."""

    def drain(self, tell: Callable[[], None]) -> None:
        """Nothing runs on behind `kill`."""

    def notes(self) -> list[str]:
        return []


def this_package() -> dict[str, str]:
    """The environment in which a child process finds this very package, installed or not."""
    folder = Path(smlt.__file__).parents[1]
    if folder.name in ("site-packages", "dist-packages"):
        return {}  # it is found anyway, and must not come before the standard library
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def threads_per_worker(world_size: int) -> int:
    """Cores shared evenly, at least one thread each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // world_size)
