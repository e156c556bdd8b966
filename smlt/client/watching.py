"""Who watches a run: what the Task Scheduler tells, nobody listening, and several who listen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Listener(Unwatched):
    """Who listens beside the person: a logger, say. `complaints` are told to the person in its stead."""

    def complaints(self) -> Sequence[str]:
        """What went wrong since this was asked last, each thing once."""
        return ()


class Several:
    """Tells everything to each of `listeners`, then to `view`, which is who may leave (a closed pipe)."""

    def __init__(self, view: Progress, listeners: Sequence[Listener]) -> None:
        self.view, self.listeners = view, list(listeners)

    def _all(self) -> Iterator[Progress]:
        yield from self.listeners
        for listener in self.listeners:
            for text in listener.complaints():
                self.warning(text)
        yield self.view

    def uploading(self, sent: int, total: int) -> None:
        """See Progress."""
        for one in self._all():
            one.uploading(sent, total)

    def preparing(self, text: str) -> None:
        """See Progress."""
        for one in self._all():
            one.preparing(text)

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        """See Progress."""
        for one in self._all():
            one.started(run, config, server)

    def step(self, row: dict[str, Any]) -> None:
        """See Progress."""
        for one in self._all():
            one.step(row)

    def epoch(self, row: dict[str, Any]) -> None:
        """See Progress."""
        for one in self._all():
            one.epoch(row)

    def membership(self, row: dict[str, Any]) -> None:
        """See Progress."""
        for one in self._all():
            one.membership(row)

    def decision(self, row: dict[str, Any]) -> None:
        """See Progress."""
        for one in self._all():
            one.decision(row)

    def warning(self, text: str) -> None:
        """See Progress."""
        for one in (*self.listeners, self.view):
            one.warning(text)

    def stopping(self) -> None:
        """See Progress."""
        for one in self._all():
            one.stopping()

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """See Progress."""
        for one in self._all():
            one.ended(run, status)


def heard_by(progress: Progress, *listeners: Listener) -> Several:
    """`progress`, and these as well."""
    if isinstance(progress, Several):
        return Several(progress.view, [*progress.listeners, *listeners])
    return Several(progress, listeners)


def unwatched(progress: Progress) -> Progress:
    """Without the person; who else listens still does."""
    return Several(Unwatched(), progress.listeners) if isinstance(progress, Several) else Unwatched()
