"""How long a round of training is, behind which the controller is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smlt.client.optimizer.goals import Goal, Standing
from smlt.errors import ConfigError

#: A round is usually as long, and has at least so many steps; with much left to do it is this part of it.
ROUND_S, ROUND_STEPS, PART_USUAL = 60.0, 20, 0.02
#: The first round of a choice is shorter by this factor, and has half as many steps: it teaches the most.
FIRST_PART, FIRST_STEPS_PART = 0.25, 0.5
#: However long steps take, a mean of fewer tells nothing.
STEPS_MIN = 3
#: A round is no longer than this part of what is left of the time and the money, so that there is always time to act; parts of
#: the whole deadline or budget below the second are not worth asking for.
PART_MOST, PART_LEAST = 0.1, 0.005
#: Until so much of the deadline or budget is gone rounds are shorter still: what cannot be kept is said within it.
EARLY, EARLY_PART = 0.1, 0.015


@dataclass(frozen=True)
class RoundLength:
    """`seconds` and `steps`: of a usual round. ConfigError when there are none."""

    seconds: float = ROUND_S
    steps: int = ROUND_STEPS

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.steps < 1:
            raise ConfigError(f"a round of {self.seconds} s and {self.steps} steps is none")

    def is_over(self, steps: int, seconds: float, *, first: bool, left_s: float, most_s: float) -> bool:
        """Whether a round of so many steps in so many seconds is enough.

        `first`: of its choice. `left_s`: of the run, as is forecast. `most_s`: no round is longer, be its mean less sure.
        """
        if steps < STEPS_MIN:
            return False
        usual_s = FIRST_PART * self.seconds if first else max(self.seconds, PART_USUAL * left_s)
        enough = self.steps * (FIRST_STEPS_PART if first else 1.0)
        return (steps >= enough and seconds >= usual_s) or seconds >= most_s

    def trial_s(self, step_s: float) -> float:
        """How long a round of a choice that is only tried will be."""
        return max(FIRST_PART * self.seconds, FIRST_STEPS_PART * self.steps * step_s)


def longest_s(goal: Goal, standing: Standing, usd_per_s: float) -> float:
    """No round is longer, in seconds, for there to be time and money to act."""
    most = math.inf
    if goal.deadline_s is not None:
        most = goal.deadline_s * _part(standing.elapsed_s / goal.deadline_s)
    if goal.budget_usd is not None:
        most = min(most, goal.budget_usd * _part(standing.spent_usd / goal.budget_usd) / max(usd_per_s, 1e-12))
    return most


def _part(gone: float) -> float:
    """The part of a deadline or a budget that a round may take when so much of it is gone."""
    return EARLY_PART if gone < EARLY else max(PART_MOST * (1 - gone), PART_LEAST)
