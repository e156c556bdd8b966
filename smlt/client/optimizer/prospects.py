"""What each choice promises for a goal: the odds that it is kept by going there and staying, the time and the cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smlt.client.optimizer.forecast import Setbacks, TimeLeft, limit_s
from smlt.client.optimizer.goals import Goal, Standing
from smlt.client.optimizer.optimizer import Belief, PerformanceOptimizer
from smlt.client.optimizer.space import Choice

#: With these odds a goal is as good as kept.
SURE = 0.95
#: Below these odds with the best of all choices a goal cannot be kept.
HOPELESS = 0.02
#: Where a step time is less certain than this, it is taken as twice as uncertain before a choice is called hopeless: far from
#: what was observed, what is believed is the model's.
VAGUE_STD_LOG = 0.12


@dataclass(frozen=True)
class Prospect:
    """A choice, the odds that the goal is kept by going there and staying, and what is expected of the run in all.

    `hoped`: the highest odds there are if every step time is twice as uncertain. `not_excluded`: the same, but only where it is
    vague, before a choice is called hopeless.
    """

    choice: Choice
    odds: float
    hoped: float
    not_excluded: float
    seconds: float
    usd: float

    def excess(self, goal: Goal) -> float:
        """By which factor the goal is exceeded, the worse of time and money; 0 without a goal."""
        late = self.seconds / goal.deadline_s if goal.deadline_s is not None else 0.0
        return max(late, self.usd / goal.budget_usd if goal.budget_usd is not None else 0.0)


def objective(goal: Goal, seconds: float, usd: float) -> float:
    """What a goal wants least of, beside being kept: money in time, time for money, or both at once."""
    if goal.deadline_s is not None:
        return usd
    return seconds if goal.budget_usd is not None else seconds * usd


def prospects_of(
    optimizer: PerformanceOptimizer,
    goal: Goal,
    current: Choice | None,
    standing: Standing,
    setbacks_in: Callable[[float], Setbacks],
) -> list[Prospect]:
    """Of every choice that can work. `setbacks_in`: those to come in so many seconds."""
    model, found = optimizer.model, []
    batches = {phase.global_batch_size for phase in standing.left}
    believed = {batch: optimizer.believed(optimizer.choices, batch) for batch in batches}
    for i, choice in enumerate(optimizer.choices):
        by_batch = {batch: Belief(float(mean[i]), float(std[i])) for batch, (mean, std) in believed.items()}
        beliefs = [by_batch[phase.global_batch_size] for phase in standing.left]
        steps_s = sum(phase.steps * belief.median_s for phase, belief in zip(standing.left, beliefs, strict=True))
        switch_s = 0.0 if choice == current else model.switch_s(current, choice)
        setbacks, rate = setbacks_in(steps_s), model.usd_per_s(choice)
        most_s = limit_s(standing, rate, goal)
        odds = TimeLeft(standing.left, beliefs, switch_s=switch_s, setbacks=setbacks).below(most_s)
        hoped, vague = odds, max(belief.std_log for belief in beliefs) > VAGUE_STD_LOG
        if odds < SURE:
            wide = [Belief(belief.mean_log, 2 * belief.std_log) for belief in beliefs]
            hoped = max(odds, TimeLeft(standing.left, wide, switch_s=switch_s, setbacks=setbacks).below(most_s))
        left_s = switch_s + steps_s + setbacks.expected * setbacks.each_s
        found.append(
            Prospect(
                choice, odds, hoped, hoped if vague else odds, standing.elapsed_s + left_s, standing.spent_usd + rate * left_s
            )
        )
    return found


def likeliest(prospects: Sequence[Prospect], goal: Goal) -> Prospect:
    """With which the goal is likeliest kept; where that is as good as hopeless with all, what comes nearest to it."""
    best = max(prospects, key=lambda one: (one.odds, -one.excess(goal)))
    return best if best.odds >= HOPELESS else min(prospects, key=lambda one: one.excess(goal))
