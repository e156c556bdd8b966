"""What a person sees of a sweep: a live view on a terminal, plain lines in a pipe, JSON lines; the table at its end."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections import Counter
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from smlt.client.optimizer.goals import duration_text, usd_text
from smlt.client.progress import metrics_text
from smlt.client.records import json_line
from smlt.client.sweep.folder import SweepFolder
from smlt.client.sweep.halving import FAILED, LEFT_OUT, RUNNING, STATES, WAITING, Halving, Trial
from smlt.client.sweep.request import SweepRequest, point_text, split, value_text

#: Lines of the live view's table: those that run, then the best.
SHOWN = 12


class Display(Protocol):
    """Whoever shows a sweep."""

    def started(self, folder: SweepFolder, request: SweepRequest, halving: Halving) -> None:
        """It begins, or goes on."""

    def begun(self, trial: Trial, epochs: int) -> None:
        """A trial's rung has begun; it ends when so many epochs are trained."""

    def event(self, trial: Trial, event: dict[str, Any]) -> None:
        """What a trial's `smlt train --json` has said."""

    def trial(self, trial: Trial, halving: Halving) -> None:
        """A trial's rung has ended."""

    def warning(self, text: str) -> None:
        """Something to know."""

    def ended(self, folder: SweepFolder, request: SweepRequest, halving: Halving, state: str) -> None:
        """The sweep has ended: "done" or "stopped"."""


def make_display(*, as_json: bool, stream: TextIO | None = None) -> Display:
    """The view that fits: JSON lines when asked for, live on a terminal, else plain lines."""
    out = stream if stream is not None else sys.stdout
    if as_json:
        return JsonLines(out)
    return LiveView(Console(file=out)) if out.isatty() else PlainLines(out)


class JsonLines:
    """One JSON object a line, "event" first: started, begun, epoch, trial, warning, ended."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def _write(self, event: str, values: dict[str, Any]) -> None:
        self.out.write(json_line({"event": event, **values}) + "\n")
        self.out.flush()

    def started(self, folder: SweepFolder, request: SweepRequest, halving: Halving) -> None:
        self._write(
            "started",
            {"sweep": folder.name, "folder": str(folder.path), "trials": len(halving.trials), "rungs": list(halving.rungs)},
        )

    def begun(self, trial: Trial, epochs: int) -> None:
        self._write(
            "begun", {"trial": trial.number, "rung": trial.rung, "epochs": epochs, "hyperparameters": trial.hyperparameters}
        )

    def event(self, trial: Trial, event: dict[str, Any]) -> None:
        if event.get("event") == "epoch":
            self._write("epoch", {"trial": trial.number, "epoch": event["epoch"], "metrics": event["metrics"]})
        elif event.get("event") == "warning":
            self._write("warning", {"trial": trial.number, "text": event["text"]})

    def trial(self, trial: Trial, halving: Halving) -> None:
        self._write("trial", {"trial": trial.number, **trial.as_json()})

    def warning(self, text: str) -> None:
        self._write("warning", {"text": text})

    def ended(self, folder: SweepFolder, request: SweepRequest, halving: Halving, state: str) -> None:
        best = halving.best()
        self._write(
            "ended",
            {
                "state": state,
                "trials": [trial.as_json() for trial in halving.ranking()],
                "best": None if best is None else {"run": folder.run_name(best.number), **best.as_json()},
                "commands": commands(folder, request, best),
            },
        )


class PlainLines:
    """A line for each rung of a trial that has ended, and the table at the end."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.metric = out, ""

    def _say(self, text: str) -> None:
        self.out.write(f"{text}\n")
        self.out.flush()

    def started(self, folder: SweepFolder, request: SweepRequest, halving: Halving) -> None:
        self.metric = request.metric
        self._say(opening(folder, request, halving))

    def begun(self, trial: Trial, epochs: int) -> None:
        """Its end is news, its beginning is not."""

    def event(self, trial: Trial, event: dict[str, Any]) -> None:
        if event.get("event") == "warning":
            self._say(f"trial {trial.number}: warning: {event['text']}")

    def trial(self, trial: Trial, halving: Halving) -> None:
        self._say(trial_line(trial, halving, self.metric))

    def warning(self, text: str) -> None:
        self._say(f"warning: {text}")

    def ended(self, folder: SweepFolder, request: SweepRequest, halving: Halving, state: str) -> None:
        closing(Console(file=self.out, width=200), folder, request, halving, state)
        self.out.flush()


class LiveView:
    """Redraws itself in place: how many trials stand where, those that run, and the best so far."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, refresh_per_second=4, transient=True)
        self.title = self.warned = ""
        self.request = SweepRequest("")
        self.halving: Halving | None = None
        self.rows: dict[int, dict[str, Any]] = {}  # by trial: its newest step or epoch
        self.goals: dict[int, int] = {}

    def started(self, folder: SweepFolder, request: SweepRequest, halving: Halving) -> None:
        self.title, self.request, self.halving = opening(folder, request, halving), request, halving
        self.live.start()
        self.live.update(self._picture())

    def begun(self, trial: Trial, epochs: int) -> None:
        self.goals[trial.number] = epochs
        self.live.update(self._picture())

    def event(self, trial: Trial, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "warning":
            self.warned = f"trial {trial.number}: {event['text']}"
        elif kind in ("step", "epoch"):
            self.rows.setdefault(trial.number, {}).update(event)
        self.live.update(self._picture())

    def trial(self, trial: Trial, halving: Halving) -> None:
        self.live.update(self._picture())

    def warning(self, text: str) -> None:
        self.warned = text
        self.live.update(self._picture())

    def ended(self, folder: SweepFolder, request: SweepRequest, halving: Halving, state: str) -> None:
        self.live.stop()
        closing(self.console, folder, request, halving, state)

    def _picture(self) -> Group:
        assert self.halving is not None
        table = Table(box=None, pad_edge=False)
        for name in ("trial", "", "epoch", self.request.metric, "loss"):
            table.add_column(name, justify="left" if not name else "right")
        running = self.halving.running()
        for trial in running:
            row = self.rows.get(trial.number, {})
            value, loss = row.get("metrics", {}).get(self.request.metric), row.get("loss")
            table.add_row(
                str(trial.number),
                point_text(trial.hyperparameters),
                f"{row['epoch'] + 1 if row else trial.epochs}/{self.goals.get(trial.number, '?')}",
                "" if value is None else f"{value:.4f}",
                "" if loss is None else f"{loss:.4f}",
                style="bold",
            )
        for trial in [one for one in self.halving.ranking() if one.values and one not in running][: SHOWN - len(running)]:
            table.add_row(str(trial.number), point_text(trial.hyperparameters), str(trial.epochs), f"{trial.value:.4f}", "")
        parts: list[Any] = [Text(self.title, style="bold"), Text(standing(self.halving)), table]
        return Group(*parts, *([Text(self.warned, style="yellow")] if self.warned else []))


def opening(folder: SweepFolder, request: SweepRequest, halving: Halving) -> str:
    """sweep NAME: 20 trials, 2 at once of 1 workers, compared after 2, 6, 18 epochs, folder ..."""
    compared = f"compared after epochs {', '.join(map(str, halving.rungs))}" if len(halving.rungs) > 1 else "no halving"
    return (
        f"sweep {folder.name}: {len(halving.trials)} trials, {min(request.slots, len(halving.trials))} at once with "
        f"{request.workers} worker{'s' * (request.workers > 1)} each, {compared}, folder {folder.path}"
    )


def standing(halving: Halving) -> str:
    """4 waiting, 2 running, 9 dropped"""
    counts = Counter(trial.state for trial in halving.trials.values())
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def trial_line(trial: Trial, halving: Halving, metric: str) -> str:
    """How a trial's rung has ended, in a line."""
    about = f"trial {trial.number} ({point_text(trial.hyperparameters)})"
    if trial.state == FAILED:
        return f"{about} failed: {trial.error}"
    early = ", where it ended by itself" if trial.over else ""
    return f"{about}: {metrics_text({metric: trial.value})} after epoch {trial.epochs}{early}; {standing(halving)}"


def closing(console: Console, folder: SweepFolder, request: SweepRequest, halving: Halving, state: str) -> None:
    """The table of all trials, the best one first, and what to do with it."""
    usd = sum(trial.usd for trial in halving.trials.values())
    names = list(dict.fromkeys(name for trial in halving.trials.values() for name in trial.hyperparameters))
    table = Table(box=None, pad_edge=False)
    for name in ("trial", *names, "epochs", request.metric, "time", *(["USD"] if usd else []), "state"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for trial in halving.ranking():
        table.add_row(
            str(trial.number),
            *(value_text(trial.hyperparameters[name]) if name in trial.hyperparameters else "" for name in names),
            str(trial.epochs),
            "" if math.isnan(trial.value) else f"{trial.value:.4f}",
            duration_text(trial.seconds) if trial.seconds else "",
            *([usd_text(trial.usd)] if usd else []),
            trial.state if trial.error is None else f"{trial.state}: {trial.error}",
        )
    console.print(table)
    began = folder.state.get("began") or time.time()
    cost = f", {usd_text(usd)} USD" if usd else ""
    console.print(f"{state} after {duration_text(time.time() - float(began))}{cost}: {standing(halving)}", highlight=False)
    best = halving.best()
    if best is not None:
        text = f"best: trial {best.number}, {metrics_text({request.metric: best.value})}: {point_text(best.hyperparameters)}"
        console.print(text, highlight=False, soft_wrap=True)
    for text in commands(folder, request, best).values():
        console.print(f"  {text}", highlight=False, soft_wrap=True, markup=False)


def commands(folder: SweepFolder, request: SweepRequest, best: Trial | None) -> dict[str, str]:
    """What to do next, as commands: train the best trial further, train it anew, go on with the sweep."""
    found = {}
    if best is not None:
        where = folder.path / folder.run_name(best.number)
        found["further"] = shlex.join(["smlt", "resume", str(where), "--epochs", str(2 * max(best.epochs, 1))])
        options, hyperparameters = split(best.hyperparameters)
        given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value_text(value))]
        given += [text for name, value in hyperparameters.items() for text in ("--set", f"{name}={value_text(value)}")]
        again = ["smlt", "train", request.script, "--workers", str(request.workers), "--epochs", str(request.epochs)]
        if request.seed and "seed" not in options:
            given += ["--seed", str(request.seed)]
        found["anew"] = shlex.join([*again, *request.train_options, *given])
    trials = folder.trials()
    highest = max(trial.rung for trial in trials)  # who was left out of an earlier rung stays out: it has been decided
    unfinished = [t for t in trials if t.state in (WAITING, RUNNING) or (t.state == LEFT_OUT and t.rung == highest)]
    if any(trial.state != LEFT_OUT for trial in unfinished):
        found["resume"] = shlex.join(["smlt", "sweep", "--resume", str(folder.path)])
    elif unfinished:
        limit = ["--budget", "USD"] if request.budget_usd is not None else ["--deadline", "TIME"]
        found["resume"] = shlex.join(["smlt", "sweep", "--resume", str(folder.path), *limit])
    return found
