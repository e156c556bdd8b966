"""What a report holds, section by section; a section that has nothing to show says why."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from smlt.client.bill import shown, shown_usd
from smlt.client.report.belief import Story, story_of, story_of_replay
from smlt.client.report.data import RunData, number
from smlt.client.report.forecasts import forecast_picture
from smlt.client.report.path import path_picture
from smlt.client.report.pictures import Picture, Table, drawing, number_text, seconds_text, usd_text
from smlt.client.report.search import search_pictures
from smlt.client.report.training import invocations, loss, memory, metrics, parts, speed
from smlt.client.report.workers import cost, losses, timeline
from smlt.errors import ConfigError

__all__ = ["Section", "contents_of", "pictures_of_search", "story_of_replay"]


@dataclass(frozen=True)
class Section:
    """A part of the page. `notes`: what is missing in it, and why."""

    name: str
    title: str
    pictures: tuple[Picture, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    notes: tuple[str, ...] = ()


def contents_of(data: RunData) -> list[Section]:
    """Everything that a run's folder has something for. ConfigError when matplotlib is not installed."""
    with drawing():
        return [
            _summary(data),
            _training(data),
            _speed(data),
            _workers(data),
            _cost(data),
            _goal(data),
            _search(data),
            *_functions(data),
            _missing(data),
        ]


def pictures_of_search(story: Story) -> list[Picture]:
    """The pictures of a search alone, for `pictures.write`; of a replay: `pictures_of_search(story_of_replay(...))`.

    ConfigError when matplotlib is not installed.
    """
    with drawing():
        return search_pictures(story)


def _summary(data: RunData) -> Section:
    return Section("summary", "Summary", tables=(("", Table(("", ""), tuple(_facts(data)))),))


def _facts(data: RunData) -> Iterator[tuple[str, str]]:
    status, config, steps = data.status, data.config, data.steps
    state = str(status.get("state", "?"))
    yield (
        "state",
        {"running": "under way: what follows is as far as it has come", "lost": "lost: its process is gone"}.get(state, state),
    )
    if status.get("error"):
        yield "error", str(status["error"])
    yield "script", str(config.get("script", "?"))
    place = f"Lambda, function {config.get('function', '?')}" if data.on_lambda else "processes on this machine"
    yield "workers", f"{config.get('workers', '?')} at the start: {place}"
    yield "training", f"epoch {status.get('epoch', 0)} of {config.get('epochs', '?')}, {steps.count:,} steps"
    last = status.get("metrics")
    for name, value in last.items() if isinstance(last, dict) else ():
        yield f"{name}, at last", number_text(number(value))
    started = number(status.get("started"))
    if math.isfinite(started):
        yield "started", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(started))
    if math.isfinite(data.seconds):
        yield "time" + (", so far" if data.under_way else ""), seconds_text(data.seconds)
    cost, spent = number(status.get("cost_usd")), number(status.get("spent_usd"))
    if math.isfinite(cost):
        yield "cost", usd_text(cost)
    elif math.isfinite(spent):
        yield "cost" + ("" if data.on_lambda else ", if they were functions"), usd_text(spent)
    for name, text in (("deadline_s", seconds_text), ("budget_usd", usd_text)):
        limit = data.decisions[-1].limit(name) if data.decisions else number(config.get(name))
        if math.isfinite(limit):
            yield name.partition("_")[0], text(limit)
    lost = sum(len(row["lost_ranks"]) for row in steps.changes if isinstance(row.get("lost_ranks"), list))
    yield "workers lost", str(lost)


def _training(data: RunData) -> Section:
    notes = []
    if not data.steps.count:
        notes.append("No step has been reported, so there is no loss to show.")
    if not data.steps.epochs:
        notes.append("No epoch is complete, so there are no metrics.")
    return Section("training", "Training", _drawn(loss(data.steps), metrics(data)), notes=tuple(notes))


def _speed(data: RunData) -> Section:
    made = _drawn(speed(data), parts(data.steps), memory(data))
    return Section("speed", "Speed", made, notes=() if made else ("Too few steps have been reported to speak of speed.",))


def _workers(data: RunData) -> Section:
    made, gone = _drawn(timeline(data)), losses(data)
    notes = () if made else ("No worker's start was written down, so it is not known who ran when.",)
    tables = () if gone is None else (("Workers that were lost", gone),)
    return Section("workers", "Workers", made, tables, notes)


def _cost(data: RunData) -> Section:
    made = _drawn(cost(data))
    why = "No cost is known yet." if data.on_lambda else "Nothing was paid: the workers are processes of this machine."
    return Section("cost", "Cost", made, notes=() if made else (why,))


def _goal(data: RunData) -> Section:
    made = _drawn(forecast_picture(data))
    why = "Nothing was forecast. A run with --deadline, --budget or --tune writes forecasts, to decisions.jsonl."
    return Section("goal", "Time and cost against the forecast", made, notes=() if made else (why,))


def _search(data: RunData) -> Section:
    made = list(_drawn(path_picture(data)))
    try:
        story, why = story_of(data)
    except ConfigError as error:
        story, why = None, str(error)
    if story is not None:
        made += search_pictures(story)
    notes = () if story is not None else (f"What the optimizer believed is not shown: {why}.",)
    return Section("search", "The choice of workers and memory", tuple(made), notes=notes)


def _functions(data: RunData) -> Iterator[Section]:
    if not data.on_lambda:
        return
    made = _drawn(invocations(data))
    notes = [] if made else ["No invocation has been reported yet."]
    tables = []
    if data.bill is not None:
        rows = [
            (item.name, shown(item.quantity), item.unit, f"{item.price_usd.normalize():f}", shown_usd(item.usd))
            for item in data.bill.items
        ]
        rows.append(("total", "", "", "", shown_usd(data.bill.total_usd)))
        tables.append(("Bill", Table(("item", "quantity", "unit", "USD each", "USD"), tuple(rows))))
        notes.append(f"Prices of {data.bill.region}, {data.bill.as_of}.")
        if data.bill.unreported:
            notes.append(f"{data.bill.unreported} of {data.bill.invocations} invocations are not in the bill yet.")
    else:
        notes.append("There is no bill.")
    yield Section("functions", "Functions and their cost", made, tuple(tables), tuple(notes))


def _missing(data: RunData) -> Section:
    unread = [f"{data.steps.unread} lines of metrics.jsonl could not be read"] if data.steps.unread else []
    notes = [*data.missing, *unread]
    return Section("missing", "What is missing", notes=tuple(notes) or ("Nothing: every file of the run was there and read.",))


def _drawn(*made: Picture | None) -> tuple[Picture, ...]:
    return tuple(one for one in made if one is not None)
