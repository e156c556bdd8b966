"""Who watches a run: what the Task Scheduler tells, and nobody listening."""

from __future__ import annotations

from typing import Any, Protocol

from smlt.client.runs import Run
from smlt.store.parameter import ServerInfo


class Progress(Protocol):
    """Who watches a run. Everything here is told from one thread."""

    def uploading(self, sent: int, total: int) -> None:
        """Of the data, so many bytes have been sent. Told when that takes long."""

    def preparing(self, text: str) -> None:
        """Something has begun that takes some seconds, before the run does."""

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        """The workers are being started."""

    def step(self, row: dict[str, Any]) -> None:
        """A global step is complete: the row of metrics.jsonl."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is complete: its metrics."""

    def membership(self, row: dict[str, Any]) -> None:
        """Training goes on with a changed membership: generation, world_size, reason, recovery_s."""

    def decision(self, row: dict[str, Any]) -> None:
        """A round is over: the row of decisions.jsonl, with what was decided and the forecast."""

    def warning(self, text: str) -> None:
        """Something a user should know while the run goes on."""

    def stopping(self) -> None:
        """Ctrl-C was seen: the workers finish their step."""

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """The run has ended."""


class Unwatched:
    """A run that nobody watches any more."""

    def uploading(self, sent: int, total: int) -> None:
        """See Progress."""

    def preparing(self, text: str) -> None:
        """See Progress."""

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        """See Progress."""

    def step(self, row: dict[str, Any]) -> None:
        """See Progress."""

    def epoch(self, row: dict[str, Any]) -> None:
        """See Progress."""

    def membership(self, row: dict[str, Any]) -> None:
        """See Progress."""

    def decision(self, row: dict[str, Any]) -> None:
        """See Progress."""

    def warning(self, text: str) -> None:
        """See Progress."""

    def stopping(self) -> None:
        """See Progress."""

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """See Progress."""
