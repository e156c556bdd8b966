"""A plan: what is created, updated, kept or deleted, carried out step by step; a failure takes back what was made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from smlt.errors import SmltError

Action = Literal["create", "update", "keep", "delete"]


@dataclass
class Step:
    """One thing in AWS, and what happens to it. `details`: what differs, or why it is kept."""

    kind: str
    name: str
    action: Action
    details: tuple[str, ...] = ()
    run: Callable[[Work], None] | None = None

    def row(self) -> dict[str, Any]:
        """As one object of JSON lines."""
        return {"kind": self.kind, "name": self.name, "action": self.action, "details": list(self.details)}


class Reporter(Protocol):
    """Whoever shows what happens."""

    def planned(self, steps: Sequence[Step], warnings: Sequence[str]) -> None:
        """The plan is made; `warnings` are what the user should mend."""

    def began(self, step: Step) -> None:
        """The step is under way."""

    def sent(self, done: int, total: int) -> None:
        """Of an upload's `total` bytes `done` are sent."""

    def waiting(self, text: str) -> None:
        """What the step is waiting for: "until ..."."""

    def note(self, text: str) -> None:
        """Something that the plan did not know."""

    def done(self, step: Step) -> None:
        """The step has been carried out."""

    def took_back(self, what: str) -> None:
        """Something that this call had made is removed again."""

    def ended(self, row: dict[str, Any], line: str) -> None:
        """All is done: as a row, and as a sentence."""

    def close(self) -> None:
        """Leave the terminal as it was."""


@dataclass
class Work:
    """What steps share while they are carried out."""

    report: Reporter
    role_arn: str = ""
    role_is_new: bool = False
    layer_arn: str | None = None
    sent_bytes: int = 0
    _made: list[tuple[str, Callable[[], object]]] = field(default_factory=list)

    def made(self, what: str, remove: Callable[[], object]) -> None:
        """Say, right behind the request, that this call has made `what`; `remove` takes it back."""
        self._made.append((what, remove))

    def settled(self) -> None:
        """What was made is in use by something that was there before: it stays, whatever comes."""
        self._made.clear()

    def take_back(self) -> list[str]:
        """Remove what was made, newest first; returns what could not be removed."""
        from botocore.exceptions import BotoCoreError, ClientError

        left = []
        while self._made:
            what, remove = self._made.pop()
            try:
                remove()
            except (BotoCoreError, ClientError):
                left.append(what)
            else:
                self.report.took_back(what)
        return left


def carry_out(steps: Sequence[Step], work: Work, left_behind: str) -> None:
    """Run the steps in order. When one fails, or Ctrl-C comes, what this call has made is removed and the error raised.

    `left_behind`: how to get rid of what could not be removed, for the message.
    """
    for step in steps:
        if step.run is None:
            continue
        work.report.began(step)
        try:
            step.run(work)
        except BaseException as error:
            left = work.take_back()
            if left and isinstance(error, SmltError):
                raise type(error)(f"{error}; still there: {', '.join(left)} ({left_behind})") from error
            raise
        work.report.done(step)
