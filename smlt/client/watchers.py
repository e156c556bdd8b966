"""Ways to watch a run from another process: a live view, plain lines, events, one frame. Each returns the run's last state."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live

from smlt.client.dashboard import frame
from smlt.client.following import Row
from smlt.client.overview import Overview, follow
from smlt.client.progress import metrics_text
from smlt.client.records import json_line
from smlt.client.runs import Run

#: A plain line at least this often while nothing else is to be told.
LINE_EVERY_S = 10.0


def write_frame(run: Run, out: TextIO, *, as_json: bool, now: float) -> str:
    """How the run stands, once."""
    overview = Overview(run)
    overview.refresh()
    if as_json:
        out.write(json_line(overview.to_dict(now)) + "\n")
    else:
        console = Console(file=out, highlight=False)
        console.print(frame(overview, console.width, 60, now))
    out.flush()
    overview.close()
    return overview.state


def write_events(run: Run, write: Callable[[str, Row], None], every_s: float) -> str:
    """Every event from now on: "watching" first, "ended" last."""
    write("watching", {"run": run.name, "folder": str(run.path), "config": run.config, "status": run.status})
    state = "lost"
    for event, row in follow(run, every_s):
        write(event, row)
        state = str(row.get("state")) if event == "ended" else state
    return state


def watch_live(run: Run, out: TextIO, every_s: float) -> str:
    """Redrawn in place until the run ends; the last frame stays."""
    console = Console(file=out, highlight=False)
    overview = Overview(run)
    overview.refresh()
    try:
        with Live(console=console, auto_refresh=False, transient=False, vertical_overflow="crop") as live:
            while True:
                live.update(frame(overview, console.width, console.height), refresh=True)
                if overview.is_over:
                    return overview.state
                time.sleep(every_s)
                overview.refresh()
    finally:
        overview.close()


def watch_in_lines(run: Run, out: TextIO, every_s: float) -> str:
    """A line for how it stands, one for each epoch and event from then on, one for how it ended."""

    def say(text: str) -> None:
        out.write(f"{text}\n")
        out.flush()

    overview = Overview(run)
    overview.refresh()
    say(_line(overview))
    said = time.monotonic()
    try:
        while not overview.is_over:
            time.sleep(every_s)
            overview.events.clear()
            found = overview.refresh()
            lines = [text for _, text in overview.events]
            lines += [_line(overview)] if any(event == "epoch" for event, _ in found) else []
            if not lines and time.monotonic() - said > LINE_EVERY_S:
                lines = [_line(overview)]
            for text in lines:
                said = time.monotonic()
                say(text)
    finally:
        overview.close()
    say(f"{run.name}: {_ended(overview)}")
    return overview.state


def _line(overview: Overview) -> str:
    parts = [f"epoch {overview.epochs_done}/{overview.epochs}, step {overview.step}"]
    if math.isfinite(overview.loss.last):
        parts.append(f"loss {overview.loss.last:.4f}")
    if overview.metrics:
        parts.append(metrics_text(overview.metrics))
    if math.isfinite(overview.samples_per_s):
        parts.append(f"{overview.samples_per_s:,.0f} samples/s")
    there = len(overview.lives.members)
    parts.append(f"{there} workers" if there else "no workers")
    if math.isfinite(left := overview.left_s()) and not overview.is_over:
        parts.append(f"{left:,.0f} s left")
    if math.isfinite(cost := overview.cost_usd(time.time())):
        parts.append(f"{cost:.4f} USD")
    return f"{overview.run.name} {overview.state}: {', '.join(parts)}"


def _ended(overview: Overview) -> str:
    text = f"{overview.state} after {overview.step} steps"
    if overview.metrics:
        text += f": {metrics_text(overview.metrics)}"
    return text + (f" ({json.dumps(overview.status['error'])})" if overview.status.get("error") else "")
