"""Durations and money as people write them, and goals that make sense."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt.client.optimizer.goals import Goal, check_goal, duration_text, parse_duration, parse_usd
from smlt.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200),
        ("90m", 5400),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1.5h", 5400),
        ("1:30:00", 5400),
        ("0:00:01", 1),
        ("45s", 45),
        (" 45 S ", 45),
        ("1d", 86400),
        ("1d2h3m4s", 93784),
        ("0.5s", 0.5),
    ],
)
def test_a_duration_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "2", "1:30", "h", "30m1h", "1h1h", "-1h", "1e3s", "2 weeks", "1:60:00", "٢h", "1_0s", "inf"]
)
def test_what_is_no_clear_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["0s", "0h0m", "0:00:00"])
def test_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="above zero"):
        parse_duration(text)


@given(st.integers(0, 9), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_a_duration_is_the_sum_of_its_parts(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = days * 86400 + hours * 3600 + minutes * 60 + seconds
    if total:
        assert parse_duration(f"{days}d{hours}h{minutes}m{seconds}s") == total
        assert parse_duration(f"{days * 24 + hours}:{minutes:02}:{seconds:02}") == total


@pytest.mark.parametrize(
    ("text", "usd"), [("5", 5), ("5.00", 5), ("$5", 5), ("$ 0.05", 0.05), ("5 USD", 5), ("5$", 5), ("12.5usd", 12.5)]
)
def test_money_is_read_as_people_write_it(text: str, usd: float) -> None:
    assert parse_usd(text) == usd


@pytest.mark.parametrize("text", ["", "$", "five", "5 EUR", "-5", "1,000", "1e3", "nan", "$5$", "0", "$0.00"])
def test_what_is_no_money_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_usd(text)


@pytest.mark.parametrize(
    "goal",
    [Goal(), Goal(deadline_s=1), Goal(budget_usd=0.01, on_miss="ask"), Goal(deadline_s=7200, budget_usd=5, on_miss="stop")],
)
def test_a_goal_that_makes_sense_passes(goal: Goal) -> None:
    check_goal(goal)


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        (Goal(deadline_s=0), "deadline"),
        (Goal(deadline_s=math.nan), "deadline"),
        (Goal(budget_usd=-1), "budget"),
        (Goal(budget_usd=math.inf), "budget"),
        (Goal(on_miss="panic"), "ask, stop, continue, best-effort, not 'panic'"),
    ],
)
def test_a_goal_that_makes_none_is_refused_with_its_name(goal: Goal, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_goal(goal)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "0.2s"),
        (38.4, "38s"),
        (59.9, "1m 00s"),
        (245, "4m 05s"),
        (3599.9, "1h 00m"),
        (7200, "2h 00m"),
        (9060, "2h 31m"),
        (93600, "1d 02h"),
        (-245, "-4m 05s"),
        (math.inf, "never"),
    ],
)
def test_a_duration_is_shown_with_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
