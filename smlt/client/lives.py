"""The lives of a run's workers, put together from the rows of events.jsonl: who did what, in which rank, from when to when."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

#: What a worker does. Gathering: the membership changes, and it waits for the others.
STARTING, WAITING, TRAINING, GATHERING = "starting", "waiting", "training", "gathering"
#: Ends that are in order: anything else is a worker that was lost.
IN_ORDER = ("done", "paused", "stopped", "is not needed", "was replaced", "ended with the run")
#: A run's ending that its scheduler did not live to write down.
UNSEEN = "was left by its scheduler"


@dataclass
class Span:
    """A worker did one thing from `begin` to `end`, epoch s; `end` nan: it still does. `rank` -1: it has none."""

    kind: str
    rank: int
    begin: float
    end: float = math.nan


@dataclass
class Life:
    """One start of a worker. `index`: the rank it was meant for; `before`: whose next invocation it is, "" for none."""

    worker_id: str
    index: int
    started: float
    spare: bool = False
    before: str = ""
    warm: bool = False
    ready: float = math.nan
    ended: float = math.nan
    how: str = ""
    spans: list[Span] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return not math.isnan(self.ended)

    @property
    def is_lost(self) -> bool:
        """Whether it ended otherwise than it should."""
        return self.is_over and self.how not in IN_ORDER

    @property
    def rank(self) -> int:
        """The last rank that it had, else the one it was meant for."""
        return next((span.rank for span in reversed(self.spans) if span.rank >= 0), self.index)

    @property
    def kind(self) -> str:
        """What it did last."""
        return self.spans[-1].kind if self.spans else STARTING

    def seconds(self, now: float) -> float:
        """How long it has been there until `now`, epoch s."""
        return max(0.0, (self.ended if self.is_over else now) - self.started)

    def turn_to(self, kind: str, rank: int, at: float) -> None:
        """It does something else from now on."""
        if self.spans and math.isnan(self.spans[-1].end):
            if (self.spans[-1].kind, self.spans[-1].rank) == (kind, rank):
                return
            self.spans[-1].end = at
        self.spans.append(Span(kind, rank, at))

    def end(self, at: float, how: str) -> None:
        """It is no more."""
        self.ended, self.how = at, how
        if self.spans and math.isnan(self.spans[-1].end):
            self.spans[-1].end = at


@dataclass
class Generation:
    """A generation as it went on: its number, when (epoch s), with how many workers."""

    number: int
    time: float
    world_size: int


class Lives:
    """Takes rows in the order of the file. `members`: worker ids that take part, by the last plan."""

    def __init__(self) -> None:
        self.all: list[Life] = []
        self.generations: list[Generation] = []
        self.members: dict[str, int] = {}
        self.last_time = math.nan
        self._there: dict[str, Life] = {}  # that have not ended

    def take(self, row: dict[str, Any]) -> None:
        """Take a row; one that lacks something is left out."""
        try:
            at = float(row["time"])
            if not math.isfinite(at):
                return
            self._take(str(row["event"]), row, at)
        except (KeyError, TypeError, ValueError, AttributeError):
            return
        self.last_time = at

    @property
    def there(self) -> list[Life]:
        """Who has not ended."""
        return list(self._there.values())

    def finish(self, at: float) -> None:
        """The run is not under way: whoever was left has ended by then, epoch s."""
        for life in self.there:
            life.end(max(at, life.started), UNSEEN)
        self._there.clear()

    def restarts(self) -> dict[int, int]:
        """By rank, how often a worker of it was lost."""
        found: dict[int, int] = {}
        for life in self.all:
            if life.is_lost:
                found[life.rank] = found.get(life.rank, 0) + 1
        return found

    def invocations(self) -> dict[int, int]:
        """By rank, how often a worker of it has gone on in another invocation."""
        found: dict[int, int] = {}
        for life in self.all:
            if life.before:
                found[life.rank] = found.get(life.rank, 0) + 1
        return found

    def _take(self, event: str, row: dict[str, Any], at: float) -> None:
        if event in ("begin", "over"):
            self.finish(self.last_time if event == "begin" and not math.isnan(self.last_time) else at)
            self.members = {}
        elif event == "started":
            life = Life(str(row["worker_id"]), int(row["rank"]), at, row.get("spare") is True, str(row.get("before") or ""))
            life.warm = row.get("warm") is True
            self._add(life, at)
        elif event == "ready":
            life = self._there[str(row["worker_id"])]
            life.ready = at
            if life.worker_id not in self.members:
                life.turn_to(WAITING if life.spare else GATHERING, -1 if life.spare else life.index, at)
        elif event == "freeze":
            for worker_id, rank in self.members.items():
                if worker_id in self._there:
                    self._there[worker_id].turn_to(GATHERING, rank, at)
        elif event == "plan":
            self._plan(row, at)
        elif event == "ended":
            found = self._there.pop(str(row["worker_id"]), None)
            if found is not None:
                found.end(at, str(row["how"]))

    def _add(self, life: Life, at: float) -> None:
        life.turn_to(STARTING, -1 if life.spare else life.index, at)
        self.all.append(life)
        self._there[life.worker_id] = life

    def _plan(self, row: dict[str, Any], at: float) -> None:
        ranks = {str(worker_id): int(rank) for worker_id, rank in row["ranks"].items()}
        for worker_id in self.members.keys() - ranks.keys():
            if worker_id in self._there:
                self._there[worker_id].turn_to(WAITING, -1, at)
        for worker_id, rank in ranks.items():
            if worker_id in self._there:
                self._there[worker_id].turn_to(TRAINING, rank, at)
        self.members = ranks
        self.generations.append(Generation(int(row["generation"]), at, len(ranks)))
