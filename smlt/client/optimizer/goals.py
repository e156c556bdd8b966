"""What a run is to keep to: a deadline, a budget, both, or the best trade of time and cost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from smlt.errors import ConfigError

ON_MISS = ("ask", "stop", "continue", "best-effort")

_UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
#: Each unit at most once, the longest first: "1d12h", "1h30m", "1.5h", "45s".
_DURATION = re.compile(
    "".join(rf"(?:(?P<{unit}>\d{{1,9}}(?:\.\d{{1,9}})?)\s*{unit}\s*)?" for unit in _UNITS_S) + r"\Z", re.ASCII | re.IGNORECASE
)
_CLOCK = re.compile(r"(\d{1,5}):([0-5]\d):([0-5]\d)\Z", re.ASCII)
_USD = re.compile(r"(?:\$\s*(\d{1,12}(?:\.\d{1,9})?)|(\d{1,12}(?:\.\d{1,9})?)\s*(?:\$|USD)?)\Z", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Goal:
    """`deadline_s`: seconds from the run's first start to its end. `budget_usd`: all it may cost.

    A deadline alone: least cost in time. A budget alone: least time for it. Both: least cost, within both. Neither: the least
    product of time and cost, which is the most speed for the money.
    """

    deadline_s: float | None = None
    budget_usd: float | None = None
    on_miss: str = "best-effort"  # or "ask", "stop", "continue"


@dataclass(frozen=True)
class Phase:
    """A part of the training still to be done: so many steps of one global batch size."""

    steps: int
    global_batch_size: int


@dataclass(frozen=True)
class Standing:
    """Where a run stands. `elapsed_s` and `spent_usd` since its first start; what is left as phases, in order."""

    elapsed_s: float
    spent_usd: float
    left: tuple[Phase, ...]


@dataclass(frozen=True)
class Forecast:
    """When a run will end and what it will have cost, all in all, with 90 % intervals.

    `odds`: that the goal is kept, 0 to 1.
    """

    seconds: float
    seconds_low: float
    seconds_high: float
    usd: float
    usd_low: float
    usd_high: float
    odds: float


def parse_duration(text: str) -> float:
    """Seconds of "2h", "90m", "1h30m", "1.5h", "45s", "1d" or "1:30:00".

    ConfigError for anything else: also for a number alone and for "1:30", which may be minutes as well as hours.
    """
    value = text.strip()
    if clock := _CLOCK.match(value):
        hours, minutes, seconds = (int(part) for part in clock.groups())
        total = hours * 3600.0 + minutes * 60.0 + seconds
    else:
        found = _DURATION.match(value)
        parts = {unit: float(part) for unit, part in found.groupdict().items() if part} if found else {}
        if not parts:
            raise ConfigError(f"{text!r} is no duration: write it with its units, such as 45s, 90m, 2h, 1h30m, 1d or 1:30:00")
        total = sum(_UNITS_S[unit] * part for unit, part in parts.items())
    if total <= 0:
        raise ConfigError(f"{text!r} is no time at all: a duration must be above zero")
    return total


def parse_usd(text: str) -> float:
    """US dollars of "5", "5.00", "$5" or "5 USD". ConfigError for anything else, and for nothing."""
    found = _USD.match(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no sum of money: write it in US dollars, such as 5.00 or $5")
    usd = float(found[1] or found[2])
    if usd <= 0:
        raise ConfigError(f"{text!r} is no money at all: a budget must be above zero")
    return usd


def check_goal(goal: Goal) -> None:
    """ConfigError, which says what to do, when a goal makes no sense."""
    if goal.on_miss not in ON_MISS:
        raise ConfigError(f"a run whose goal cannot be kept does one of {', '.join(ON_MISS)}, not {goal.on_miss!r}")
    for name, value in (("deadline", goal.deadline_s), ("budget", goal.budget_usd)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"a {name} must be above zero and finite, not {value}")


def duration_text(seconds: float) -> str:
    """A duration for people: "2h 31m", "4m 05s", "38s", "1d 02h". Rounded to the smaller unit shown."""
    if not math.isfinite(seconds):
        return "never"
    sign, whole = ("-" if seconds <= -0.5 else ""), abs(seconds)
    if round(whole) < 60:
        text = f"{whole:.0f}s" if whole >= 9.95 or whole == int(whole) else f"{whole:.1f}s"
    elif round(whole) < 3600:
        text = "{}m {:02d}s".format(*divmod(round(whole), 60))
    elif round(whole / 60) < 24 * 60:
        text = "{}h {:02d}m".format(*divmod(round(whole / 60), 60))
    else:
        text = "{}d {:02d}h".format(*divmod(round(whole / 3600), 24))
    return sign + text


def usd_text(usd: float) -> str:
    """An amount of US dollars for people, without its unit: "12.40", "0.0312". Cents, and more digits of less than one."""
    if abs(usd) >= 1 or usd == 0:
        return f"{usd:,.2f}"
    return f"{usd:.3g}" if abs(usd) >= 1e-4 else f"{usd:.2e}"
