"""What each choice is worth next: staying, going over to a better one, or trying one that may be better."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from smlt.client.optimizer.acquisition import Array, Outlook, improvement, price_of_trying
from smlt.client.optimizer.goals import Standing
from smlt.client.optimizer.optimizer import PerformanceOptimizer, Suggestion
from smlt.client.optimizer.space import Choice

#: A choice is taken when deadline and budget are kept with these odds; before the first round, which will teach much, with the second.
SURE, SURE_AT_START = 0.95, 0.8
#: What is not believed of but happens: a worker lost, a slow hour. Standard deviation of the log of the time left.
UNFORESEEN = 0.03
#: A change must promise this part of what is left; less is within what the model leaves out.
WORTH_WHILE = 0.001
#: Below these odds a goal is out of reach, and the choice that comes nearest is taken.
HOPELESS = 0.5


@dataclass(frozen=True)
class Appraisal:
    """Of all choices, arrays of shape (n,). `scores`: the highest is to be chosen. `best`: the one to settle for as things stand.

    `gain`, `price`: of trying, as in Suggestion. `odds`: that the goal is kept by going there and staying. `needed`: odds asked for.
    """

    outlook: Outlook
    scores: Array
    best: int
    gain: Array
    price: Array
    odds: Array
    needed: float


def appraise(
    optimizer: PerformanceOptimizer, current: Choice | None, standing: Standing, round_s: float, step: tuple[Array, Array]
) -> Appraisal:
    """Weigh all choices. `step`: means and standard deviations of log step time with the next batch, shapes (n,)."""
    outlook = _outlook(optimizer, current, standing, step)
    odds = outlook.odds(outlook.most_s(), unforeseen=UNFORESEEN)
    needed = SURE if optimizer.observations else SURE_AT_START
    expected = outlook.expected()
    best, reachable = _settle_for(outlook, odds, needed, expected)
    choices = optimizer.choices
    back_s = np.array([optimizer.model.switch_s(choice, choices[best]) for choice in choices])
    back_s[best] = 0.0
    heaviest = max(standing.left, key=lambda phase: phase.steps * phase.global_batch_size).global_batch_size
    covariance = optimizer.covariance(choices[best], heaviest)
    variance = np.maximum(outlook.std_log**2 + outlook.std_log[best] ** 2 - 2 * covariance, 0.0)
    gain, better = improvement(outlook, float(expected[best]), np.sqrt(variance), outlook.most_s())
    price = (1 - better) * price_of_trying(outlook, best, round_s, back_s)
    gain[best] = price[best] = 0.0

    worth = WORTH_WHILE * _left(outlook, best, expected)
    scores = gain - price - worth
    scores[~_safe(outlook, round_s, back_s, odds, needed)] = -np.inf
    scores[best] = 0.0
    if current in optimizer.index and reachable:  # to stay is worth a little that is not sure to be gained
        here = optimizer.index[current]
        if here != best and odds[here] >= min(needed, odds[best]):
            scores[here] = expected[best] - expected[here] + worth
    return Appraisal(outlook, scores, best, gain, price, odds, needed)


def _outlook(
    optimizer: PerformanceOptimizer, current: Choice | None, standing: Standing, step: tuple[Array, Array]
) -> Outlook:
    """Phases of one batch size take step times that are believed together: their log-normals are added as if fully correlated."""
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
    return Outlook(
        optimizer.goal, standing.elapsed_s, standing.spent_usd, mean_log, std_log, optimizer.usd_per_s, switch_s
    )


def _settle_for(outlook: Outlook, odds: Array, needed: float, expected: Array) -> tuple[int, bool]:
    """The choice to take if nothing more were to be learnt, and whether the goal is within reach with it."""
    most = float(odds.max())
    if most >= HOPELESS:  # where no choice is sure, those that are nearly as likely as the likeliest are as good
        allowed = odds >= min(needed, most - 0.02)
        return int(np.where(allowed, expected, np.inf).argmin()), True
    seconds = outlook.switch_s + outlook.expected_s
    if outlook.goal.budget_usd is None:
        return int(seconds.argmin()), False
    usd = seconds * outlook.usd_per_s
    if outlook.goal.deadline_s is None:
        return int(usd.argmin()), False
    # both: the one that exceeds the one or the other by the smallest factor
    late = (outlook.elapsed_s + seconds) / outlook.goal.deadline_s
    return int(np.maximum(late, (outlook.spent_usd + usd) / outlook.goal.budget_usd).argmin()), False


def _left(outlook: Outlook, best: int, expected: Array) -> float:
    """What of the objective is still to come."""
    so_far = outlook.objective(np.array(outlook.elapsed_s), np.array(outlook.spent_usd))
    return max(float(expected[best] - so_far), 0.0)


def _safe(outlook: Outlook, round_s: float, back_s: Array, odds: Array, needed: float) -> Array:
    """Where a round may be tried: with all of it lost, the safest choice still keeps the goal."""
    if outlook.goal.deadline_s is None and outlook.goal.budget_usd is None:
        return np.ones(len(odds), dtype=bool)
    refuge = int(odds.argmax())
    lost_s = outlook.switch_s + round_s + np.maximum(back_s, outlook.switch_s[refuge])
    lost_usd = lost_s * np.maximum(outlook.usd_per_s, outlook.usd_per_s[refuge])
    most = np.full(len(odds), np.inf)
    if outlook.goal.deadline_s is not None:
        most = np.minimum(most, outlook.goal.deadline_s - outlook.elapsed_s - lost_s)
    if outlook.goal.budget_usd is not None:
        rate = max(float(outlook.usd_per_s[refuge]), 1e-12)
        most = np.minimum(most, (outlook.goal.budget_usd - outlook.spent_usd - lost_usd) / rate)
    std = np.hypot(outlook.std_log[refuge], UNFORESEEN)
    from scipy.special import ndtr

    return np.asarray(ndtr((np.log(np.maximum(most, 1e-12)) - outlook.mean_log[refuge]) / std) >= needed)


def in_words(optimizer: PerformanceOptimizer, made: Appraisal, found: int, current: Choice | None) -> Suggestion:
    """The suggestion to take choice number `found`, with its reason."""
    choice, outlook = optimizer.choices[found], made.outlook
    expected = outlook.expected()
    seconds = float(outlook.switch_s[found] + outlook.expected_s[found])
    usd = float(optimizer.usd_per_s[found] * seconds)
    ahead = f"{seconds:,.0f} s and {usd:.4g} USD left"
    limits = [name for name, limit in (("deadline", outlook.goal.deadline_s), ("budget", outlook.goal.budget_usd)) if limit]
    if limits and made.odds[made.best] < HOPELESS:
        nearest = {"deadline": "the fastest", "budget": "the cheapest", "deadline and budget": "what comes nearest"}
        goal = " and ".join(limits)
        why = f"the {goal} cannot be kept (odds {made.odds[made.best]:.0%}): {choice} is {nearest[goal]}, {ahead}"
    elif limits:
        why = f"{ahead} with {choice}, {' and '.join(limits)} kept with odds of {made.odds[found]:.0%}"
    else:
        why = f"{ahead} with {choice}"
    if choice == current:
        return Suggestion(choice, "stay", 0.0, 0.0, why)
    here = optimizer.index.get(current) if current is not None else None
    if found == made.best:
        gain = float(expected[here] - expected[found]) if here is not None else 0.0
        return Suggestion(choice, "exploit", max(gain, 0.0), 0.0, why)
    gain, price = float(made.gain[found]), float(made.price[found])
    return Suggestion(
        choice, "explore", gain, price, f"a round of {choice} may gain {_amount(outlook, gain)} for {_amount(outlook, price)}: {why}"
    )


def _amount(outlook: Outlook, value: float) -> str:
    if outlook.goal.deadline_s is not None:
        return f"{value:.3g} USD"
    return f"{value:.3g} s" if outlook.goal.budget_usd is not None else f"{value:.3g} s·USD"
