"""Successive halving: which trials go on. Pure: it knows no clock and no processes (`controller` adds time and money).

All trials train for a few epochs, the best 1/eta of them for eta times as many, and so on, until the best of all train for
the full number: K. Jamieson and A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016.

A rung decides when it is complete, so that the outcome depends on the seed alone and not on who was faster. ASHA (L. Li et
al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020) promotes from what has finished so far, which keeps
every slot busy but lets the order of the ends decide, and promotes some who would not have been among the best. Here a trial
goes on early when its promotion is certain, whatever the others will bring: the same decisions, with less waiting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from smlt.errors import CheckpointError, ConfigError

#: WAITING to begin its rung; RUNNING in it; FINISHED it and not yet decided upon; DROPPED: others were better; DONE: it has
#: finished the last rung; LEFT_OUT: there was no time or money for it.
WAITING, RUNNING, FINISHED, DROPPED, DONE, FAILED, LEFT_OUT = (
    "waiting",
    "running",
    "finished",
    "dropped",
    "done",
    "failed",
    "left out",
)
STATES = (WAITING, RUNNING, FINISHED, DROPPED, DONE, FAILED, LEFT_OUT)


@dataclass
class Trial:
    """One choice of hyper-parameters, and what has become of it. A line in trials.jsonl."""

    number: int
    hyperparameters: dict[str, Any]
    state: str = WAITING
    rung: int = 0  # that it waits for, is in, or has come to last
    values: list[float] = field(default_factory=list)  # of the metric, one for each rung that it has finished
    epochs: int = 0  # trained, as of its last finished rung
    over: bool = False  # it has ended by itself, before its rung did: it cannot get better
    seconds: float = 0.0  # of its rungs so far, starts included
    start_seconds: float = 0.0  # of these, for starting and ending: before a rung's first step and behind its last
    starts: int = 0
    usd: float = 0.0  # the whole trial so far
    error: str | None = None

    @property
    def value(self) -> float:
        """The metric at its last finished rung, nan when there is none."""
        return self.values[-1] if self.values else math.nan

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Trial:
        """A trial as it was written down. CheckpointError when it is none."""
        try:
            values = [math.nan if value is None else float(value) for value in found["values"]]
            trial = cls(**{**found, "values": values})
            known = trial.state in STATES and trial.rung >= 0 and isinstance(trial.hyperparameters, dict)
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"this is no trial of a sweep: {error}") from None
        if not known:
            raise CheckpointError(f"trial {trial.number} has a state that no trial can have: {trial.state}, rung {trial.rung}")
        return trial


def rungs_of(min_epochs: int, max_epochs: int, eta: int | None) -> tuple[int, ...]:
    """After how many epochs the rungs end: min, min·eta, min·eta², ..., max. One rung without halving (eta None).

    ConfigError for numbers that cannot work.
    """
    if eta is None:
        return (max_epochs,)
    if eta < 2:
        raise ConfigError(f"--halving {eta}: at least 2; the best 1 of {eta} goes on")
    if not 1 <= min_epochs <= max_epochs:
        raise ConfigError(f"--min-epochs {min_epochs} is not between 1 and --epochs {max_epochs}")
    rungs = [min_epochs]
    while rungs[-1] * eta < max_epochs:
        rungs.append(rungs[-1] * eta)
    return (*rungs, max_epochs) if rungs[-1] < max_epochs else tuple(rungs)


class Halving:
    """The trials of a sweep and who of them goes on. `maximize`: more of the metric is better."""

    def __init__(self, trials: Iterable[Trial], rungs: tuple[int, ...], eta: int | None, *, maximize: bool) -> None:
        self.trials = {trial.number: trial for trial in trials}
        self.rungs, self.eta, self.maximize = rungs, eta or 1, maximize
        if any(trial.rung >= len(rungs) for trial in self.trials.values()):
            raise CheckpointError("a trial has come to a rung that this sweep does not have")
        self._settle()

    def resume(self) -> None:
        """What was under way begins its rung again; what was left out waits anew, unless its rung was decided without it."""
        highest = max((trial.rung for trial in self.trials.values()), default=0)
        for trial in self.trials.values():
            if trial.state == RUNNING or (trial.state == LEFT_OUT and trial.rung == highest):
                trial.state = WAITING
        self._settle()

    @property
    def complete(self) -> bool:
        """Nobody waits or runs."""
        return not any(trial.state in (WAITING, RUNNING) for trial in self.trials.values())

    def waiting(self) -> list[Trial]:
        """Who may begin its rung now, in this order: those who have come furthest first."""
        return sorted(self._in_state(WAITING), key=lambda trial: (-trial.rung, trial.number))

    def running(self) -> list[Trial]:
        """Those in their rungs."""
        return self._in_state(RUNNING)

    def ranking(self) -> list[Trial]:
        """All trials, the best first: who has come further is better, and within a rung who has the better value."""
        return sorted(self.trials.values(), key=lambda trial: (-len(trial.values), *self._order(trial)))

    def best(self) -> Trial | None:
        """The one to train further: the best of those that have come furthest; None while none has finished a rung."""
        found = [trial for trial in self.ranking() if not math.isnan(trial.value) and trial.state != FAILED]
        return found[0] if found else None

    def begin(self, number: int) -> None:
        """Its rung has begun."""
        self._expect(number, WAITING).state = RUNNING

    def put_back(self, number: int) -> None:
        """It was stopped within its rung, and may go on from its checkpoint."""
        self._expect(number, RUNNING).state = WAITING

    def finish(self, number: int, value: float, *, over: bool = False) -> None:
        """It has finished its rung with this value of the metric; nan or inf is worse than any other.

        `over`: it has ended by itself (a target, no progress): in later rungs it stands with this value.
        """
        trial = self._expect(number, RUNNING)
        trial.values.append(value if math.isfinite(value) else math.nan)
        trial.state, trial.over, trial.epochs = FINISHED, over, self.rungs[trial.rung]
        self._settle()

    def fail(self, number: int, error: str) -> None:
        """It cannot go on."""
        trial = self._expect(number, RUNNING)
        trial.state, trial.error = FAILED, error
        self._settle()

    def leave_out(self, numbers: Iterable[int]) -> None:
        """There is no time or money for them."""
        for number in numbers:
            self._expect(number, WAITING).state = LEFT_OUT
        self._settle()

    def _in_state(self, *states: str) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state in states]

    def _expect(self, number: int, state: str) -> Trial:
        trial = self.trials[number]
        assert trial.state == state, (trial, state)
        return trial

    def _order(self, trial: Trial, rung: int = -1) -> tuple[bool, float, int]:
        """A key by which the better of two comes first; the lower number of equals."""
        value = trial.values[rung] if trial.values else math.nan
        if math.isnan(value):
            return (True, 0.0, trial.number)
        return (False, -value if self.maximize else value, trial.number)

    def _settle(self) -> None:
        """Promote and drop as far as it is certain, rung by rung."""
        for rung in range(len(self.rungs)):
            self._settle_rung(rung)

    def _settle_rung(self, rung: int) -> None:
        if rung == len(self.rungs) - 1:
            for trial in self._in_state(FINISHED):
                if trial.rung == rung:
                    trial.state = DONE
            return
        here = [t for t in self.trials.values() if t.rung >= rung and not (t.state == LEFT_OUT and t.rung == rung)]
        done = sorted((t for t in here if len(t.values) > rung), key=lambda trial: self._order(trial, rung))
        failed = sum(t.state == FAILED and len(t.values) <= rung for t in here)
        going = sum(t.state == RUNNING and t.rung == rung for t in here)
        waiting = sum(t.state == WAITING and t.rung == rung for t in here)
        # Of `entered` one in eta goes on, and no more than `undecided` can still become better. Each that is left out takes
        # one from both, and so at most one place: who is sure of a place stays so.
        entered = len(done) + failed + going + waiting
        undecided = going + waiting + self._may_come(rung)
        for place, trial in enumerate(done):
            if trial.state != FINISHED or trial.rung != rung:
                continue  # decided before
            if place + undecided < max(1, entered // self.eta) and not math.isnan(trial.values[rung]):
                self._promote(trial)
            elif not undecided:
                trial.state = DROPPED

    def _may_come(self, rung: int) -> int:
        """How many may still be promoted into this rung, at most."""
        return sum(trial.rung < rung and trial.state in (WAITING, RUNNING, FINISHED) for trial in self.trials.values())

    def _promote(self, trial: Trial) -> None:
        trial.rung += 1
        trial.state = WAITING
        if trial.over:
            trial.values.append(trial.value)
            trial.state = FINISHED
