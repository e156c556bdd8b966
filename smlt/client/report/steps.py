"""metrics.jsonl, however long: a thousand points of each curve, in one pass and little memory.

A run may have a million steps, and a row is some hundred bytes for each worker. Of every step's row the loss is taken, which
costs a microsecond; all of it is parsed for one row in so many only. Rows of epochs and of changes are all read.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Row = dict[str, Any]

#: Points of a curve.
POINTS_MAX = 1000
#: A step's row as Records writes it: the loss is in front, or null when it was not finite.
_STEP = re.compile(rb'\{"kind": "step", "step": (\d+), "epoch": \d+, "loss": ([^,]+),')
#: What a row has for each worker, and the seconds of a step that are shown as parts of it.
PARTS = ("compute_s", "communication_s", "data_s")
_EACH = (*PARTS, "communication_total_s", "rss_mb")


@dataclass(frozen=True)
class Steps:
    """The steps of a run as curves.

    `loss_step`, `loss`, `loss_low`, `loss_high`: mean, least and greatest loss of so many neighbouring steps, shape (p,).
    `step`, `time` (epoch s), `workers`, `samples`, `mean` and `most` (name -> mean and greatest of the workers): of the rows
    that were parsed, one in `every`, shape (q,). `count`: rows of steps in all.
    """

    exists: bool = False
    count: int = 0
    every: int = 1
    loss_step: Array = field(default_factory=lambda: np.empty(0))
    loss: Array = field(default_factory=lambda: np.empty(0))
    loss_low: Array = field(default_factory=lambda: np.empty(0))
    loss_high: Array = field(default_factory=lambda: np.empty(0))
    step: Array = field(default_factory=lambda: np.empty(0))
    time: Array = field(default_factory=lambda: np.empty(0))
    workers: Array = field(default_factory=lambda: np.empty(0))
    samples: Array = field(default_factory=lambda: np.empty(0))
    mean: dict[str, Array] = field(default_factory=dict)
    most: dict[str, Array] = field(default_factory=dict)
    epochs: tuple[Row, ...] = ()
    changes: tuple[Row, ...] = ()
    unread: int = 0

    @property
    def first_time(self) -> float:
        """Of the first step, epoch s; nan without one."""
        return float(self.time[0]) if self.time.size else math.nan

    @property
    def last_time(self) -> float:
        """Of the last step that was parsed."""
        return float(self.time[-1]) if self.time.size else math.nan

    @property
    def samples_per_s(self) -> Array:
        """Samples between neighbouring rows by the time between them, shape (q,); the first is nan.

        Over all the steps in between: a pause, a restart is in it.
        """
        if self.time.size < 2:
            return np.full(self.time.size, np.nan)
        seconds = np.diff(self.time)
        samples = np.diff(self.step) * (self.samples[1:] + self.samples[:-1]) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.concatenate([[np.nan], np.where(seconds > 0, samples / seconds, np.nan)])


class _Thinned:
    """Every k-th of the rows that come; k doubles whenever there are too many."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.every, self.seen = 1, 0

    @property
    def wants_next(self) -> bool:
        self.seen += 1
        return (self.seen - 1) % self.every == 0

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if len(self.rows) > 2 * POINTS_MAX:
            del self.rows[1::2]
            self.every *= 2


def read_metrics(path: Path) -> Steps:
    """Read the file as far as it goes. Lines that are no rows are left out and counted."""
    thinned, last = _Thinned(), b""
    steps, losses = array("d"), array("d")
    epochs, changes = list[Row](), list[Row]()
    unread = 0
    try:
        file = path.open("rb")
    except OSError:
        return Steps()
    with file:
        for line in file:
            found = _STEP.match(line)
            if found is not None:
                steps.append(float(found[1]))
                losses.append(_float(found[2]))
                last = line
                if not thinned.wants_next:
                    continue
            row = _parsed(line)
            if row is None:
                unread += 1
            elif row.get("kind") == "step":
                if found is None:  # another writer's order of fields
                    steps.append(_number(row.get("step")))
                    losses.append(_number(row.get("loss")))
                    if not thinned.wants_next:
                        continue
                thinned.add(row)
            elif row.get("kind") == "epoch":
                epochs.append(row)
            elif row.get("kind") == "membership":
                changes.append(row)
    newest = _parsed(last)
    if newest is not None and thinned.rows and newest.get("step") != thinned.rows[-1].get("step"):
        thinned.rows.append(newest)  # where the run stands now
    every = max(1, math.ceil(len(epochs) / POINTS_MAX))
    return Steps(
        exists=True,
        count=len(steps),
        every=thinned.every,
        **_in_buckets(np.frombuffer(steps), np.frombuffer(losses)),
        **_columns(thinned.rows),
        epochs=tuple(epochs[(len(epochs) - 1) % every :: every]),
        changes=tuple(changes),
        unread=unread,
    )


def _in_buckets(steps: Array, losses: Array) -> dict[str, Any]:
    """Mean, least and greatest loss of neighbours; a bucket without a finite loss is nan."""
    width = max(1, math.ceil(len(steps) / POINTS_MAX))
    buckets = math.ceil(len(steps) / width)
    padded = np.full(buckets * width, np.nan)
    padded[: len(losses)] = losses
    table = padded.reshape(buckets, width)
    known = np.isfinite(table)
    count = known.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, table, 0.0).sum(axis=1) / count
    low = np.where(known, table, np.inf).min(axis=1, initial=np.inf)
    high = np.where(known, table, -np.inf).max(axis=1, initial=-np.inf)
    return {
        "loss_step": steps[::width].copy(),
        "loss": mean,
        "loss_low": np.where(count > 0, low, np.nan),
        "loss_high": np.where(count > 0, high, np.nan),
    }


def _columns(rows: list[Row]) -> dict[str, Any]:
    return {
        "step": np.array([_number(row.get("step")) for row in rows]),
        "time": np.array([_number(row.get("time")) for row in rows]),
        "samples": np.array([_number(row.get("samples")) for row in rows]),
        "workers": np.array([float(len(row["ranks"])) if isinstance(row.get("ranks"), list) else np.nan for row in rows]),
        "mean": {name: np.array([_over(row.get(name))[0] for row in rows]) for name in _EACH},
        "most": {name: np.array([_over(row.get(name))[1] for row in rows]) for name in _EACH},
    }


def _over(values: object) -> tuple[float, float]:
    """Mean and greatest of what the workers report."""
    known = [one for one in map(_number, values) if math.isfinite(one)] if isinstance(values, list) else []
    return (sum(known) / len(known), max(known)) if known else (math.nan, math.nan)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _float(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:  # null: it was not finite
        return math.nan


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
