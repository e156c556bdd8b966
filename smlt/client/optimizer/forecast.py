"""When a run will end and what it will have cost, from what is believed of its step times.

Step time is log-normal by belief. All phases of a run are off by the same factor, as far as can be known: the time left is then
an increasing function of one standard normal variable, and its distribution closed but for a root. Failures come on top, a
Poisson number of them, each of which costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

from smlt.client.optimizer.goals import Forecast, Goal, Phase, Standing

#: What is not believed of but happens: slow hours, a store's neighbour. Standard deviation of the log of the time left.
UNFORESEEN = 0.03
#: Before anything was seen: so many failures are expected of a whole run.
FAILURES_EXPECTED = 0.5
#: And each is noticed when its worker's heartbeat has been missing for the `--liveness` that is the default. The end of a local
#: process is seen at once.
NOTICED_S = 10.0
#: Numbers of failures beyond these together are less likely than this, and are counted as the last.
_TAIL = 1e-4
_NORMAL = NormalDist()


class LogNormal(Protocol):
    """A belief of a step's time in seconds: the mean and standard deviation of its logarithm."""

    @property
    def mean_log(self) -> float: ...

    @property
    def std_log(self) -> float: ...


@dataclass(frozen=True)
class Setbacks:
    """Failures to come: how many are expected, and what training stands still for with each, in seconds."""

    expected: float = 0.0
    each_s: float = 0.0

    def probabilities(self) -> list[float]:
        """Of 0, 1, 2, ... of them; the last stands for all above."""
        if self.expected <= 0 or self.each_s <= 0:
            return [1.0]
        found, left = [math.exp(-self.expected)], 1 - math.exp(-self.expected)
        while left > _TAIL and len(found) < 100:
            found.append(found[-1] * self.expected / len(found))
            left -= found[-1]
        return [*found[:-1], found[-1] + left]

    def reserve_s(self, least_odds: float) -> float:
        """The time to keep back for them: as many as are expected, and for one when it is likelier than `least_odds`."""
        one = 1.0 if 1 - math.exp(-self.expected) > least_odds else 0.0
        return max(self.expected, one) * self.each_s


@dataclass
class FailureHistory:
    """The failures of a run so far, and what they say of those to come.

    Their rate is a Gamma variable; before the first, half a failure in a whole run is expected. `noticed_s`: until one is.
    """

    noticed_s: float = NOTICED_S
    count: int = 0
    lost_s: float = 0.0

    def add(self, count: int, lost_s: float) -> None:
        """So many more, for which training stood still so long in all."""
        self.count += count
        self.lost_s += lost_s

    def to_come(self, elapsed_s: float, left_s: float, start_s: float) -> Setbacks:
        """Those of the next `left_s` seconds. `start_s`: what starting a worker takes, as long as nothing else is known."""
        total = elapsed_s + left_s
        expected = (FAILURES_EXPECTED + self.count) * left_s / total if total > 0 else 0.0
        return Setbacks(expected, (self.noticed_s + start_s + self.lost_s) / (1 + self.count))


class TimeLeft:
    """The distribution of the seconds until all of `phases` are done, behind a switch, with setbacks on the way.

    `beliefs`: of the step time in each of the phases.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        beliefs: Sequence[LogNormal],
        *,
        switch_s: float = 0.0,
        setbacks: Setbacks | None = None,
        unforeseen: float = UNFORESEEN,
    ) -> None:
        if len(phases) != len(beliefs):
            raise ValueError(f"{len(phases)} phases, {len(beliefs)} beliefs")
        parts: dict[tuple[float, float], int] = {}  # phases of one batch size are one part
        for phase, belief in zip(phases, beliefs, strict=True):
            if phase.steps > 0:
                key = belief.mean_log, math.hypot(belief.std_log, unforeseen)
                parts[key] = parts.get(key, 0) + phase.steps
        self._parts = [(math.log(steps) + mean, std) for (mean, std), steps in parts.items()]
        self._switch_s = switch_s
        self._setbacks = setbacks or Setbacks()
        self._odds = self._setbacks.probabilities()

    def below(self, seconds: float) -> float:
        """The probability of no more than so many seconds."""
        each = self._setbacks.each_s
        return sum(odds * self._undisturbed_below(seconds - count * each) for count, odds in enumerate(self._odds))

    def quantile_s(self, q: float) -> float:
        """What it is below with probability q, 0 < q < 1, to a part in 10,000."""
        low = self._switch_s + self._seconds(-8.0)
        high = self._switch_s + self._seconds(8.0) + len(self._odds) * self._setbacks.each_s
        while high - low > 1e-4 * high and high > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if self.below(middle) < q else (low, middle)
        return high

    def _seconds(self, z: float) -> float:
        return sum(math.exp(mean + std * z) for mean, std in self._parts)

    def _undisturbed_below(self, seconds: float) -> float:
        seconds -= self._switch_s
        if not self._parts or seconds <= 0 or seconds == math.inf:
            return 1.0 if seconds >= 0 and (not self._parts or seconds == math.inf) else 0.0
        return _NORMAL.cdf(self._z(math.log(seconds)))

    def _z(self, log_s: float) -> float:
        """Where the time left is this, by Newton's method: its logarithm is convex in z and nearly straight."""
        if len(self._parts) == 1:
            mean, std = self._parts[0]
            return (log_s - mean) / std if std > 0 else math.copysign(math.inf, log_s - mean)
        z = 0.0
        for _ in range(50):
            terms = [(math.exp(mean + std * z), std) for mean, std in self._parts]
            total = sum(term for term, _ in terms)
            slope = sum(term * std for term, std in terms) / total
            if slope <= 0:
                return math.copysign(math.inf, log_s - math.log(total))
            step = (log_s - math.log(total)) / slope
            z = min(max(z + step, -40.0), 40.0)
            if abs(step) < 1e-9 or abs(z) == 40.0:
                break
        return z


def limit_s(standing: Standing, usd_per_s: float, goal: Goal) -> float:
    """The most seconds that may still pass for the goal to be kept; below 0 when it is missed already."""
    most = math.inf
    if goal.deadline_s is not None:
        most = goal.deadline_s - standing.elapsed_s
    if goal.budget_usd is not None:
        left = goal.budget_usd - standing.spent_usd
        most = min(most, left / usd_per_s if usd_per_s > 0 else math.copysign(math.inf, left))
    return most


def forecast(
    beliefs: Sequence[LogNormal],
    standing: Standing,
    usd_per_s: float,
    goal: Goal,
    switch_s: float = 0.0,
    setbacks: Setbacks | None = None,
    *,
    unforeseen: float = UNFORESEEN,
) -> Forecast:
    """How a run ends that goes over to a choice (in `switch_s`) and stays there until all of `standing.left` is done.

    `beliefs`: of its step time in each phase of `standing.left`; ends of epochs and re-invocations are in them, as in what was
    observed. `seconds` and `usd` are medians. What stands still costs as much as what runs.
    """
    left = TimeLeft(standing.left, beliefs, switch_s=switch_s, setbacks=setbacks, unforeseen=unforeseen)
    low, middle, high = (left.quantile_s(q) for q in (0.05, 0.5, 0.95))
    return Forecast(
        seconds=standing.elapsed_s + middle,
        seconds_low=standing.elapsed_s + low,
        seconds_high=standing.elapsed_s + high,
        usd=standing.spent_usd + usd_per_s * middle,
        usd_low=standing.spent_usd + usd_per_s * low,
        usd_high=standing.spent_usd + usd_per_s * high,
        odds=left.below(limit_s(standing, usd_per_s, goal)),
    )
