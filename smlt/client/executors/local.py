"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from smlt.client.executors import Executor, RunContext, Traits, Worker, account_of
from smlt.worker.config import WorkerConfig
from smlt.worker.process import worker_command, worker_environment

#: Of a worker in a run that tunes itself: their number is what changes, and a process cannot well change its threads.
TUNED_THREADS = 1


class LocalWorker(Worker):
    """A worker process. Its stdin is the life line: when this process ends, however it ends, the worker does too."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self._group_lives = process, True

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None:
            self._end_group()
        return code

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


class LocalExecutor(Executor):
    """Processes of this machine.

    `shared`: open files that are to live as long as any worker does. `threads_each`: None: the cores are
    shared out.
    """

    traits = Traits(is_warm=True)

    def __init__(self, shared: Sequence[int] = (), threads_each: int | None = None) -> None:
        self.shared, self.threads_each = list(shared), threads_each

    @classmethod
    def open(cls, context: RunContext) -> Self:
        shared = [context.life_line] if context.life_line is not None else []
        return cls(shared, TUNED_THREADS if context.request.tune else None)

    def start(self, config: WorkerConfig, log_path: Path) -> LocalWorker:
        return self.start_in(config, log_path)

    def start_in(self, config: WorkerConfig, log_path: Path, before: Sequence[str] = ()) -> LocalWorker:
        """Start a worker by the command `before`, which replaces itself by what follows it, as `ip netns exec` does."""
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [*before, *worker_command()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=worker_environment(config.threads),
                start_new_session=True,  # Ctrl-C in the terminal reaches the client alone
                pass_fds=self.shared,
            )
        worker = LocalWorker(process)
        worker.invoke(config)
        return worker

    def threads(self, world_size: int) -> int:
        return self.threads_each or threads_per_worker(world_size)


def threads_per_worker(world_size: int) -> int:
    """Cores shared evenly, at least one thread each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // world_size)
