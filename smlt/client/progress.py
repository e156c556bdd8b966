"""What a person sees of a run: a live view on a terminal, plain lines in a pipe, JSON lines with --json."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from smlt.client.optimizer.goals import duration_text
from smlt.client.records import json_line
from smlt.client.runs import Run
from smlt.client.watching import Progress
from smlt.store.parameter import ServerInfo

#: A plain line at least this often while an epoch goes on.
LINE_EVERY_S = 10.0
#: A forecast at least this often, though nothing has been changed.
FORECAST_EVERY_S = 60.0


def make_progress(*, as_json: bool, stream: TextIO | None = None) -> Progress:
    """The view that fits: JSON lines when asked for, live on a terminal, else plain lines."""
    out = stream if stream is not None else sys.stdout
    if as_json:
        return JsonLines(out)
    return LiveView(Console(file=out)) if out.isatty() else PlainLines(out)


def metrics_text(metrics: dict[str, float]) -> str:
    """accuracy 0.9778, nats 1.2345"""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


class JsonLines:
    """One JSON object a line on stdout, "event" first: started, step, epoch, ended. Nothing else."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def _write(self, event: str, values: dict[str, Any]) -> None:
        self.out.write(json_line({"event": event, **values}) + "\n")  # at once: a Ctrl-C in between would leave half a line
        self.out.flush()

    def uploading(self, sent: int, total: int) -> None:
        self._write("uploading", {"bytes": sent, "total_bytes": total})

    def preparing(self, text: str) -> None:
        self._write("preparing", {"text": text})

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        version = ".".join(map(str, server.version))
        self._write(
            "started",
            {"run": run.name, "folder": str(run.path), "config": config, "store": f"{server.product} {version}"},
        )

    def step(self, row: dict[str, Any]) -> None:
        self._write("step", {name: value for name, value in row.items() if name != "kind"})

    def epoch(self, row: dict[str, Any]) -> None:
        self._write("epoch", {name: value for name, value in row.items() if name != "kind"})

    def membership(self, row: dict[str, Any]) -> None:
        self._write("membership", row)

    def decision(self, row: dict[str, Any]) -> None:
        self._write("decision", row)

    def warning(self, text: str) -> None:
        self._write("warning", {"text": text})

    def stopping(self) -> None:
        self._write("stopping", {})

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        self._write("ended", {"run": run.name, **status})


class PlainLines:
    """A line at the end of each epoch, and every ten seconds in between."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.losses: list[float] = []
        self.seconds = [0.0, 0.0]  # compute, communication: of the slowest worker, this epoch
        self.samples, self.began, self.said = 0, time.monotonic(), time.monotonic()
        self.epochs = 0
        self.foretold = -math.inf  # monotonic
        self.row: dict[str, Any] | None = None

    def _say(self, text: str) -> None:
        self.out.write(f"{text}\n")
        self.out.flush()
        self.said = time.monotonic()

    def uploading(self, sent: int, total: int) -> None:
        self._say(upload_line(sent, total))

    def preparing(self, text: str) -> None:
        self._say(text)

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        self.epochs = int(config["epochs"])
        version = ".".join(map(str, server.version))
        self._say(f"run {run.name}: {config['workers']} workers, store {server.product} {version}, folder {run.path}")

    def step(self, row: dict[str, Any]) -> None:
        if not self.losses:
            self.began = time.monotonic()
        if text := batch_line(self.row, row):
            self._say(text)
        self.row = row
        self.losses.append(row["loss"])
        self.samples += row["samples"]
        self.seconds[0] += max(row["compute_s"])
        self.seconds[1] += max(row["communication_s"])
        if time.monotonic() - self.said > LINE_EVERY_S:
            where = f"epoch {row['epoch'] + 1}/{self.epochs}, step {row['step']}"
            self._say(f"{where}: loss {row['loss']:.4f}, {row['samples_per_s']:.0f} samples/s")

    def epoch(self, row: dict[str, Any]) -> None:
        mean = sum(self.losses) / max(1, len(self.losses))
        rate = self.samples / max(1e-9, self.seconds[0] + self.seconds[1])
        metrics = metrics_text(row["metrics"])
        self._say(
            f"epoch {row['epoch'] + 1}/{self.epochs}: loss {mean:.4f}{', ' if metrics else ''}{metrics}, {rate:.0f} samples/s, "
            f"compute {self.seconds[0]:.2f} s, communication {self.seconds[1]:.2f} s"
        )
        self.losses, self.samples, self.seconds = [], 0, [0.0, 0.0]

    def membership(self, row: dict[str, Any]) -> None:
        self._say(change_line(row))

    def decision(self, row: dict[str, Any]) -> None:
        if row["action"] != "keep" or time.monotonic() - self.foretold > FORECAST_EVERY_S:
            self.foretold = time.monotonic()
            self._say(decision_line(row))

    def warning(self, text: str) -> None:
        self._say(f"warning: {text}")

    def stopping(self) -> None:
        self._say("stopping behind this step; Ctrl-C again ends at once")

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        if self.epochs or status["state"] == "done":  # a run that never started has its error and nothing else to show
            self._say(closing_line(run, status))


def closing_line(run: Run, status: dict[str, Any]) -> str:
    """How a run ended, in a line."""
    metrics = metrics_text(status.get("metrics") or {})
    seconds = status["ended"] - status["started"]
    text = f"{status['state']} after {status['step']} steps, {seconds:.1f} s" + (f": {metrics}" if metrics else "")
    if status["state"] == "stopped":
        text += f"\n{resume_line(run, status)}"
    return text


def upload_line(sent: int, total: int) -> str:
    """How far the upload of the data is, in a line."""
    return f"uploading the data: {sent / 1e6:,.0f} of {total / 1e6:,.0f} MB"


def change_line(row: dict[str, Any]) -> str:
    """How and why the membership has changed, in a line."""
    reasons = "; ".join(row["reasons"])
    return f"step {row['step']}: {reasons}: {row['world_size']} workers go on after {row['recovery_s']:.1f} s"


def decision_line(row: dict[str, Any]) -> str:
    """What was decided at a round's end, and how the run is expected to end, in a line."""
    if row["action"] != "switch":
        return f"step {row['step']}: {row['reason']}"
    chosen = f"{row['chosen']['workers']} workers" + (f" of {row['chosen']['memory_mb']} MB" if row["on_lambda"] else "")
    return f"step {row['step']}: goes on with {chosen}: {row['reason']}; {forecast_text(row)}"


def forecast_text(row: dict[str, Any]) -> str:
    """it will take 1h 12m (1h 05m to 1h 20m) in all and cost 2.31 USD (2.2 to 2.5)"""
    found = row["forecast"]
    middle, low, high = (duration_text(found[name]) for name in ("seconds", "seconds_low", "seconds_high"))
    text = f"it will take {middle} ({low} to {high}) in all"
    if row["on_lambda"]:
        text += f" and cost {found['usd']:.4g} USD ({found['usd_low']:.4g} to {found['usd_high']:.4g})"
    return text


def batch_line(before: dict[str, Any] | None, row: dict[str, Any]) -> str:
    """How the global batch has changed between two steps, in a line; "" when it has not."""
    size, old = row.get("global_batch_size"), (before or {}).get("global_batch_size")
    if before is None or old is None or size in (None, old):
        return ""
    lr = f", learning rate x {row['lr_factor']:.4g} since the beginning" if row["lr_factor"] != before["lr_factor"] else ""
    return f"epoch {row['epoch'] + 1}: global batch {size} instead of {old}{lr}"


def resume_line(run: Run, status: dict[str, Any]) -> str:
    """How to go on with a run, and from where."""
    step = status.get("checkpoint_step")
    where = f"from step {step}" if step else "from the beginning, there is no checkpoint yet"
    return f"resume {where} with: smlt resume {run.name} --runs-dir {run.runs_dir}"


class LiveView:
    """Redraws itself in place: one row a worker, with its time in computing and in communication."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, refresh_per_second=8, transient=False)
        self.title, self.epochs = "", 0
        self.warned = self.changed = self.decided = ""
        self.row: dict[str, Any] | None = None
        self.metrics: dict[str, float] = {}
        self.recent: deque[dict[str, Any]] = deque(maxlen=50)
        self.note = ""

    def uploading(self, sent: int, total: int) -> None:
        self.note = upload_line(sent, total)
        self.live.start()
        self.live.update(self._picture())

    def preparing(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        self.epochs = int(config["epochs"])
        version = ".".join(map(str, server.version))
        self.title = f"{run.name}: {config['workers']} workers on {server.product} {version}"
        self.note = "starting workers …"
        self.live.start()
        self.live.update(self._picture())

    def step(self, row: dict[str, Any]) -> None:
        self.changed = batch_line(self.row, row) or self.changed
        self.row, self.note = row, ""
        self.recent.append(row)
        self.live.update(self._picture())

    def epoch(self, row: dict[str, Any]) -> None:
        self.metrics = row["metrics"]
        self.live.update(self._picture())

    def membership(self, row: dict[str, Any]) -> None:
        self.changed = change_line(row)
        self.live.update(self._picture())

    def decision(self, row: dict[str, Any]) -> None:
        self.decided = decision_line(row)
        self.live.update(self._picture())

    def warning(self, text: str) -> None:
        self.warned = text
        self.live.update(self._picture())

    def stopping(self) -> None:
        self.note = "stopping behind this step; Ctrl-C again ends at once"
        self.live.update(self._picture())

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        if not self.epochs and status["state"] != "done":
            self.live.stop()
            return
        self.note = ""
        self.live.update(self._picture())
        self.live.stop()
        self.console.print(closing_line(run, status), highlight=False, soft_wrap=True)

    def _picture(self) -> Group:
        parts: list[Any] = [Text(self.title, style="bold")] if self.title else []
        if self.row is not None:
            rate = sum(row["samples_per_s"] for row in self.recent) / len(self.recent)
            where = f"epoch {self.row['epoch'] + 1}/{self.epochs}  step {self.row['step']}"
            line = f"{where}  loss {self.row['loss']:.4f}  {rate:,.0f} samples/s"
            metrics = metrics_text(self.metrics)
            parts.append(Text(line + (f"  {metrics}" if metrics else "")))
            parts.append(self._workers())
        for text in filter(None, (self.changed, self.decided, self.warned, self.note)):
            parts.append(Text(text, style="yellow"))
        return Group(*parts)

    def _workers(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("worker", "compute ms", "communication ms", "waiting for data ms", "memory MB"):
            table.add_column(name, justify="right")
        ranks = self.recent[-1]["ranks"]
        alike = [row for row in self.recent if row["ranks"] == ranks]  # of this membership
        for place, rank in enumerate(ranks):
            means = [sum(row[name][place] for row in alike) / len(alike) for name in ("compute_s", "communication_s", "data_s")]
            table.add_row(str(rank), *(f"{mean * 1e3:.1f}" for mean in means), f"{self.recent[-1]['rss_mb'][place]:.0f}")
        return table
