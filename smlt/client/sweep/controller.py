"""What a sweep does next: a trial's rung that fits into slots, time and money. Pure: clock and costs are told to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smlt.client.sweep.halving import Halving, Trial


@dataclass(frozen=True)
class Limits:
    """What all trials share. `slots`: how many run at once; `deadline_s`: of the sweep, from its beginning; `budget_usd`."""

    slots: int
    deadline_s: float = math.inf
    budget_usd: float = math.inf


@dataclass(frozen=True)
class Job:
    """Train this trial on, until it has so many epochs behind it."""

    number: int
    epochs: int


class Controller:
    """Gives out jobs. `spent_usd` of what it is told is the whole sweep's.

    What a rung will take is known from the trial's own earlier rungs, by epoch; of one that has not begun the most is assumed
    that an epoch of any has taken. Starts are in these figures, and weigh less in later rungs: estimates are high rather
    than low.

    A job must fit together with what it takes to bring one trial from its end through the last rung: a sweep that ends with all
    its money spent on beginners would have found nothing.
    """

    def __init__(self, halving: Halving, limits: Limits) -> None:
        self.halving, self.limits = halving, limits
        self._began: dict[int, tuple[float, float]] = {}  # by number: seconds and its own USD when its rung began

    def next_job(self, now_s: float) -> Job | None:
        """The job to begin now; None: wait for one to end, or `halving.complete`. `now_s` since the sweep began.

        When nothing runs, and nothing of what waits fits, it is left out, which lets its rung decide.
        """
        halving = self.halving
        while len(halving.running()) < self.limits.slots:
            waiting = halving.waiting()
            for trial in waiting:
                if self._fits(trial, now_s):
                    halving.begin(trial.number)
                    self._began[trial.number] = (now_s, trial.usd)
                    return Job(trial.number, halving.rungs[trial.rung])
            if halving.running() or not waiting:
                return None
            # The rung that is furthest: those behind it may fit when it has decided, and it is not for them to wait.
            furthest = waiting[0].rung
            halving.leave_out([trial.number for trial in waiting if trial.rung == furthest])
        return None

    def ended(self, number: int, now_s: float) -> None:
        """Its job has ended, however: call it before `halving.finish`, `fail` or `put_back`."""
        self.halving.trials[number].seconds += now_s - self._began.pop(number)[0]

    def exhausted(self, now_s: float) -> str:
        """Which limit has been reached, so that everything is to stop: "deadline", "budget" or ""."""
        if now_s >= self.limits.deadline_s:
            return "deadline"
        return "budget" if self.spent_usd >= self.limits.budget_usd else ""

    @property
    def spent_usd(self) -> float:
        """By all trials so far."""
        return sum(trial.usd for trial in self.halving.trials.values())

    def _fits(self, trial: Trial, now_s: float) -> bool:
        end = self.halving.rungs[trial.rung]
        here, then = end - trial.epochs, self.halving.rungs[-1] - end
        seconds, usd = self._per_epoch(trial)
        if not math.isnan(seconds):
            if now_s + (here + then) * seconds > self.limits.deadline_s:
                return False
        elif now_s >= self.limits.deadline_s:
            return False
        if self.limits.budget_usd == math.inf:
            return True
        if math.isnan(usd):  # nothing is known: one trial alone shall tell
            return not self.halving.running() and self.spent_usd < self.limits.budget_usd
        promised = sum(self._still_to_spend(one) for one in self.halving.running())
        return self.spent_usd + promised + (here + then) * usd <= self.limits.budget_usd

    def _still_to_spend(self, trial: Trial) -> float:
        """What a running trial will have spent at its rung's end, less what it has."""
        usd = self._per_epoch(trial)[1]
        if math.isnan(usd):
            return self.limits.budget_usd  # who knows
        return max(0.0, (self.halving.rungs[trial.rung] - trial.epochs) * usd - (trial.usd - self._began[trial.number][1]))

    def _per_epoch(self, trial: Trial) -> tuple[float, float]:
        """Seconds and USD that an epoch of this trial takes; nan: nothing is known."""
        if trial.epochs:
            return trial.seconds / trial.epochs, self._usd_of_finished(trial) / trial.epochs
        known = [one for one in self.halving.trials.values() if one.epochs]
        return (
            max((one.seconds / one.epochs for one in known), default=math.nan),
            max((self._usd_of_finished(one) / one.epochs for one in known), default=math.nan),
        )

    def _usd_of_finished(self, trial: Trial) -> float:
        """Without the rung under way, whose epochs are not counted yet."""
        return self._began[trial.number][1] if trial.number in self._began else trial.usd
