"""Ways to start workers. An executor turns a WorkerConfig into a running worker and says how it fares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from smlt.worker.config import WorkerConfig


class Worker(Protocol):
    """A started worker."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs. Raises the SmltError that keeps any worker from being started."""

    def refused(self) -> float:
        """When (monotonic) it was last refused a place to run, and is to be tried again; 0: never."""

    def account(self) -> str:
        """How it has ended, behind "worker 3": "was killed by signal 9"."""

    def invoke(self, config: WorkerConfig) -> bool:
        """Give a worker that has paused its next invocation; False when it is not there any more."""

    def kill(self) -> None:
        """End it now; where that is not to be had, care for it no more."""


class Executor(Protocol):
    """Starts workers somewhere.

    `concurrency`: how many may run at once; None: as many as are wanted. `requests`: what all of them have asked of the object
    store, by kind, where that is billed.
    """

    concurrency: int | None
    requests: Counter[str]

    def start(self, config: WorkerConfig, log_path: Path) -> Worker:
        """Start a worker; what it prints goes to `log_path`."""

    def threads(self, world_size: int) -> int:
        """How many threads each of so many workers should compute with."""

    def make_ready(self, memory_mb: int) -> bool:
        """Begin to make ready for workers of so much memory; whether it is done. Raises the SmltError that prevents it."""

    def use(self, memory_mb: int) -> None:
        """Start workers with so much memory from now on. It has been made ready."""

    def drain(self, tell: Callable[[], None]) -> None:
        """Wait, not for long, until no worker runs that `kill` could not end. `tell` lets them know that the job is over."""

    def notes(self) -> list[str]:
        """What a user should know of the last while, each thing once."""


def account_of(code: int) -> str:
    """How a process has ended."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
