"""One frame of `smlt watch`: an Overview as rich shows it, as wide as the terminal and no higher."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from smlt.client.lives import GATHERING, STARTING, TRAINING, WAITING, Life
from smlt.client.optimizer.goals import duration_text
from smlt.client.overview import Overview, is_gathering
from smlt.client.progress import forecast_text, metrics_text

_BLOCKS = "▁▂▃▄▅▆▇█"
_LOOKS = {TRAINING: "green", STARTING: "yellow", WAITING: "cyan", GATHERING: "yellow"}
_STATES = {"running": "green", "done": "bold green", "stopped": "yellow", "failed": "bold red", "lost": "bold red"}
#: Lines of the frame beside workers and events.
_OTHERS = 11
EVENTS_SHOWN = 5


def sparkline(values: Sequence[float], width: int) -> str:
    """The curve in one line of text: means of neighbours, from the least to the greatest."""
    known = [value for value in values if math.isfinite(value)]
    if not known or width < 1:
        return ""
    count = min(width, len(known))
    edges = [round(i * len(known) / count) for i in range(count + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def frame(overview: Overview, width: int, height: int, now: float | None = None) -> RenderableType:
    """Everything in `width` columns and about `height` lines."""
    now = time.time() if now is None else now
    parts: list[RenderableType] = [_title(overview, width), _progress(overview, width), _curves(overview, width)]
    parts.append(_numbers(overview, now))
    events = list(overview.events)[-EVENTS_SHOWN:]
    room = max(3, height - _OTHERS - len(events))
    if overview.lives.there or overview.recent:
        parts += [Text(""), _workers(overview, room, width, now)]
    if events:
        parts += [Text(""), *(_event(at, text, width) for at, text in events)]
    if overview.status.get("error"):
        parts.append(Text(str(overview.status["error"]).splitlines()[0], style="bold red"))
    return Group(*parts)


def _title(overview: Overview, width: int) -> Text:
    config = overview.config
    on = config.get("on", "local")
    place = {"lambda": f"Lambda, function {config.get('function', '?')}", "local": "on this machine"}.get(on, f"by {on}")
    state = overview.state + (" (its process is gone)" if overview.state == "lost" else "")
    text = Text.assemble((overview.run.name, "bold"), "  ", (state, _STATES.get(overview.state, "")), f"  {place}")
    text.truncate(width, overflow="ellipsis")
    return text


def _progress(overview: Overview, width: int) -> RenderableType:
    part = overview.part_done
    where = f"epoch {min(overview.epochs_done + 1, overview.epochs) if not overview.is_over else overview.epochs_done}"
    where += f"/{overview.epochs}  step {overview.step:,}"
    left = overview.left_s()
    if overview.is_over:
        ends = ""
    elif math.isnan(left):
        ends = "time left: not known yet"
    else:
        ends = f"{duration_text(left)} left"
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    bar = ProgressBar(total=1.0, completed=0.0 if math.isnan(part) else part, width=max(10, min(40, width - 50)))
    table.add_row(bar, "" if math.isnan(part) else f"{part:.0%}", f"{where}  {ends}".rstrip())
    return table


def _curves(overview: Overview, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    room = max(8, min(60, width - 34))
    for name, curve in (("loss", overview.loss), ("accuracy", overview.accuracy)):
        line = sparkline(curve.points, room)
        if line:
            table.add_row(name, Text(line, style="blue"), f"{curve.last:.4f}")
    if table.row_count:
        return table
    return Text("no step is complete yet" if not overview.is_over else "no step was completed", style="dim")


def _numbers(overview: Overview, now: float) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    rate, cost = overview.samples_per_s, overview.cost_usd(now)
    shown = [f"{rate:,.0f} samples/s" if math.isfinite(rate) else "samples/s not known yet"]
    if math.isfinite(overview.step_s):
        shown.append(f"{overview.step_s * 1e3:,.1f} ms a step")
    others = {name: value for name, value in overview.metrics.items() if name != "accuracy"}
    if others:
        shown.append(metrics_text(others))
    if math.isfinite(cost):
        paid = overview.config.get("on") == "lambda"
        so_far = "" if overview.is_over else " so far"
        shown.append(f"{cost:.4f} USD{so_far}{'' if paid else ', were they functions'}")
    table.add_row("   ".join(shown))
    if overview.decision is not None and not overview.is_over:
        table.add_row(forecast_text(overview.decision))
    quiet = overview.quiet_s(now)
    if is_gathering(overview) and not overview.is_over:
        table.add_row(Text("the membership changes: the workers gather", style="yellow"))
    elif quiet:
        table.add_row(Text(f"no step for {duration_text(quiet)}", style="yellow"))
    return table


def _workers(overview: Overview, room: int, width: int, now: float) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    wide = width >= 90
    columns = ["rank", "state", "step", "age", "restarts", "invoked"]
    columns += ["compute ms", "exposed ms", "hidden ms", "data ms"] if wide else []
    for name in [*columns, "MB"]:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    means = _means(overview)
    restarts, again = overview.lives.restarts(), overview.lives.invocations()
    there = sorted(overview.lives.there, key=lambda one: (one.kind == WAITING, one.rank))
    for life in there[:room]:
        numbers = means.get(life.rank, {}) if life.kind != WAITING else {}
        cells: list[str | Text] = [
            str(life.rank) if life.kind != WAITING else "-",
            Text(_kind(life), style=_LOOKS.get(life.kind, "")),
        ]
        cells += [f"{numbers['step']:,.0f}" if numbers else "", duration_text(life.seconds(now))]
        cells += [str(restarts.get(life.rank, 0) or "-"), str(1 + again.get(life.rank, 0)) if not life.spare else "1"]
        for name in ("compute_s", "communication_s", "hidden_s", "data_s") if wide else ():
            cells.append(f"{numbers[name] * 1e3:,.1f}" if numbers else "")
        table.add_row(*cells, f"{numbers['rss_mb']:,.0f}" if numbers else "")
    if not there:  # they have ended, or the run is of an earlier version
        ranks = len(overview.recent[-1]["ranks"]) if overview.recent else 0
        return Text(f"{ranks} workers took part in the last step", style="dim")
    if len(there) <= room:
        return table
    kinds = [life.kind for life in there[room:]]
    rest = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return Group(table, Text(f"and {len(kinds)} more: {rest}", style="dim"))


def _kind(life: Life) -> str:
    if life.kind == WAITING:
        return "spare, waiting"
    return f"{life.kind} (spare)" if life.spare and life.kind == STARTING else life.kind


def _means(overview: Overview) -> dict[int, dict[str, float]]:
    """By rank: medians over the last steps with this membership."""
    if not overview.recent:
        return {}
    ranks = overview.recent[-1]["ranks"]
    alike = [row for row in overview.recent if row["ranks"] == ranks]
    found: dict[int, dict[str, float]] = {}
    for place, rank in enumerate(ranks):
        try:
            numbers = {name: median(row[name][place] for row in alike) for name in ("compute_s", "communication_s", "data_s")}
            total = median(row["communication_total_s"][place] for row in alike)
            rss_mb = float(alike[-1]["rss_mb"][place])
        except (KeyError, IndexError, TypeError):
            continue
        hidden = max(0.0, total - numbers["communication_s"])
        found[int(rank)] = {**numbers, "hidden_s": hidden, "rss_mb": rss_mb, "step": float(overview.step)}
    return found


def _event(at: float, text: str, width: int) -> Text:
    line: Any = Text.assemble((time.strftime("%H:%M:%S", time.localtime(at)), "dim"), f"  {text}")
    line.truncate(width, overflow="ellipsis")
    found: Text = line
    return found
