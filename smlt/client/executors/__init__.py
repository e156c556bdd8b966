"""Ways to start workers. An executor turns a WorkerConfig into a running worker and says how it fares."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from smlt.worker.config import WorkerConfig


class Worker(Protocol):
    """A started worker."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""

    def invoke(self, config: WorkerConfig) -> bool:
        """Give a worker that has paused its next invocation; False when it is not there any more."""

    def kill(self) -> None:
        """End it now."""


class Executor(Protocol):
    """Starts workers somewhere."""

    def start(self, config: WorkerConfig, log_path: Path) -> Worker:
        """Start a worker; what it prints goes to `log_path`."""
