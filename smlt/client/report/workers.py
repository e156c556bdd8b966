"""Pictures of the workers: who did what when, with losses, replacements and re-invocations; what they have cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from smlt.client.lives import GATHERING, STARTING, TRAINING, WAITING, Life, Span
from smlt.client.prices import load_prices
from smlt.client.report.data import RunData, number
from smlt.client.report.pictures import (
    BLUE,
    FAINT,
    GOLD,
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
    whole_numbers,
)
from smlt.client.report.steps import Array
from smlt.client.report.training import ROWS_MAX, Clock

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: More bars than these are drawn as what each rank did most of the time in as many columns as come to that.
BARS_MAX = 6000
#: More changes of the membership than these are not drawn as lines.
GENERATIONS_MAX = 60
_LOOKS = {TRAINING: (BLUE, ""), GATHERING: (GOLD, ""), STARTING: (PURPLE, "////"), WAITING: (FAINT, "....")}
_NAMES = {TRAINING: "training", GATHERING: "membership changes", STARTING: "starting", WAITING: "spare, waiting"}

#: A lane of the picture, from when to when (epoch s), what was done.
Bar = tuple[int, float, float, str]


def timeline(data: RunData) -> Picture | None:
    """A lane for each rank, below them those of spares; None when no worker's start was written down."""
    lives, now = data.lives.all, data.last_time
    bars = _bars(lives, now)
    if not bars:
        return None
    clock = Clock.of_spans([(begin, end) for _, begin, end, _ in bars])
    unit, name = time_unit(clock.end_s)
    ranks = 1 + max(life.rank for life in lives)
    lanes = 1 + max(lane for lane, *_ in bars)
    shown, note = _thinned(bars, lanes)
    figure, (axes,) = new_figure(min(7.0, 1.5 + 0.24 * max(3, lanes)))
    for kind, (colour, hatch) in _LOOKS.items():
        _draw(axes, [bar for bar in shown if bar[3] == kind], clock, unit, colour, hatch, _NAMES[kind])
    if len(data.lives.generations) <= GENERATIONS_MAX:
        for one in data.lives.generations:
            axes.axvline(_at(clock, one.time) / unit, color=TEXT, linewidth=0.6, alpha=0.5, linestyle=":")
    _mark(axes, lives, clock, unit)
    axes.set_xlim(0, max(1.02 * clock.end_s, 1e-3) / unit)
    axes.set_ylim(lanes - 0.4, -0.6)
    if lanes <= 24:
        axes.set_yticks(range(lanes), [str(lane) if lane < ranks else "spare" for lane in range(lanes)])
    else:
        whole_numbers(axes.yaxis)
    axes.set_ylabel("rank")
    axes.set_xlabel(f"time from the first worker's start, {name}")
    axes.grid(visible=False, axis="y")
    legend(axes, ncols=4)
    lost, again = sum(life.is_lost for life in lives), sum(bool(life.before) for life in lives)
    spares = sum(life.spare for life in lives)
    alt = (
        f"Bars of {len(lives)} workers' lives in {ranks} ranks over {seconds_text(clock.end_s)}: {lost} lost, {again} went on "
    )
    alt += f"in another invocation, {spares} started as spares; {len(data.lives.generations)} generations."
    rest = [] if len(data.lives.generations) > GENERATIONS_MAX else ["Dotted lines: a generation goes on."]
    caption = " ".join([*rest, note, clock.note]).strip()
    return Picture("workers", "Who ran when", alt, figure, caption, _by_rank(lives, now))


def losses(data: RunData) -> Table | None:
    """Who was lost, when and how."""
    gone = [life for life in data.lives.all if life.is_lost]
    if not gone:
        return None
    began = min(life.started for life in data.lives.all)
    rows = [(life.worker_id, str(life.rank), seconds_text(max(0.0, life.ended - began)), life.how) for life in gone]
    return Table(("worker", "rank", "after", "it"), at_most(rows, ROWS_MAX))


def cost(data: RunData) -> Picture | None:
    """Cost over time; None where nothing was paid or counted."""
    found = _cost_of_lives(data) or _cost_of_rounds(data)
    if found is None:
        return None
    seconds, usd, what = found
    unit, name = time_unit(float(seconds[-1]))
    figure, (axes,) = new_figure(2.6)
    axes.plot(seconds / unit, usd, color=BLUE, marker="o" if seconds.size < 30 else None, label=what)
    total, budget = data.bill.total_usd if data.bill is not None else None, number(data.config.get("budget_usd"))
    if total is not None:
        axes.axhline(float(total), color=GREEN, linestyle="--", label="the bill")
    if math.isfinite(budget):
        axes.axhline(budget, color=RED, linestyle=":", label="budget")
    axes.set_ylim(0, None)
    axes.set_xlabel(f"time, {name}")
    axes.set_ylabel("USD")
    legend(axes)
    alt = f"A line of {what}: {usd_text(float(usd[-1]))} after {seconds_text(float(seconds[-1]))}"
    alt += f"; the bill is {usd_text(float(total))}." if total is not None else "."
    return Picture("cost", "Cost over time", alt, figure)


def _cost_of_lives(data: RunData) -> tuple[Array, Array, str] | None:
    """What functions cost that were there as the workers were."""
    memory_mb, lives = number(data.config.get("memory_mb")), data.lives.all
    if not (data.on_lambda and memory_mb > 0 and lives):
        return None
    prices = load_prices()
    architecture = "arm64" if data.status.get("architecture") == "arm64" else "x86_64"
    a_second = float(prices[f"lambda.{architecture}.gb-second"].usd) * memory_mb / 1024
    a_request = float(prices["lambda.million-requests"].usd) / 1e6
    began = np.array([life.started for life in lives])
    ended = np.array([life.ended if life.is_over else data.last_time for life in lives])
    times = np.linspace(began.min(), max(float(ended.max()), float(began.min()) + 1e-3), 200)
    usd = [
        a_second * float(np.clip(np.minimum(at, ended) - began, 0, None).sum()) + a_request * int((began <= at).sum())
        for at in times
    ]
    return times - times[0], np.array(usd), "functions' time and requests"


def _cost_of_rounds(data: RunData) -> tuple[Array, Array, str] | None:
    """What the run had counted at the end of each round."""
    points = sorted((one.elapsed_s, one.spent_usd) for one in data.decisions)
    points = [point for point in points if all(0 <= value < 1e12 for value in point)]
    if not points:
        return None
    seconds, usd = np.array([(0.0, 0.0), *points]).T
    return seconds, usd, "counted by the run" if data.on_lambda else "what functions would have cost"


def _bars(lives: list[Life], now: float) -> list[Bar]:
    """Ranks have their lanes; a spare has the first lane below them that is free."""
    ranks = 1 + max((life.rank for life in lives), default=0)
    found, free = list[Bar](), list[float]()
    for life in lives:
        lane = -1
        for span in life.spans:
            end = _end(span, life, now)
            if end < span.begin:
                continue
            if span.rank < 0 and lane < 0:
                lane = next((i for i, until in enumerate(free) if until <= span.begin), len(free))
                free[lane:] = [*free[lane:], 0.0] if lane == len(free) else free[lane:]
            if span.rank < 0:
                free[lane] = end
            found.append((span.rank if span.rank >= 0 else ranks + lane, span.begin, end, span.kind))
    return found


def _end(span: Span, life: Life, now: float) -> float:
    ends = (span.end, life.ended, now)
    return next((end for end in ends if not math.isnan(end)), span.begin)


def _thinned(bars: list[Bar], lanes: int) -> tuple[list[Bar], str]:
    """As they are, or what each lane did most of the time in each of so many columns, and a sentence that says so."""
    if len(bars) <= BARS_MAX:
        return bars, ""
    columns = max(20, BARS_MAX // lanes)
    begin, end = min(bar[1] for bar in bars), max(bar[2] for bar in bars)
    width = (end - begin) / columns
    kinds = list(_LOOKS)
    table = np.zeros((lanes, columns, len(kinds)))  # seconds
    for lane, start, stop, kind in bars:
        first, last = (min(columns - 1, int((at - begin) / width)) for at in (start, stop))
        for column in range(first, last + 1):
            low, high = begin + column * width, begin + (column + 1) * width
            table[lane, column, kinds.index(kind)] += max(0.0, min(stop, high) - max(start, low))
    found = list[Bar]()
    for lane in range(lanes):
        for column in range(columns):
            if not table[lane, column].any():
                continue
            kind, at = kinds[int(table[lane, column].argmax())], begin + column * width
            if found and found[-1][0] == lane and found[-1][3] == kind and abs(found[-1][2] - at) < width / 2:
                found[-1] = (lane, found[-1][1], at + width, kind)
            else:
                found.append((lane, at, at + width, kind))
    return found, f"{len(bars):,} bars are shown as what was done most of the time in {columns} columns."


def _at(clock: Clock, time: float) -> float:
    return float(clock(np.array([time]))[0])


def _draw(axes: Axes, bars: list[Bar], clock: Clock, unit: float, colour: str, hatch: str, label: str) -> None:
    """All bars of a kind as one path: a tenth of the size of as many elements."""
    if not bars:
        return
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    left, right = (clock(np.array([bar[i] for bar in bars])) / unit for i in (1, 2))
    low = np.array([bar[0] for bar in bars]) - 0.36
    corners = [(left, low), (right, low), (right, low + 0.72), (left, low + 0.72), (left, low)]
    points = np.stack([np.stack(corner, axis=1) for corner in corners], axis=1).reshape(-1, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(bars))
    look = {"facecolor": colour, "edgecolor": colour, "alpha": 0.6, "hatch": hatch, "linewidth": 0.4}
    axes.add_patch(PathPatch(Path(points, codes), label=label, **look))


def _mark(axes: Axes, lives: list[Life], clock: Clock, unit: float) -> None:
    """Losses, those that took a lost one's place, further invocations."""
    lost = [(life.ended, life.rank) for life in lives if life.is_lost]
    replaced = list(_replacements(lives))
    again = [(life.started, life.rank) for life in lives if life.before]
    for points, colour, marker, label in (
        (lost, RED, "X", "lost"),
        (replaced, GREEN, "^", "in its place"),
        (again, TEXT, "|", "next invocation"),
    ):
        if points:
            times, ranks = np.array(points[:BARS_MAX]).T
            axes.plot(clock(times) / unit, ranks, color=colour, marker=marker, linestyle="", label=label)


def _replacements(lives: list[Life]) -> Iterator[tuple[float, int]]:
    """When a worker began to train in the rank of one that was lost before."""
    lost: dict[int, float] = {}
    for life in lives:
        if life.is_lost:
            lost.setdefault(life.rank, life.ended)
    for life in lives:
        first = next((span for span in life.spans if span.kind == TRAINING), None)
        if first is not None and first.begin >= lost.get(first.rank, math.inf):
            yield first.begin, first.rank


def _by_rank(lives: list[Life], now: float) -> Table:
    """Starts, losses and seconds by rank."""
    rows = list[tuple[str, ...]]()
    for rank in sorted({life.rank for life in lives}):
        of_rank = [life for life in lives if life.rank == rank]
        spent = dict.fromkeys(_LOOKS, 0.0)
        for life in of_rank:
            for span in life.spans:
                spent[span.kind] += max(0.0, _end(span, life, now) - span.begin)
        counts = (len(of_rank), sum(life.is_lost for life in of_rank), sum(bool(life.before) for life in of_rank))
        rows.append((str(rank), *map(str, counts), *(f"{seconds:,.1f}" for seconds in spent.values())))
    header = ("rank", "workers", "lost", "re-invoked", "training s", "changes s", "starting s", "spare s")
    return Table(header, at_most(rows, ROWS_MAX))
