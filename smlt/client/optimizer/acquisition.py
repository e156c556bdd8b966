"""What trying a choice is worth: expected improvement of the goal's objective, with the goal's limits, over the whole grid.

Time left t is log-normal and every objective is a polynomial in it, so all of it is closed: expected improvement (Jones et al.
1998; with costs of trying, Snoek et al. 2012), counted only where deadline and budget are kept (Gardner et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from smlt.client.optimizer.goals import Goal, Standing

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outlook:
    """What is left to do under each choice i: arrays of shape (n,).

    `mean_log`, `std_log`: of the seconds left without switching. `usd_per_s`. `switch_s`: from where training is now.
    """

    goal: Goal
    elapsed_s: float
    spent_usd: float
    mean_log: Array
    std_log: Array
    usd_per_s: Array
    switch_s: Array

    @property
    def expected_s(self) -> Array:
        """Expected seconds left, without switching."""
        return np.exp(self.mean_log + self.std_log**2 / 2)

    def objective(self, seconds: Array, usd: Array) -> Array:
        """What the goal wants least of, for a run that takes and costs so much all in all."""
        if self.goal.deadline_s is not None:
            return usd
        return seconds if self.goal.budget_usd is not None else seconds * usd

    def coefficients(self) -> tuple[Array, Array, Array]:
        """The objective as c0 + c1 t + c2 t² in the time left t."""
        seconds, usd = self.elapsed_s + self.switch_s, self.spent_usd + self.switch_s * self.usd_per_s
        zero, one = np.zeros_like(seconds), np.ones_like(seconds)
        if self.goal.deadline_s is not None:
            return usd, self.usd_per_s, zero
        if self.goal.budget_usd is not None:
            return seconds, one, zero
        return seconds * usd, seconds * self.usd_per_s + usd, self.usd_per_s

    def expected(self) -> Array:
        """The objective expected of going to each choice and staying there."""
        c0, c1, c2 = self.coefficients()
        return c0 + c1 * self.expected_s + c2 * np.exp(2 * self.mean_log + 2 * self.std_log**2)

    def most_s(self, later_s: float | Array = 0.0, dearer_usd: float | Array = 0.0) -> Array:
        """The most seconds that may be left for deadline and budget to be kept, when so much is lost before."""
        most = np.full_like(self.mean_log, np.inf)
        if self.goal.deadline_s is not None:
            most = np.minimum(most, self.goal.deadline_s - self.elapsed_s - self.switch_s - later_s)
        if self.goal.budget_usd is not None:
            left_usd = self.goal.budget_usd - self.spent_usd - self.switch_s * self.usd_per_s - dearer_usd
            most = np.minimum(most, left_usd / np.maximum(self.usd_per_s, 1e-12))
        return np.maximum(most, 1e-12)

    def odds(self, most_s: Array, *, unforeseen: float) -> Array:
        """The probability that the time left is at most `most_s`; `unforeseen`: standard deviation of log time beyond belief."""
        return np.asarray(ndtr((np.log(most_s) - self.mean_log) / np.hypot(self.std_log, unforeseen)))


def improvement(outlook: Outlook, best: float, std_log: Array, most_s: Array) -> tuple[Array, Array]:
    """Expected improvement of the objective over `best`, and the probability of any, where the limits are kept.

    `std_log`: of the time left as far as it is not shared with the choice that `best` is of. Both of shape (n,).
    """
    c0, c1, c2 = outlook.coefficients()
    room = best - c0
    # where c0 + c1 t + c2 t² = best, in the form that does not cancel; no t improves where c0 alone is too much
    even = 2 * room / (c1 + np.sqrt(np.maximum(c1**2 + 4 * c2 * room, 0.0)))
    edge = np.minimum(np.where(room > 0, even, 1e-12), most_s)
    std = np.maximum(std_log, 1e-9)
    z = (np.log(np.maximum(edge, 1e-12)) - outlook.mean_log) / std
    better = ndtr(z)
    mean = np.exp(outlook.mean_log + std**2 / 2) * ndtr(z - std)
    square = np.exp(2 * outlook.mean_log + 2 * std**2) * ndtr(z - 2 * std)
    gain = room * better - c1 * mean - c2 * square
    return np.where(room > 0, np.maximum(gain, 0.0), 0.0), np.where(room > 0, better, 0.0)


def price_of_trying(outlook: Outlook, best: int, round_s: float, back_s: Array) -> Array:
    """What a round at each choice costs when it turns out worse and training goes (back) to choice `best`: shape (n,).

    `back_s`: seconds of switching from each choice to `best`. The round's steps are not lost: they are left to do no more.
    """
    expected_s = outlook.expected_s
    spent_s = np.minimum(round_s, expected_s)
    rest_s = back_s + (1 - spent_s / expected_s) * expected_s[best]
    seconds = outlook.elapsed_s + outlook.switch_s + spent_s + rest_s
    usd = outlook.spent_usd + outlook.usd_per_s * (outlook.switch_s + spent_s) + outlook.usd_per_s[best] * rest_s
    direct_s = outlook.switch_s[best] + expected_s[best]
    direct = outlook.objective(
        outlook.elapsed_s + direct_s, outlook.spent_usd + outlook.usd_per_s[best] * direct_s
    )
    return np.maximum(outlook.objective(seconds, usd) - direct, 0.0)
