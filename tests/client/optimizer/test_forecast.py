"""Forecasts of the end and the cost of a run, compared with drawing many of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt.client.optimizer.drift import DriftTest
from smlt.client.optimizer.forecast import FailureHistory, Setbacks, TimeLeft, forecast
from smlt.client.optimizer.goals import Goal, Phase, Standing


@dataclass(frozen=True)
class Normal:
    mean_log: float
    std_log: float


PHASES = (Phase(1000, 64), Phase(500, 128), Phase(200, 64))
BELIEFS = (Normal(math.log(0.1), 0.1), Normal(math.log(0.3), 0.25), Normal(math.log(0.1), 0.1))


def drawn(count: int = 200_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    z = rng.normal(size=count)
    steps = sum(
        phase.steps * np.exp(belief.mean_log + math.hypot(belief.std_log, 0.03) * z)
        for phase, belief in zip(PHASES, BELIEFS, strict=True)
    )
    return np.asarray(7.0 + steps + 20.0 * rng.poisson(0.8, count))


def test_the_distribution_is_that_of_many_drawn_runs() -> None:
    left = TimeLeft(PHASES, BELIEFS, switch_s=7.0, setbacks=Setbacks(0.8, 20.0))
    runs = drawn()
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert left.quantile_s(q) == pytest.approx(np.quantile(runs, q), rel=0.005)
    for seconds in (220, 270, 350):
        assert left.below(seconds) == pytest.approx(np.mean(runs <= seconds), abs=0.005)


def test_a_forecast_counts_what_is_behind_and_what_standing_still_costs() -> None:
    standing = Standing(100.0, 1.0, PHASES)
    found = forecast(BELIEFS, standing, 0.002, Goal(deadline_s=400, budget_usd=1.62), 7.0, Setbacks(0.8, 20.0))
    runs = drawn()
    assert found.seconds == pytest.approx(100 + np.median(runs), rel=0.005)
    assert found.seconds_low < found.seconds < found.seconds_high
    assert found.usd == pytest.approx(1 + 0.002 * np.median(runs), rel=0.005)
    assert found.usd_high == pytest.approx(1 + 0.002 * np.quantile(runs, 0.95), rel=0.005)
    assert found.odds == pytest.approx(np.mean((runs <= 300) & (0.002 * runs <= 0.62)), abs=0.005)


def test_without_a_goal_it_is_kept_for_sure() -> None:
    assert forecast(BELIEFS, Standing(0, 0, PHASES), 0.0, Goal()).odds == 1


def test_what_is_late_already_is_late_for_sure() -> None:
    assert forecast(BELIEFS, Standing(401, 0, PHASES), 0.0, Goal(deadline_s=400)).odds == 0
    assert forecast(BELIEFS, Standing(1, 2.1, PHASES), 0.0, Goal(budget_usd=2)).odds == 0
    assert forecast((), Standing(401, 0, ()), 0.1, Goal(deadline_s=400)).odds == 0


def test_a_run_with_nothing_left_is_where_it_is() -> None:
    found = forecast((), Standing(100, 2, ()), 0.1, Goal(deadline_s=400))
    assert (found.seconds, found.usd, found.odds) == (100, 2, 1)


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(-7, 3), st.floats(0, 1)), min_size=1, max_size=4),
    st.floats(0, 1e4),
    st.floats(0, 20),
    st.floats(0, 1e3),
    st.sampled_from([0.01, 0.05, 0.5, 0.95, 0.99]),
)
def test_the_odds_of_a_quantile_are_its_own(
    parts: list[tuple[int, float, float]], switch_s: float, expected: float, each_s: float, q: float
) -> None:
    phases = [Phase(steps, i + 1) for i, (steps, _, _) in enumerate(parts)]
    beliefs = [Normal(mean, std) for _, mean, std in parts]
    left = TimeLeft(phases, beliefs, switch_s=switch_s, setbacks=Setbacks(expected, each_s))
    at = left.quantile_s(q)
    assert left.below(at * 1.001) >= q - 1e-6
    assert left.below(at * 0.999) <= q + 1e-6


def test_time_is_kept_back_for_the_setbacks_that_are_expected_and_for_one_that_is_likely() -> None:
    assert Setbacks(0.5, 20.0).reserve_s(0.02) == 20.0
    assert Setbacks(0.01, 20.0).reserve_s(0.02) == 0.01 * 20.0
    assert Setbacks(3.0, 20.0).reserve_s(0.02) == 60.0
    assert Setbacks().reserve_s(0.02) == 0.0


def test_failures_make_more_failures_likely_and_teach_what_they_cost() -> None:
    history = FailureHistory()
    before = history.to_come(0, 100, 10)
    assert (before.expected, before.each_s) == (0.5, 20)  # 10 s until it is noticed
    history.add(2, 85)
    after = history.to_come(50, 50, 10)
    assert (after.expected, after.each_s) == (1.25, 35)
    assert history.to_come(100, 0, 10).expected == 0


def test_steps_that_become_slower_are_noticed_soon_and_noise_is_not() -> None:
    rng, alarms = np.random.default_rng(0), 0
    test = DriftTest()
    for _ in range(1000):
        alarms += bool(test.take(math.exp(rng.normal(0, 0.0245)), 0.0, 0.01, 0.01))
    assert alarms < 10
    test = DriftTest()
    assert [test.take(1.15, 0.0, 0.01, 0.01) for _ in range(2)] == ["", "slower"]
    assert [test.take(0.87, 0.0, 0.01, 0.01) for _ in range(2)] == ["", "faster"]
    assert "slower" in [test.take(1.05, 0.0, 0.01, 0.01) for _ in range(6)]
