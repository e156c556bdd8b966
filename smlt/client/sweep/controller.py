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

    What a rung will take is a start and its epochs. Both are known from the trial's own earlier rungs; of one that has not
    begun the longest is assumed that any has taken. What a second costs is known likewise.

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

    def ended(self, number: int, now_s: float, start_s: float = 0.0) -> None:
        """Its job has ended; `start_s`: what starting and ending took of it. Call it before `halving.finish` and the like."""
        trial = self.halving.trials[number]
        trial.seconds += now_s - self._began.pop(number)[0]
        trial.start_seconds += start_s
        trial.starts += 1

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
        """Whether there is time and money for its rung, and for those behind it."""
        limits, rungs = self.limits, self.halving.rungs[trial.rung :]
        seconds, usd_per_s = self._seconds(trial, rungs), self._usd_per_s(trial)
        if now_s >= limits.deadline_s or now_s + seconds > limits.deadline_s:  # nan is never above: nothing is known yet
            return False
        if limits.budget_usd == math.inf:
            return True
        if math.isnan(seconds) or math.isnan(usd_per_s):  # one trial alone shall tell
            return not self.halving.running() and self.spent_usd < limits.budget_usd
        promised = sum(self._still_to_spend(one) for one in self.halving.running())
        return self.spent_usd + promised + seconds * usd_per_s <= limits.budget_usd

    def _still_to_spend(self, trial: Trial) -> float:
        """What a running trial will have spent at its rung's end, less what it has."""
        usd = self._seconds(trial, (self.halving.rungs[trial.rung],)) * self._usd_per_s(trial)
        if math.isnan(usd):
            return self.limits.budget_usd  # who knows
        return max(0.0, usd - (trial.usd - self._began[trial.number][1]))

    def _seconds(self, trial: Trial, rungs: tuple[int, ...]) -> float:
        """How long it will take to come to the end of the last of these rungs; nan: nothing is known."""
        known = [trial] if trial.epochs else [one for one in self.halving.trials.values() if one.epochs and one.starts]
        start = max((one.start_seconds / one.starts for one in known), default=math.nan)
        epoch = max(((one.seconds - one.start_seconds) / one.epochs for one in known), default=math.nan)
        return len(rungs) * start + (rungs[-1] - trial.epochs) * epoch

    def _usd_per_s(self, trial: Trial) -> float:
        """What a second of it costs; nan: nothing is known. Without the rung under way, whose seconds are not counted yet."""
        known = [trial] if trial.epochs else [one for one in self.halving.trials.values() if one.epochs]
        return max((self._usd_before(one) / one.seconds for one in known if one.seconds), default=math.nan)

    def _usd_before(self, trial: Trial) -> float:
        return self._began[trial.number][1] if trial.number in self._began else trial.usd
