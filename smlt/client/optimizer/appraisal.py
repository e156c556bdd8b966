"""What each choice is worth next: staying, going over to a better one, or trying one that may be better."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from smlt.client.optimizer.acquisition import Array, Outlook, improvement, learnt, price_of_trying
from smlt.client.optimizer.goals import Goal, Standing, duration_text
from smlt.client.optimizer.optimizer import PerformanceOptimizer, Suggestion
from smlt.client.optimizer.space import Choice

#: A choice is taken when deadline and budget are kept with these odds; before the first round, which will teach much, with the
#: second.
SURE, SURE_AT_START = 0.95, 0.8
#: A change must promise this part of what is left; less is within what the model leaves out.
WORTH_WHILE = 0.001
#: Below these odds a goal is out of reach, and the choice that comes nearest is taken.
HOPELESS = 0.5


@dataclass(frozen=True)
class Appraisal:
    """Of all choices, arrays of shape (n,). `scores`: the highest is chosen. `best`: the one to settle for as things stand.

    `gain`, `price`: of trying, as in Suggestion. `odds`: that the goal is kept by going there and staying. `reachable`: some
    choice is likely to. If none is, `outlook`'s goal is to come near it.
    """

    outlook: Outlook
    scores: Array
    best: int
    gain: Array
    price: Array
    odds: Array
    reachable: bool


def appraise(
    optimizer: PerformanceOptimizer, current: Choice | None, standing: Standing, round_s: float, step: tuple[Array, Array]
) -> Appraisal:
    """Weigh all choices. `step`: means and standard deviations of log step time with the next batch, shapes (n,)."""
    outlook = _outlook(optimizer, current, standing, step)
    odds = outlook.odds(outlook.most_s())
    most, noise = float(odds.max()), optimizer.noise
    if most < HOPELESS:
        outlook = replace(outlook, goal=_nearest(outlook))
        allowed, safe, keeps = np.ones(len(odds), dtype=bool), np.ones(len(odds), dtype=bool), np.ones_like(odds)
    else:  # where no choice is sure, those that are nearly as likely as the likeliest are as good
        needed = min(SURE if optimizer.observations else SURE_AT_START, most - 0.02)
        allowed, safe = odds >= needed, _safe(outlook, round_s, odds, min(needed, most - 0.05))
        keeps = outlook.odds_to_be_sure(outlook.most_s(), needed, noise)
    expected = outlook.expected()
    best = int(np.where(allowed, expected, np.inf).argmin())
    choices = optimizer.choices
    back_s = np.array([optimizer.model.switch_s(choice, choices[best]) for choice in choices])
    back_s[best] = 0.0
    heaviest = max(standing.left, key=lambda phase: phase.steps * phase.global_batch_size).global_batch_size
    covariance = optimizer.covariance(choices[best], heaviest)
    gain, better = improvement(outlook, float(expected[best]), learnt(outlook.std_log, covariance, noise))
    gain, better = gain * keeps, better * keeps
    price = (1 - better) * price_of_trying(outlook, best, round_s, back_s)
    gain[best] = _worth_knowing(outlook, best, np.where(allowed, expected, np.inf), covariance, noise)
    price[best] = 0.0

    worth = WORTH_WHILE * _left(outlook, best, expected)
    scores = gain - price - worth
    scores[~safe] = -np.inf
    scores[best] = gain[best]
    if current is None and not optimizer.observations:  # as the model says; where it says nothing, the seed decides
        scores = np.where(allowed, -expected, -np.inf)
    if current in optimizer.index:  # to stay is worth a little that is not sure to be gained
        here = optimizer.index[current]
        if here != best and allowed[here]:
            scores[here] = max(scores[here], expected[best] - expected[here] + worth)
    return Appraisal(outlook, scores, best, gain, price, odds, most >= HOPELESS)


def _outlook(optimizer: PerformanceOptimizer, current: Choice | None, standing: Standing, step: tuple[Array, Array]) -> Outlook:
    """What is left. Step times with several batch sizes are believed together: added as if their errors were one."""
    steps: Counter[int] = Counter()
    for phase in standing.left:
        steps[phase.global_batch_size] += max(phase.steps, 1)
    parts = []
    for batch, count in steps.items():
        mean, std = step if batch == standing.left[0].global_batch_size else optimizer.believed(optimizer.choices, batch)
        parts.append((np.log(count) + mean, std))
    mean_log = np.logaddexp.reduce([mean for mean, _ in parts])
    std_log = sum((np.exp(mean - mean_log) * std for mean, std in parts), np.zeros_like(mean_log))
    switch_s = np.array([optimizer.model.switch_s(current, choice) for choice in optimizer.choices])
    if current in optimizer.index:
        switch_s[optimizer.index[current]] = 0.0
    return Outlook(optimizer.goal, standing.elapsed_s, standing.spent_usd, mean_log, std_log, optimizer.usd_per_s, switch_s)


def _nearest(outlook: Outlook) -> Goal:
    """What to strive for when the goal is out of reach: least time for a deadline, least cost for a budget.

    For both: that by which the choice that comes nearest to keeping both exceeds the more.
    """
    deadline_s, budget_usd = outlook.goal.deadline_s, outlook.goal.budget_usd
    least_time, least_cost = Goal(budget_usd=np.inf), Goal(deadline_s=np.inf)
    if deadline_s is None or budget_usd is None:
        return least_time if budget_usd is None else least_cost
    seconds = outlook.switch_s + outlook.expected_s
    late = (outlook.elapsed_s + seconds) / deadline_s
    dear = (outlook.spent_usd + seconds * outlook.usd_per_s) / budget_usd
    nearest = int(np.maximum(late, dear).argmin())
    return least_time if late[nearest] > dear[nearest] else least_cost


def _worth_knowing(outlook: Outlook, best: int, expected: Array, covariance: Array, noise: float) -> float:
    """What a round of the best choice is worth beyond its steps: it may show that the second best is better."""
    others = expected.copy()
    others[best] = np.inf
    second = int(others.argmin())
    if not np.isfinite(others[second]):
        return 0.0
    moved = np.zeros_like(expected)
    moved[best] = learnt(outlook.std_log, covariance[second], noise)[best]
    # E[(J - c)+] = E[(c - J)+] + E[J] - c
    gain, _ = improvement(outlook, float(expected[second]), moved)
    return max(float(gain[best] + expected[best] - expected[second]), 0.0)


def _left(outlook: Outlook, best: int, expected: Array) -> float:
    """What of the objective is still to come."""
    so_far = outlook.objective(np.array(outlook.elapsed_s), np.array(outlook.spent_usd))
    return max(float(expected[best] - so_far), 0.0)


def _safe(outlook: Outlook, round_s: float, odds: Array, needed: float) -> NDArray[np.bool_]:
    """Where a round may be tried: with all of it lost, the safest choice still keeps the goal with the odds needed."""
    refuge = int(odds.argmax())
    lost_s = outlook.switch_s + round_s + outlook.switch_s[refuge]
    lost_usd = lost_s * np.maximum(outlook.usd_per_s, outlook.usd_per_s[refuge])
    from_refuge = replace(
        outlook,
        mean_log=np.full_like(odds, outlook.mean_log[refuge]),
        std_log=np.full_like(odds, outlook.std_log[refuge]),
        usd_per_s=np.full_like(odds, outlook.usd_per_s[refuge]),
        switch_s=np.zeros_like(odds),
    )
    return np.asarray(from_refuge.odds(from_refuge.most_s(lost_s, lost_usd)) >= needed)


def in_words(optimizer: PerformanceOptimizer, made: Appraisal, found: int, current: Choice | None) -> Suggestion:
    """The suggestion to take choice number `found`, with its reason."""
    choice, outlook = optimizer.choices[found], made.outlook
    expected = outlook.expected()
    seconds = float(outlook.switch_s[found] + outlook.expected_s[found])
    usd = float(optimizer.usd_per_s[found] * seconds)
    ahead = f"{duration_text(seconds)} and {optimizer.cost_text(usd)} left"
    goal = optimizer.goal
    limits = [name for name, limit in (("deadline", goal.deadline_s), ("budget", goal.budget_usd)) if limit is not None]
    if limits and not made.reachable:
        nearest = "the fastest" if outlook.goal.budget_usd is not None else "the cheapest"
        kept = f"the {' and '.join(limits)} can hardly be kept (odds of {made.odds.max():.0%} at the most)"
        why = f"{kept}: {optimizer.choices[made.best]} is believed to be {nearest}, {ahead} with {choice}"
    elif limits:
        why = f"{ahead} with {choice}, {' and '.join(limits)} kept with odds of {made.odds[found]:.0%}"
    else:
        why = f"{ahead} with {choice}"
    if choice == current:
        return Suggestion(choice, "stay", 0.0, 0.0, why)
    here = optimizer.index.get(current) if current is not None else None
    if found == made.best or (current is None and not optimizer.observations):
        gain = float(expected[here] - expected[found]) if here is not None else 0.0
        return Suggestion(choice, "exploit", max(gain, 0.0), 0.0, why)
    gain, price, whole = float(made.gain[found]), float(made.price[found]), float(expected[made.best])
    return Suggestion(
        choice,
        "explore",
        gain,
        price,
        f"a round of {choice} may gain {_amount(optimizer, gain, whole)} for {_amount(optimizer, price, whole)}: {why}",
    )


def _amount(optimizer: PerformanceOptimizer, value: float, whole: float) -> str:
    """Of the objective: money, time, or the part of `whole` where it is their product."""
    goal = optimizer.goal
    if goal.deadline_s is not None:
        return optimizer.cost_text(value)
    return duration_text(value) if goal.budget_usd is not None else f"{value / whole:.2%} of time x cost"
