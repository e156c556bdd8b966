"""Time and cost as they were forecast at the end of each round, against what they came to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from smlt.client.report.data import Decision, RunData, number
from smlt.client.report.pictures import (
    BLUE,
    FAINT,
    GREEN,
    PURPLE,
    RED,
    TEXT,
    Picture,
    Table,
    at_most,
    legend,
    new_figure,
    seconds_text,
    time_unit,
    usd_text,
)
from smlt.client.report.steps import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS_MAX = 40


def forecast_picture(data: RunData) -> Picture | None:
    """Fans of the forecasts over the time that had passed, with the limits and the outcome. Call it within `drawing()`."""
    decisions = [one for one in data.decisions if math.isfinite(one.elapsed_s) and math.isfinite(one.expected("seconds"))]
    if not decisions:
        return None
    elapsed = np.array([one.elapsed_s for one in decisions])
    came_s, came_usd = outcome(data)
    most_s = float(np.nanmax([*elapsed, *(_column(decisions, "seconds_high")), came_s]))
    unit, name = time_unit(most_s)
    figure, (time_axes, cost_axes, odds_axes) = new_figure(7.2, 3, sharex=True, height_ratios=(3, 3, 1.4))
    x = elapsed / unit
    _fan(time_axes, x, decisions, "seconds", unit, BLUE)
    time_axes.plot(x, x, color=FAINT, linestyle=":", label="passed")
    _limit(time_axes, decisions, "deadline_s", unit, "deadline")
    _came(time_axes, came_s / unit, came_s / unit)
    time_axes.set_ylabel(f"time in all, {name}")
    _fan(cost_axes, x, decisions, "usd", 1.0, GREEN)
    cost_axes.plot(x, [one.spent_usd for one in decisions], color=FAINT, linestyle=":", label="spent")
    _limit(cost_axes, decisions, "budget_usd", 1.0, "budget")
    _came(cost_axes, came_s / unit, came_usd)
    cost_axes.set_ylabel("cost in all, USD")
    odds = np.array([one.expected("odds") for one in decisions])
    odds_axes.step(x, odds * 100, where="post", color=PURPLE)
    odds_axes.set_ylim(-5, 105)
    odds_axes.set_ylabel("odds, %")
    odds_axes.set_xlabel(f"time from the run's first start, {name}")
    for axes in (time_axes, cost_axes):
        axes.set_ylim(0, None)
        legend(axes)
    caption = "Lines: what was expected when a round was over; bands: 90 % of what was thought possible."
    if not data.on_lambda:
        caption += f" {SHADOW_PRICE}"
    return Picture("forecasts", "Forecast and outcome", _alt(data, decisions), figure, caption, _table(data, decisions))


#: What a cost means where nothing is paid.
SHADOW_PRICE = "Workers on this machine cost nothing: the cost is what functions of 1,769 MB would have taken for that time."


def outcome(data: RunData) -> tuple[float, float]:
    """Seconds from the first start to the end, and what was spent; nan as long as the run is under way."""
    if data.status.get("state") not in ("done", "stopped", "failed") or not data.decisions:
        return math.nan, math.nan
    last = data.decisions[-1]
    began = number(last.row.get("time")) - last.elapsed_s
    spent = number(data.status.get("cost_usd")) if data.on_lambda else math.nan
    return number(data.status.get("ended")) - began, spent if spent > 0 else number(data.status.get("spent_usd"))


def _column(decisions: list[Decision], name: str) -> Array:
    return np.array([one.expected(name) for one in decisions])


def _fan(axes: Axes, x: Array, decisions: list[Decision], name: str, unit: float, colour: str) -> None:
    low, middle, high = (_column(decisions, f"{name}{end}") / unit for end in ("_low", "", "_high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0, label="90 % band")
    axes.plot(x, middle, color=colour, marker="o" if x.size < 60 else None, label="expected")
    if x.size == 1:  # a band of no width
        axes.vlines(x, low, high, color=colour, alpha=0.5)


def _limit(axes: Axes, decisions: list[Decision], name: str, unit: float, label: str) -> None:
    limit = decisions[-1].limit(name)
    if math.isfinite(limit):
        axes.axhline(limit / unit, color=RED, linestyle="--", label=label)


def _came(axes: Axes, x: float, y: float) -> None:
    if math.isfinite(x) and math.isfinite(y):
        axes.plot([x], [y], color=TEXT, marker="*", markersize=11, linestyle="", label="came to", zorder=5)


def _alt(data: RunData, decisions: list[Decision]) -> str:
    came_s, came_usd = outcome(data)
    first, last = decisions[0], decisions[-1]
    parts = [f"Forecasts after {len(decisions)} rounds"]
    parts += [
        f"{name}: {text(one.expected(field))} expected {when}"
        for name, field, text in (("time", "seconds", seconds_text), ("cost", "usd", usd_text))
        for when, one in (("at first", first), ("at last", last))
    ]
    if math.isfinite(came_s):
        parts.append(f"it took {seconds_text(came_s)}" + (f" and {usd_text(came_usd)}" if math.isfinite(came_usd) else ""))
    return "; ".join(parts) + "."


def _table(data: RunData, decisions: list[Decision]) -> Table:
    def between(one: Decision, name: str, text: object) -> str:
        assert callable(text)
        return f"{text(one.expected(name))} ({text(one.expected(f'{name}_low'))} to {text(one.expected(f'{name}_high'))})"

    rows = [
        (
            str(one.number),
            seconds_text(one.elapsed_s),
            between(one, "seconds", seconds_text),
            between(one, "usd", usd_text),
            f"{one.expected('odds'):.0%}" if math.isfinite(one.expected("odds")) else "?",
        )
        for one in decisions
    ]
    came_s, came_usd = outcome(data)
    limits = (seconds_text(decisions[-1].limit("deadline_s")), usd_text(decisions[-1].limit("budget_usd")))
    ends = [("limit", "", *("none" if text == "?" else text for text in limits), "")]
    if math.isfinite(came_s):
        ends.append(("came to", "", seconds_text(came_s), usd_text(came_usd), ""))
    return Table(("round", "passed", "time in all (90 %)", "cost in all (90 %)", "odds"), (*at_most(rows, ROWS_MAX), *ends))
