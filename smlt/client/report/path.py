"""The path of a run that tunes itself: what was chosen at the end of each round, and why."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from smlt.client.report.data import Decision, RunData
from smlt.client.report.pictures import (
    BLUE,
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
    whole_numbers,
)

ROWS_MAX = 60

#: What a decision was -> its mark.
_LOOKS: dict[str, dict[str, Any]] = {
    "explore": {"marker": "^", "color": PURPLE},
    "switch": {"marker": "D", "color": BLUE},
    "ask": {"marker": "s", "color": GREEN},
    "stop": {"marker": "X", "color": RED, "markersize": 8},
}


def path_picture(data: RunData) -> Picture | None:
    """Workers, and memory where it changes, over time; each decision that changed something has its mark."""
    decisions = [one for one in data.decisions if one.choice is not None and math.isfinite(one.elapsed_s)]
    if not decisions:
        return None
    chosen = [one.chosen or one.choice for one in decisions]
    end_s = max(decisions[-1].elapsed_s, data.steps.last_time - _began(decisions[-1]))
    elapsed = np.array([0.0, *(one.elapsed_s for one in decisions), end_s if math.isfinite(end_s) else decisions[-1].elapsed_s])
    unit, name = time_unit(float(elapsed[-1]))
    choices = [decisions[0].choice, *chosen, chosen[-1]]
    curves = {"workers": [one.workers for one in choices if one is not None]}
    memory = [one.memory_mb for one in choices if one is not None]
    if len(set(memory)) > 1:
        curves["MB each"] = memory
    figure, all_axes = new_figure(1.0 + 1.9 * len(curves), len(curves), sharex=True)
    for axes, (label, values) in zip(all_axes, curves.items(), strict=True):
        axes.step(elapsed / unit, values, where="post", color=TEXT)
        for kind, look in _LOOKS.items():
            at = [i for i, one in enumerate(decisions) if _kind(one) == kind]
            if at:
                axes.plot(elapsed[1:][at] / unit, np.array(values)[1:][at], linestyle="", label=kind, **look)
        axes.set_ylim(0, 1.2 * max(values))
        axes.set_ylabel(label)
        whole_numbers(axes.yaxis)
    legend(all_axes[0])
    all_axes[-1].set_xlabel(f"time from the run's first start, {name}")
    changes = sum(one.chosen not in (None, one.choice) for one in decisions)
    alt = f"Steps of the choice over {len(decisions)} rounds: from {choices[0]} to {choices[-1]}, {changes} changes."
    caption = "At the end of each round the optimizer is asked; where nothing is marked, all stayed as it was."
    return Picture("path", "Path taken", alt, figure, caption, _table(decisions))


def _kind(decision: Decision) -> str:
    if decision.action in ("ask", "stop"):
        return decision.action
    if decision.chosen in (None, decision.choice):
        return ""
    return "explore" if decision.kind == "explore" else "switch"


def _began(decision: Decision) -> float:
    time = decision.row.get("time")
    return float(time) - decision.elapsed_s if isinstance(time, (int, float)) else math.nan


def _table(decisions: list[Decision]) -> Table:
    rows = [
        (
            str(one.number),
            seconds_text(one.elapsed_s),
            f"{one.step:,}",
            str(one.choice),
            str(one.chosen or "?") if one.chosen != one.choice else "the same",
            ", ".join(dict.fromkeys(part for part in (one.action, one.kind) if part)) or "?",
            one.reason,
        )
        for one in decisions
    ]
    return Table(("round", "passed", "behind step", "was at", "goes on with", "decision", "reason"), at_most(rows, ROWS_MAX))
