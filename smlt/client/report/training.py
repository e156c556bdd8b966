"""Pictures of any run: loss and metrics, throughput and workers, what a step's time goes to, memory, invocations."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from smlt.client.report.data import RunData, number
from smlt.client.report.pictures import (
    BLUE,
    FAINT,
    GOLD,
    GREEN,
    PURPLE,
    RED,
    SERIES,
    TEXT,
    Picture,
    Table,
    at_most,
    legend,
    new_figure,
    number_text,
    plain,
    seconds_text,
    time_unit,
    whole_numbers,
)
from smlt.client.report.steps import Array, Steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: So long without a step, and the run was not under way: it was stopped, and resumed later.
PAUSE_S = 600.0
#: Bars of the picture of a step's parts, and of the smoothed lines.
BARS = 120
#: More ranks or invocations than these are shown as how many ran at a time.
RANKS_MAX, INVOCATIONS_MAX = 48, 1500
METRICS_MAX = len(SERIES)
ROWS_MAX = 40
_IN_ORDER = ("done", "paused", "probe")


def loss(steps: Steps) -> Picture | None:
    """Loss against steps."""
    known = np.isfinite(steps.loss)
    if not known.any():
        return None
    figure, (axes,) = new_figure(3.2)
    if steps.count > steps.loss.size:
        axes.fill_between(steps.loss_step, steps.loss_low, steps.loss_high, color=BLUE, alpha=0.2, linewidth=0, label="range")
    axes.plot(steps.loss_step, steps.loss, color=BLUE, marker="o" if steps.loss.size < 30 else None, label="loss")
    if steps.loss_low[known].min() > 0 and steps.loss[known].max() > 30 * steps.loss[known].min():
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    legend(axes)
    first, last, least = steps.loss[known][0], steps.loss[known][-1], int(np.nanargmin(steps.loss_low))
    lost = int((~known).sum())
    caption = "" if not lost else f"Where the line is broken ({lost} of {known.size} points), the loss was not a finite number."
    if steps.count > steps.loss.size:
        caption += f" {steps.count:,} steps are shown as {steps.loss.size:,} means, the band is their least and greatest loss."
    rows = (
        ("first", f"{steps.loss_step[known][0]:,.0f}", number_text(first)),
        ("least", f"{steps.loss_step[least]:,.0f}", number_text(float(steps.loss_low[least]))),
        ("last", f"{steps.loss_step[known][-1]:,.0f}", number_text(last)),
    )
    alt = f"Line of the loss over {steps.count:,} steps: {number_text(first)} at first, {number_text(last)} at last."
    return Picture("loss", "Loss", alt, figure, caption.strip(), Table(("", "about step", "loss"), rows))


def metrics(data: RunData) -> Picture | None:
    """What evaluate() gave, after each epoch."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in data.steps.epochs:
        found = row.get("metrics")
        for name, value in found.items() if isinstance(found, dict) else ():
            curves.setdefault(str(name), []).append((number(row.get("epoch")) + 1, number(value)))
    curves = {name: points for name, points in curves.items() if np.isfinite([value for _, value in points]).any()}
    if not curves:
        return None
    shown = sorted(curves, key=lambda name: (name != "accuracy", name))[:METRICS_MAX]
    figure, all_axes = new_figure(1.0 + 1.7 * len(shown), len(shown), sharex=True)
    for name, axes, (colour, _) in zip(shown, all_axes, SERIES, strict=False):
        x, y = np.array(curves[name]).T
        axes.plot(x, y, color=colour, marker="o" if x.size < 60 else None)
        axes.set_title(_shortened(name))
        target = number(data.config.get("target_accuracy"))
        if name == "accuracy" and math.isfinite(target):
            axes.axhline(target, color=RED, linestyle="--", label=f"target {target:g}")
            legend(axes)
    all_axes[-1].set_xlabel("epochs")
    rows = tuple(
        (name, *(number_text(value) for value in (points[0][1], *_range(points), points[-1][1])))
        for name, points in curves.items()
    )
    alt = "; ".join(f"{row[0]}: {row[1]} after the first epoch, {row[4]} after the last" for row in rows)
    left_out = f"The table has {len(curves) - len(shown)} more." if len(curves) > len(shown) else ""
    return Picture(
        "metrics",
        "Metrics",
        f"Lines over {len(data.steps.epochs)} epochs. {alt}.",
        figure,
        left_out,
        Table(("metric", "first", "least", "greatest", "last"), rows),
    )


def speed(data: RunData) -> Picture | None:
    """Throughput and the number of workers over the time of training, with the changes of the membership."""
    steps = data.steps
    if np.isfinite(steps.time).sum() < 2:
        return None
    clock = Clock(steps.time)
    unit, name = time_unit(clock.end_s)
    figure, (above, below) = new_figure(4.4, 2, sharex=True, height_ratios=(3, 2))
    rate = steps.samples_per_s
    x = clock(steps.time) / unit
    above.plot(x, rate, color=BLUE, alpha=0.35, linewidth=0.8)
    middle_x, middle = _binned(x, rate)
    above.plot(middle_x, middle, color=BLUE, label="median of neighbours" if steps.time.size > BARS else "samples/s")
    above.set_ylim(0, 1.15 * float(np.nanquantile(rate, 0.98)) if np.isfinite(rate).any() else None)
    above.set_ylabel("samples/s")
    legend(above)
    _draw_workers(below, data, clock, unit)
    below.set_xlabel(f"time of training, {name}")
    changes = [_change_row(row, clock) for row in steps.changes]
    known = rate[np.isfinite(rate)]
    usual = number_text(float(np.median(known))) if known.size else "?"
    counts = steps.workers[np.isfinite(steps.workers)]
    fewest, most = (int(counts.min()), int(counts.max())) if counts.size else (0, 0)
    alt = f"Throughput, {usual} samples a second at the median, and workers, {fewest} to {most}; {len(changes)} changes."
    table = Table(("time", "behind step", "workers then", "why", "training stood still"), at_most(changes, ROWS_MAX))
    return Picture("speed", "Throughput and workers", alt, figure, clock.note, table if changes else None)


def parts(steps: Steps) -> Picture | None:
    """What the time of a step goes to."""
    shown = (
        ("compute_s", "compute", BLUE),
        ("communication_s", "communication exposed", RED),
        ("data_s", "waiting for data", GOLD),
    )
    known = {name: steps.mean.get(name, np.empty(0)) for name, _, _ in shown}
    if not steps.step.size or not any(np.isfinite(values).any() for values in known.values()):
        return None
    figure, (axes,) = new_figure(3.2)
    below: Array | None = None
    total = float(sum(np.nanmean(values) for values in known.values() if np.isfinite(values).any()))
    rows = []
    for (name, label, colour), hatch in zip(shown, ("", "////", "...."), strict=True):
        x, height = _binned(steps.step, known[name])
        height = np.nan_to_num(height) * 1e3
        floor = below if below is not None else np.zeros_like(height)
        axes.fill_between(
            x, floor, floor + height, step="mid", label=label, facecolor=colour, alpha=0.55, hatch=hatch, edgecolor=colour
        )
        below = floor + height
        mean = float(np.nanmean(known[name])) if np.isfinite(known[name]).any() else math.nan
        rows.append((label, number_text(mean * 1e3), f"{mean / total:.0%}" if total > 0 else "?"))
    x, height = _binned(steps.step, _rest(steps, known))
    rest = np.nan_to_num(height) * 1e3
    if below is not None and np.isfinite(height).any():
        axes.fill_between(x, below, below + rest, step="mid", label="the rest", facecolor=FAINT, alpha=0.4, linewidth=0)
        rows.append(("the rest", number_text(float(np.nanmedian(height)) * 1e3), "from step to step"))
    hidden = np.maximum(0.0, steps.mean.get("communication_total_s", np.empty(0)) - known["communication_s"])
    if np.isfinite(hidden).any():  # under compute: it takes no time of its own, so it is no part of the sum
        x, height = _binned(steps.step, hidden)
        axes.plot(x, height * 1e3, color=PURPLE, linestyle="--", label="communication hidden")
        rows.append(("communication hidden", number_text(float(np.nanmean(hidden)) * 1e3), "beside compute"))
    axes.set_ylim(0, _above(below + rest if below is not None else rest))
    axes.set_xlabel("step")
    axes.set_ylabel("ms a step")
    legend(axes)
    alt = "Stacked areas of the time of a step: " + ", ".join(f"{row[0]} {row[1]} ms ({row[2]})" for row in rows) + "."
    return Picture(
        "parts",
        "What a step's time goes to",
        alt,
        figure,
        "Means over the workers, medians of neighbours. Hidden communication goes on beside compute. Higher steps are cut off.",
        Table(("part", "ms a step", "of it"), tuple(rows)),
    )


def _above(heights: Array) -> float | None:
    """Where an axis ends for one step that stood still not to flatten all the others."""
    usual = float(np.quantile(heights, 0.9)) if heights.size else 0.0
    return min(1.1 * float(heights.max()), 3 * usual) if usual > 0 else None


def _rest(steps: Steps, known: dict[str, Array]) -> Array:
    """Of a step's time, what is none of the parts, seconds: batches made, rows sent, changes of the membership."""
    if steps.time.size < 2:
        return np.full(steps.step.size, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.diff(steps.time) / np.diff(steps.step)
    of_parts = np.sum([np.nan_to_num(values) for values in known.values() if values.size], axis=0)
    rest = np.concatenate([[np.nan], each - of_parts[1:]])
    return np.where(np.isfinite(rest) & (rest < PAUSE_S), np.maximum(rest, 0.0), np.nan)


def memory(data: RunData) -> Picture | None:
    """Resident memory of the workers."""
    steps = data.steps
    most, mean = steps.most.get("rss_mb", np.empty(0)), steps.mean.get("rss_mb", np.empty(0))
    if not np.isfinite(most).any():
        return None
    figure, (axes,) = new_figure(2.6)
    axes.plot(steps.step, most, color=BLUE, label="largest worker")
    axes.plot(steps.step, mean, color=GREEN, linestyle="--", label="mean of the workers")
    limit = number(data.config.get("memory_mb"))
    if math.isfinite(limit):
        axes.axhline(limit, color=RED, linestyle=":", label=f"asked for: {limit:,.0f} MB")
    axes.set_ylim(0, 1.15 * float(np.nanmax(most)) if not limit > 0 else 1.15 * max(limit, float(np.nanmax(most))))
    axes.set_xlabel("step")
    axes.set_ylabel("MB resident")
    legend(axes)
    rows = (("largest worker", number_text(float(np.nanmax(most)))), ("mean, at last", number_text(float(mean[-1]))))
    alt = f"Lines of the workers' resident memory: {rows[0][1]} MB at most."
    return Picture("memory", "Memory", alt, figure, "", Table(("", "MB"), rows))


def invocations(data: RunData) -> Picture | None:
    """When which function ran."""
    ran = [row for row in data.invocations if row.started > 0 and row.billed_ms]
    if not ran:
        return None
    began = min(row.started for row in ran)
    end = max(row.started + (row.billed_ms or 0) / 1e3 for row in ran) - began
    unit, name = time_unit(end)
    ranks = sorted({row.rank for row in ran})
    spans = [(row, (row.started - began) / unit, (row.billed_ms or 0) / 1e3 / unit) for row in ran]
    if len(ranks) <= RANKS_MAX and len(ran) <= INVOCATIONS_MAX:
        figure, (axes,) = new_figure(1.3 + 0.22 * max(4, len(ranks)))
        looks = {"in order": (BLUE, ""), "not in order": (RED, "////")}
        for label, (colour, hatch) in looks.items():
            bars = [(row, at, long) for row, at, long in spans if (row.outcome in _IN_ORDER) == (label == "in order")]
            if bars:
                axes.barh(
                    [ranks.index(row.rank) for row, _, _ in bars],
                    [long for _, _, long in bars],
                    left=[at for _, at, _ in bars],
                    height=0.7,
                    facecolor=colour,
                    edgecolor=TEXT,
                    linewidth=0.5,
                    alpha=0.7,
                    hatch=hatch,
                    label=f"ended {label}",
                )
        axes.set_yticks(range(len(ranks)), ["?" if rank < 0 else str(rank) for rank in ranks])
        axes.invert_yaxis()
        axes.set_ylabel("rank")
        legend(axes)
    else:
        figure, (axes,) = new_figure(2.8)
        events = sorted([(at, 1) for _, at, _ in spans] + [(at + long, -1) for _, at, long in spans])
        times, changes = np.array(events).T
        axes.step(times, np.cumsum(changes), where="post", color=BLUE)
        axes.set_ylabel("functions at a time")
    axes.set_xlabel(f"time from the first invocation, {name}")
    table = _outcomes(data)
    alt = f"Bars of {len(ran)} invocations of {len(ranks)} ranks over {seconds_text(end)}; " + ", ".join(
        f"{row[1]} {row[0]}" for row in table.rows
    )
    return Picture("invocations", "Invocations", alt + ".", figure, "", table)


def _outcomes(data: RunData) -> Table:
    """Count, billed time and memory by how they ended."""
    rows = []
    for outcome, group in groupby(sorted(data.invocations, key=lambda row: row.outcome), key=lambda row: row.outcome):
        all_of = list(group)
        billed = sum(row.billed_ms or 0 for row in all_of) / 1e3
        used = max((row.max_memory_mb or 0 for row in all_of), default=0)
        cold = sum(row.init_ms is not None for row in all_of)
        rows.append((outcome or "under way", str(len(all_of)), str(cold), f"{billed:,.1f}", str(used or "?")))
    return Table(("ended", "invocations", "cold starts", "billed s", "most MB used"), tuple(rows))


class Clock:
    """Epoch s -> seconds of training: from the first step on, without the time for which the run was stopped."""

    def __init__(self, times: Array) -> None:
        known = np.sort(times[np.isfinite(times)])
        self.first = float(known[0])
        gaps = np.diff(known)
        self._ends = known[1:][gaps > PAUSE_S]
        self._lost = np.cumsum(gaps[gaps > PAUSE_S])
        self.end_s = float(self(known[-1:])[0])

    @classmethod
    def of_spans(cls, spans: list[tuple[float, float]]) -> Clock:
        """From the first of them on, (begin, end) in epoch s, without the long times that are in none; at least one."""
        pauses, until = list[tuple[float, float]](), -math.inf
        for begin, end in sorted(spans):
            if begin - until > PAUSE_S and math.isfinite(until):
                pauses.append((begin, begin - until))
            until = max(until, end)
        clock = cls(np.array([min(begin for begin, _ in spans)]))
        clock._ends = np.array([begin for begin, _ in pauses])
        clock._lost = np.cumsum([lost for _, lost in pauses])
        clock.end_s = float(clock(np.array([until]))[0])
        return clock

    def __call__(self, times: Array) -> Array:
        """Shape as it came."""
        lost = np.concatenate([[0.0], self._lost])[np.searchsorted(self._ends, times, side="right")]
        return np.asarray(times - self.first - lost)

    @property
    def note(self) -> str:
        if not self._ends.size:
            return ""
        return f"Not shown: {seconds_text(float(self._lost[-1]))} without any step, in {self._ends.size} stretches."


def _draw_workers(axes: Axes, data: RunData, clock: Clock, unit: float) -> None:
    steps = data.steps
    points = list(zip(steps.time, steps.workers, strict=True))
    points += [(_ended(row), number(row.get("world_size"))) for row in steps.changes]
    when, workers = np.array(sorted(point for point in points if np.isfinite(point).all())).reshape(-1, 2).T
    axes.step(clock(when) / unit, workers, where="post", color=TEXT)
    looks: dict[str, dict[str, Any]] = {
        "a worker lost": {"color": RED, "marker": "X"},
        "time limit": {"color": GOLD, "marker": "|", "markersize": 9},
        "other changes": {"color": PURPLE, "marker": "^"},
    }
    for name, look in looks.items():
        of_kind = [row for row in steps.changes if _kind(row) == name and np.isfinite(_ended(row))]
        if of_kind:
            x = clock(np.array([_ended(row) for row in of_kind])) / unit
            axes.plot(x, [number(row.get("world_size")) for row in of_kind], linestyle="", label=name, **look)
    axes.set_ylim(0, None if not workers.size else 1.2 * float(workers.max()) + 0.5)
    whole_numbers(axes.yaxis)
    axes.set_ylabel("workers")
    legend(axes)


def _kind(row: dict[str, Any]) -> str:
    if row.get("lost_ranks"):
        return "a worker lost"
    return "time limit" if row.get("reasons") == ["time limit"] else "other changes"


def _ended(row: dict[str, Any]) -> float:
    """When training went on; epoch s."""
    return number(row.get("noticed")) + number(row.get("recovery_s"))


def _change_row(row: dict[str, Any], clock: Clock) -> tuple[str, ...]:
    reasons = row.get("reasons")
    return (
        seconds_text(max(0.0, float(clock(np.array([_ended(row)]))[0]))),
        number_text(number(row.get("step")), 12),
        number_text(number(row.get("world_size"))),
        "; ".join(map(str, reasons)) if isinstance(reasons, list) else "?",
        seconds_text(number(row.get("recovery_s"))),
    )


def _binned(x: Array, y: Array) -> tuple[Array, Array]:
    """Medians of at most BARS groups of neighbours."""
    width = max(1, math.ceil(x.size / BARS))
    groups = [slice(i, i + width) for i in range(0, x.size, width)]
    middle = [[_known_median(values[g]) for g in groups] for values in (x, y)]
    return np.array(middle[0]), np.array(middle[1])


def _known_median(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else math.nan


def _range(points: list[tuple[float, float]]) -> tuple[float, float]:
    values = [value for _, value in points if math.isfinite(value)]
    return min(values), max(values)


def _shortened(name: str) -> str:
    """For a title of axes, where a dollar sign would begin a formula."""
    return plain(name if len(name) <= 60 else f"{name[:59]}…").replace("$", r"\$")
