"""Follows a run's folder while somebody else writes it: the rows of its files as they come."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from smlt.client.events import FILE as EVENTS
from smlt.client.runs import Run
from smlt.client.steering import DECISIONS

Row = dict[str, Any]
METRICS = "metrics.jsonl"


class Tail:
    """The whole lines of a file that were added since the last call. The file may come later, or be replaced by another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replaced = 0  # times
        self._file: BinaryIO | None = None
        self._rest = b""

    def lines(self) -> Iterator[bytes]:
        """What is new."""
        yield from self._read()
        if self._is_another():
            self.close()
            self.replaced += 1
            yield from self._read()

    def skip(self) -> None:
        """What is there so far is not wanted."""
        for _ in self.lines():
            pass

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""

    def _read(self) -> Iterator[bytes]:
        if self._file is None:
            try:
                self._file = self.path.open("rb")
            except OSError:
                return
        for line in self._file:
            if not line.endswith(b"\n"):  # its writer is at it
                self._rest += line
                return
            whole, self._rest = self._rest + line, b""
            yield whole

    def _is_another(self) -> bool:
        if self._file is None:
            return False
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        mine = os.fstat(self._file.fileno())
        return (found.st_dev, found.st_ino) != (mine.st_dev, mine.st_ino) or found.st_size < self._file.tell() - len(self._rest)


def parsed(line: bytes) -> Row | None:
    """A line as the object it is; None when it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class Follower:
    """A run's rows as (event, row), in the order in which they were written within each file.

    Events: "step", "epoch", "membership" (metrics.jsonl), "decision" (decisions.jsonl), and those of events.jsonl. A resumed
    run replaces metrics.jsonl by its beginning: of that nothing is told twice.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._events, self._metrics, self._decisions = (Tail(run.path / name) for name in (EVENTS, METRICS, DECISIONS))
        self._newest = -math.inf  # time of the last step that was told
        self._replaced = 0
        self._known = True

    def skip(self) -> None:
        """What is there so far is not wanted."""
        for tail in (self._events, self._decisions):
            tail.skip()
        for _ in self.metrics_lines():  # their times are kept: the file may be replaced later
            pass

    def poll(self) -> Iterator[tuple[str, Row]]:
        """What is new."""
        for line in self._events.lines():
            row = parsed(line)
            if row is not None and isinstance(row.get("event"), str):
                yield str(row.pop("event")), row
        for line in self.metrics_lines():
            row = parsed(line)
            if row is not None and row.get("kind") in ("step", "epoch", "membership"):
                yield str(row.pop("kind")), row
        for line in self._decisions.lines():
            row = parsed(line)
            if row is not None:
                yield "decision", row

    def metrics_lines(self) -> Iterator[bytes]:
        """The new lines of metrics.jsonl, unread."""
        for line in self._metrics.lines():
            if self._metrics.replaced != self._replaced:
                self._replaced, self._known = self._metrics.replaced, False
            if not self._known and not self._is_new(line):
                continue
            self._known = True
            yield line
            self._keep_time(line)

    def _is_new(self, line: bytes) -> bool:
        """Of a file that has taken another's place: whether it is behind all that was told."""
        at = _time_of(line)
        return at is not None and at > self._newest

    def _keep_time(self, line: bytes) -> None:
        at = _time_of(line)
        if at is not None:
            self._newest = at

    def close(self) -> None:
        """Close the files."""
        for tail in (self._events, self._metrics, self._decisions):
            tail.close()


def _time_of(line: bytes) -> float | None:
    """Of a step's row, without reading all of it: `Records` writes its time at the end."""
    place = line.rfind(b'"time": ')
    if place < 0 or b'"kind": "step"' not in line[:20]:
        return None
    try:
        return float(line[place + 8 :].split(b"}")[0].split(b",")[0])
    except ValueError:
        return None
