"""What a person sees of a deployment: the plan and a progress bar on a terminal, lines in a pipe, JSON lines with --json."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from smlt.client.deployment.limits import size_text
from smlt.client.deployment.steps import Reporter, Step
from smlt.client.records import json_line

_STYLES = {"create": "green", "update": "yellow", "keep": "dim", "delete": "red"}


def make_reporter(*, as_json: bool, stream: TextIO | None = None) -> Reporter:
    """The one that fits: JSON lines when asked for, a bar on a terminal, else plain lines."""
    out = stream if stream is not None else sys.stdout
    if as_json:
        return JsonRows(out)
    return Bar(out) if out.isatty() else Lines(out)


class JsonRows:
    """One JSON object a line, "event" first: plan, warning, done, note, took-back, deployed or destroyed. Nothing else."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def _write(self, event: str, **values: Any) -> None:
        print(json_line({"event": event, **values}), file=self.out, flush=True)

    def planned(self, steps: Sequence[Step], warnings: Sequence[str]) -> None:
        for step in steps:
            self._write("plan", **step.row())
        for text in warnings:
            self._write("warning", text=text)

    def began(self, step: Step) -> None:
        pass

    def sent(self, done: int, total: int) -> None:
        pass

    def waiting(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        self._write("note", text=text)

    def done(self, step: Step) -> None:
        self._write("done", kind=step.kind, name=step.name, action=step.action)

    def took_back(self, what: str) -> None:
        self._write("took-back", what=what)

    def ended(self, row: dict[str, Any], line: str) -> None:
        print(json_line(row), file=self.out, flush=True)

    def close(self) -> None:
        pass


class Lines:
    """The plan as a table, then a line for each step."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def _say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def planned(self, steps: Sequence[Step], warnings: Sequence[str]) -> None:
        for step in steps:
            self._say(plan_line(step))
        for text in warnings:
            self._say(f"warning: {text}")

    def began(self, step: Step) -> None:
        self._say(f"{step.action} {step.kind} {step.name} ...")

    def sent(self, done: int, total: int) -> None:
        if done == total:
            self._say(f"  sent {size_text(total)}")

    def waiting(self, text: str) -> None:
        self._say(f"  waiting {text}")

    def note(self, text: str) -> None:
        self._say(f"  {text}")

    def done(self, step: Step) -> None:
        pass

    def took_back(self, what: str) -> None:
        self._say(f"removed again: {what}")

    def ended(self, row: dict[str, Any], line: str) -> None:
        self._say(line)

    def close(self) -> None:
        pass


class Bar:
    """The plan in colour, then a bar of steps with what is under way."""

    def __init__(self, out: TextIO) -> None:
        self.console = Console(file=out)
        columns = (SpinnerColumn(), BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("{task.description}"), console=self.console, transient=True)
        self.task = self.progress.add_task("", total=0)
        self.text = ""

    def planned(self, steps: Sequence[Step], warnings: Sequence[str]) -> None:
        for step in steps:
            self.console.print(Text(plan_line(step), style=_STYLES[step.action]), soft_wrap=True)
        for text in warnings:
            self.console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)
        self.progress.update(self.task, total=sum(step.run is not None for step in steps))

    def _show(self, text: str) -> None:
        self.progress.start()
        self.progress.update(self.task, description=text)

    def began(self, step: Step) -> None:
        self.text = f"{step.action} {step.kind} {step.name}"
        self._show(self.text)

    def sent(self, done: int, total: int) -> None:
        self._show(f"{self.text}: {size_text(done)} of {size_text(total)}")

    def waiting(self, text: str) -> None:
        self._show(f"{self.text}: waiting {text}")

    def note(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def done(self, step: Step) -> None:
        self.progress.advance(self.task)

    def took_back(self, what: str) -> None:
        self.console.print(Text(f"removed again: {what}", style="yellow"), soft_wrap=True)

    def ended(self, row: dict[str, Any], line: str) -> None:
        self.close()
        self.console.print(Text(line, style="bold"), soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


def plan_line(step: Step) -> str:
    """create  layer       smlt-digits   41 MB; the first version"""
    return f"{step.action:7} {step.kind:10}  {step.name}{'   ' if step.details else ''}{'; '.join(step.details)}"
