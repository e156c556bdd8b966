"""What a run is to keep to: a deadline, a budget, both, or the best trade of time and cost."""

from __future__ import annotations

from dataclasses import dataclass

ON_MISS = ("ask", "stop", "continue", "best-effort")


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
