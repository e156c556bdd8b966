"""What trying a choice is worth: expected improvement of the goal's objective, with the goal's limits, over the whole grid.

Time left t is log-normal and every objective is a polynomial in it, so all of it is closed: expected improvement (Jones et al.
1998; with costs of trying, Snoek et al. 2012), counted only where deadline and budget are kept (Gardner et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from smlt.client.optimizer.goals import Goal

Array = NDArray[np.float64]

#: A round is not counted on to show more than this, in log step time: else two neighbours, told apart exactly, would be used to
#: tell the slope of the whole curve, which no curve is smooth enough for.
TELLS = 0.03
#: What is not believed of but happens: a worker lost, a slow hour. Standard deviation of the log of the time left.
UNFORESEEN = 0.03


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
        """The objective of going to each choice and staying there, for the time that is expected."""
        c0, c1, c2 = self.coefficients()
        return c0 + c1 * self.expected_s + c2 * self.expected_s**2

    def most_s(self, later_s: float | Array = 0.0, dearer_usd: float | Array = 0.0) -> Array:
        """The most seconds that may be left for deadline and budget to be kept, when so much is lost before."""
        most = np.full_like(self.mean_log, np.inf)
        if self.goal.deadline_s is not None:
            most = np.minimum(most, self.goal.deadline_s - self.elapsed_s - self.switch_s - later_s)
        if self.goal.budget_usd is not None:
            left_usd = self.goal.budget_usd - self.spent_usd - self.switch_s * self.usd_per_s - dearer_usd
            most = np.minimum(most, left_usd / np.maximum(self.usd_per_s, 1e-12))
        return np.maximum(most, 1e-12)

    def odds(self, most_s: Array) -> Array:
        """The probability that the time left is at most `most_s`."""
        return np.asarray(ndtr((np.log(most_s) - self.mean_log) / np.hypot(self.std_log, UNFORESEEN)))

    def odds_to_be_sure(self, most_s: Array, needed: float, noise: float) -> Array:
        """The probability that after a round at each choice the odds of at most `most_s` will be `needed` or more."""
        moved = learnt(self.std_log, 0.0, noise)
        still = np.sqrt(np.maximum(self.std_log**2 - moved**2, 0.0) + UNFORESEEN**2)
        return np.asarray(ndtr((np.log(most_s) - ndtri(needed) * still - self.mean_log) / np.maximum(moved, 1e-9)))


def learnt(std_log: Array, shared: Array | float, noise: float) -> Array:
    """By how much a round moves the mean of the difference between a choice's log time and another's: its standard deviation.

    `std_log`: of the choice; `shared`: its covariance with the other; `noise`: by how much a round scatters. A round shows the
    more the less it scatters, and nothing of what is known: the knowledge gradient's measure (Frazier et al. 2009).
    """
    variance = std_log**2
    return np.asarray(np.abs(variance - shared) / np.sqrt(variance + max(noise, TELLS) ** 2))


def improvement(outlook: Outlook, best: float, std_log: Array) -> tuple[Array, Array]:
    """Expected improvement of the objective over `best`, and the probability of any.

    `std_log`: by how much a round at each choice moves what is believed of its time left, as far as that is not shared with the
    choice that `best` is of. Both of shape (n,).
    """
    c0, c1, c2 = outlook.coefficients()
    room = best - c0
    # where c0 + c1 t + c2 t² = best, in the form that does not cancel; no t improves where c0 alone is too much
    even = 2 * room / (c1 + np.sqrt(np.maximum(c1**2 + 4 * c2 * room, 0.0)))
    std = np.maximum(std_log, 1e-9)
    # what stays unknown raises the expectation of a log-normal as before
    mean_log = outlook.mean_log + (outlook.std_log**2 - std**2) / 2
    z = (np.log(np.where(room > 0, even, 1e-12)) - mean_log) / std
    better = ndtr(z)
    mean = np.exp(mean_log + std**2 / 2) * ndtr(z - std)
    square = np.exp(2 * mean_log + 2 * std**2) * ndtr(z - 2 * std)
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
    direct = outlook.objective(outlook.elapsed_s + direct_s, outlook.spent_usd + outlook.usd_per_s[best] * direct_s)
    return np.maximum(outlook.objective(seconds, usd) - direct, 0.0)
