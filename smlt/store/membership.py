"""How the workers of a job and its scheduler agree on who takes part: freeze, acknowledge, resume. Pure transitions, no I/O.

A *generation* is one version of the membership. When it must change (a worker died, another number is wanted, the store
has lost its data) the scheduler freezes: it opens generation g + 1, which wakes and fences everyone of g. Each worker
*acknowledges* g + 1 with its position. When all expected ones have, the scheduler publishes the *plan*: ranks, the
position to go on from, who completes the step under way from the store, who takes the donor's snapshot. `docs/reliability.md`
states the actions; `tests/model/` runs this very code through all interleavings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from smlt.errors import ConfigError

#: Phases of a position.
COMMITTED, SHARED, EPOCH_ENDED = 0, 1, 2


@dataclass(frozen=True, order=True)
class Position:
    """How far a worker's state is: global steps committed and, at the end of an epoch, how much of that end is done."""

    step: int
    phase: int = COMMITTED


@dataclass(frozen=True)
class Ack:
    """A worker's answer to a freeze. `position` is None when it has no state yet.

    `finishing`: it has sent all it has to send for step `position.step` + 1, so that another worker may have completed it.
    """

    worker_id: str
    position: Position | None = None
    finishing: bool = False

    def can_finish(self, position: Position) -> bool:
        """Whether completing what is under way brings the worker to `position`."""
        return self.finishing and self.position is not None and position == Position(self.position.step + 1)


@dataclass(frozen=True)
class Plan:
    """A generation's membership and where it goes on."""

    generation: int
    ranks: Mapping[str, int] = field(hash=False)  # by worker id: 0 ... n - 1
    position: Position | None  # None: from the newest checkpoint if `resume`, else from the beginning
    donor: int | None  # rank that gives a snapshot of its state, after it has finished itself; None: nobody needs one
    finish: tuple[int, ...] = ()  # ranks that complete their step from the store
    restore: tuple[int, ...] = ()  # ranks that take the donor's snapshot
    resume: bool = False

    @property
    def world_size(self) -> int:
        """How many workers take part."""
        return len(self.ranks)

    def to_json(self) -> str:
        """The plan as the store keeps it."""
        place = None if self.position is None else [self.position.step, self.position.phase]
        return json.dumps(
            {
                "generation": self.generation,
                "ranks": dict(self.ranks),
                "position": place,
                "donor": self.donor,
                "finish": self.finish,
                "restore": self.restore,
                "resume": self.resume,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan in `text`. ConfigError when it is none."""
        try:
            row: dict[str, Any] = json.loads(text)
            place = row["position"]
            return cls(
                int(row["generation"]),
                {str(name): int(rank) for name, rank in row["ranks"].items()},
                None if place is None else Position(int(place[0]), int(place[1])),
                None if row["donor"] is None else int(row["donor"]),
                tuple(int(rank) for rank in row["finish"]),
                tuple(int(rank) for rank in row["restore"]),
                bool(row["resume"]),
            )
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(f"what the store holds as the job's plan is none: {error!r}") from error


class Move(Enum):
    """What a worker does with a plan."""

    LEAVE = "leave"  # it is not among the ranks
    GO_ON = "go on"  # its state is where the plan begins
    FINISH = "finish"  # it completes its step from the store first
    RESTORE = "restore"  # it takes the donor's snapshot
    BEGIN = "begin"  # all begin: from the newest checkpoint or the beginning


def move_for(plan: Plan, ack: Ack) -> Move:
    """What the worker that acknowledged with `ack` does."""
    rank = plan.ranks.get(ack.worker_id)
    if rank is None:
        return Move.LEAVE
    if plan.position is None:
        return Move.BEGIN
    if rank in plan.restore:
        return Move.RESTORE
    return Move.FINISH if rank in plan.finish else Move.GO_ON


class Coordinator:
    """The scheduler's side: which generation it is, who is expected, who has acknowledged.

    It needs no store: after one came back empty, the scheduler says again what it knows, in a newer generation.
    """

    def __init__(self, generation: int = 0) -> None:
        self.generation = generation
        self.plan: Plan | None = None  # the one in force; None from a freeze until the next plan
        self.ranks: dict[str, int] = {}  # of the last plan
        self.expected: list[str] = []
        self.acks: dict[str, Ack] = {}
        self.committed = 0  # the newest step that any worker has reported: it is not undone

    def freeze(self, expected: Iterable[str], successors: Mapping[str, str] | None = None) -> int:
        """Open the next generation for these workers; returns its number.

        `successors`: new names, by the names before, of workers that go on under another one.
        """
        self.generation += 1
        names = successors or {}
        self.ranks = {names.get(worker_id, worker_id): rank for worker_id, rank in self.ranks.items()}
        self.plan, self.acks = None, {}
        self.expected = list(dict.fromkeys(expected))
        return self.generation

    def acknowledge(self, generation: int, ack: Ack) -> bool:
        """Take an acknowledgement; False when it is of another generation, or of nobody who is expected."""
        if generation != self.generation or self.plan is not None or ack.worker_id not in self.expected:
            return False
        self.acks[ack.worker_id] = ack
        if ack.position is not None:
            self.reported(ack.position.step)
        return True

    def reported(self, step: int) -> None:
        """A worker has said that it has committed `step`."""
        self.committed = max(self.committed, step)

    def missing(self) -> list[str]:
        """Who is still to acknowledge."""
        return [worker_id for worker_id in self.expected if worker_id not in self.acks]

    def replace(self, worker_id: str, by: str | None) -> None:
        """While frozen: another worker takes the place of one that died, or nobody does.

        Its acknowledgement goes with it: what it alone had is lost, what it wrote is in the store.
        """
        place = self.expected.index(worker_id)
        self.expected[place : place + 1] = [] if by is None else [by]
        self.acks.pop(worker_id, None)

    def rename(self, worker_id: str, new: str) -> None:
        """While frozen: a worker goes on under another name, and will acknowledge by it."""
        self.expected[self.expected.index(worker_id)] = new
        self.acks.pop(worker_id, None)
        if worker_id in self.ranks:
            self.ranks[new] = self.ranks.pop(worker_id)

    def make_plan(self, resume: bool) -> Plan | None:
        """The plan, when everyone who is expected has acknowledged; in force from then on.

        `resume`: there may be a checkpoint to begin from when no worker has any state.
        """
        if self.plan is not None or not self.expected or self.missing():
            return None
        ranks = self._ranks()
        by_rank = {ranks[worker_id]: self.acks[worker_id] for worker_id in self.expected}
        position, finishers = self._position(by_rank)
        if position is None:
            plan = Plan(self.generation, ranks, None, None, resume=resume)
        else:
            there = [rank for rank, ack in sorted(by_rank.items()) if ack.position == position]
            restore = [rank for rank in sorted(by_rank) if rank not in there and rank not in finishers]
            donor = (there or finishers)[0] if restore else None
            plan = Plan(self.generation, ranks, position, donor, tuple(finishers), tuple(restore))
        self.plan, self.ranks = plan, ranks
        self.committed = max(self.committed, position.step) if position is not None else 0
        return plan

    def _ranks(self) -> dict[str, int]:
        """Who stays keeps its rank where it can: its samples and its own state hang on it."""
        size = len(self.expected)
        ranks = {w: self.ranks[w] for w in self.expected if self.ranks.get(w, size) < size}
        free = iter(sorted(set(range(size)) - set(ranks.values())))
        return {w: ranks[w] if w in ranks else next(free) for w in self.expected}

    def _position(self, by_rank: Mapping[int, Ack]) -> tuple[Position | None, list[int]]:
        """Where to go on, and who has to complete a step to get there: never behind what anyone here has committed."""
        known = [ack.position for ack in by_rank.values() if ack.position is not None]
        if not known:
            return None, []
        newest = max(known)
        one_on = Position(newest.step + 1)
        # Whoever committed and reported that step is gone; since it had completed, its aggregates are in the store.
        if self.committed == one_on.step and any(ack.can_finish(one_on) for ack in by_rank.values()):
            newest = one_on
        return newest, [rank for rank, ack in sorted(by_rank.items()) if ack.can_finish(newest)]
