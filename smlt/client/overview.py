"""A run as it stands, put together from its folder while it goes on: what `smlt watch` shows."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Any

from smlt.client.following import Follower, Row, parsed
from smlt.client.lives import GATHERING, Lives
from smlt.client.progress import batch_line, change_line, decision_line
from smlt.client.runs import Run
from smlt.client.spent import known_usd
from smlt.errors import CheckpointError

#: Steps of which the throughput and the times of the workers are means.
RECENT = 50
#: Points of a curve that are kept: neighbours become one when they are more.
POINTS_MAX = 400
EVENTS_MAX = 50
#: A run that has had no step for so long, and so many times its usual step, is said to be quiet.
QUIET_S, QUIET_STEPS = 10.0, 20
#: What `follow` calls what events.jsonl tells of workers: "started" and "ended" are the run's, as in `smlt train --json`.
_OF_WORKERS = {"started": "worker_started", "ready": "worker_ready", "ended": "worker_ended"}
_STEP = re.compile(rb'\{"kind": "step", "step": (\d+), "epoch": (\d+), "loss": ([^,]+),')


class Curve:
    """A curve of any length in little memory: means of so many neighbours, twice as many whenever there are too many."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self.last = math.nan
        self._width, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """A value more; one that is not finite is left out."""
        self.last = value
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._width:
            return
        self.points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.points) >= 2 * POINTS_MAX:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._width *= 2


class Overview:
    """What is known of a run. `refresh` reads what is new; the rest are attributes to be shown."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config, self.status = run.config, run.status
        self.lives = Lives()
        self.loss, self.accuracy = Curve(), Curve()
        self.metrics: dict[str, float] = dict(self.status.get("metrics") or {})
        self.recent: deque[Row] = deque(maxlen=RECENT)
        self.events: deque[tuple[float, str]] = deque(maxlen=EVENTS_MAX)  # (epoch s, a line)
        self.decision: Row | None = None
        self.epoch_step = 0  # the last step of the epoch before
        self.epochs_done = 0
        self.epoch_steps: int | None = None  # of an epoch
        self._follower = Follower(run)
        self._began = False

    @property
    def state(self) -> str:
        """ "running", "done", "stopped", "failed", "lost"."""
        return str(self.status.get("state", "?"))

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        return self.state != "running"

    def refresh(self) -> list[tuple[str, Row]]:
        """Read what is new, and return it. The first time all that there is, of which nothing is returned.

        CheckpointError when the run's folder is not there any more.
        """
        self.config, self.status = self.run.config, self.run.status  # the state first: what is written before it is read then
        if not self._began:
            self._began = True
            self._read_history()
            found = []
        else:
            found = list(self._follower.poll())
            for event, row in found:
                self._take(event, dict(row))
        if self.state == "lost" and self.lives.there:  # nobody was left to write down how they ended
            self.lives.finish(max([self.lives.last_time, *(float(row["time"]) for row in self.recent)]))
        return found

    def close(self) -> None:
        """Close the run's files."""
        self._follower.close()

    # ---- what follows from it ----

    @property
    def step(self) -> int:
        """The last step that is complete."""
        return int(self.recent[-1]["step"]) if self.recent else int(self.status.get("step") or 0)

    @property
    def epochs(self) -> int:
        """As many as were asked for."""
        return int(self.config.get("epochs") or 0)

    @property
    def part_done(self) -> float:
        """Of the training that was asked for, 0 to 1; nan when an epoch's length is not known yet."""
        if not self.epochs:
            return math.nan
        if self.state == "done":
            return 1.0
        if not self.epoch_steps:
            return self.epochs_done / self.epochs if self.epochs_done else math.nan
        within = min(1.0, max(0, self.step - self.epoch_step) / self.epoch_steps)
        return min(1.0, (self.epochs_done + within) / self.epochs)

    @property
    def step_s(self) -> float:
        """Median time from step to step, of the last ones; nan when it is not known."""
        times = [float(row["time"]) for row in self.recent]
        gaps = [after - before for before, after in pairwise(times)]
        return median(gaps) if gaps else math.nan

    @property
    def samples_per_s(self) -> float:
        """Over the last steps and whatever came between them."""
        if len(self.recent) < 2:
            return math.nan
        seconds = float(self.recent[-1]["time"]) - float(self.recent[0]["time"])
        return sum(float(row["samples"]) for row in list(self.recent)[1:]) / seconds if seconds > 0 else math.nan

    def left_s(self) -> float:
        """Seconds until the end by the pace of the last steps, pauses within them included; nan when it is not known."""
        if not self.epoch_steps or len(self.recent) < 2 or not self.epochs:
            return math.nan
        seconds = float(self.recent[-1]["time"]) - float(self.recent[0]["time"])
        steps = self.epochs * self.epoch_steps - self.epochs_done * self.epoch_steps - (self.step - self.epoch_step)
        return max(0.0, steps * seconds / (len(self.recent) - 1))

    def quiet_s(self, now: float) -> float:
        """How long no step has come, when that is unusual; else 0."""
        if self.is_over or not self.recent:
            return 0.0
        since = now - float(self.recent[-1]["time"])
        usual = self.step_s
        return since if since > max(QUIET_S, QUIET_STEPS * (0.0 if math.isnan(usual) else usual)) else 0.0

    def cost_usd(self, now: float) -> float:
        """So far; nan where nothing is paid or counted."""
        return known_usd(self.run, self.lives, now)

    def to_dict(self, now: float) -> dict[str, Any]:
        """One frame as JSON; what is not known is null."""
        steps = {int(rank): int(self.step) for rank in self.recent[-1]["ranks"]} if self.recent else {}
        restarts, again = self.lives.restarts(), self.lives.invocations()
        workers = [
            {
                "rank": life.rank,
                "worker_id": life.worker_id,
                "state": life.kind,
                "spare": life.spare,
                "step": steps.get(life.rank) if life.kind != "waiting" else None,
                "age_s": round(life.seconds(now), 3),
                "restarts": restarts.get(life.rank, 0),
                "invocations": 1 + again.get(life.rank, 0),
            }
            for life in sorted(self.lives.there, key=lambda one: (one.kind == "waiting", one.rank))
        ]
        return {
            "run": self.run.name,
            "state": self.state,
            "error": self.status.get("error"),
            "step": self.step,
            "epochs_done": self.epochs_done,
            "epochs": self.epochs,
            "part_done": self.part_done,
            "left_s": self.left_s(),
            "loss": self.loss.last,
            "metrics": self.metrics,
            "samples_per_s": self.samples_per_s,
            "step_s": self.step_s,
            "cost_usd": self.cost_usd(now),
            "workers": workers,
            "decision": self.decision,
        }

    # ---- taking rows ----

    def _read_history(self) -> None:
        """All rows so far. Of the steps the loss alone is read, but of the last ones: a run may have had a million."""
        last: deque[bytes] = deque(maxlen=RECENT)
        for line in self._follower.metrics_lines():
            found = _STEP.match(line)
            if found is not None:
                self.loss.add(_float(found[3]))
                last.append(line)
                continue
            row = parsed(line)
            if row is not None:
                self._take(str(row.pop("kind", "")), row)
        for line in last:
            row = parsed(line)
            if row is not None:
                self._keep(row)
        for event, row in self._follower.poll():
            self._take(event, row)
        self.events = deque(sorted(self.events, key=lambda pair: pair[0]), maxlen=EVENTS_MAX)

    def _take(self, event: str, row: Row) -> None:
        try:
            if event == "step":
                self.loss.add(float(row["loss"]) if row["loss"] is not None else math.nan)
                self._keep(row)
            elif event == "epoch":
                self._epoch(row)
            elif event == "membership":
                self._note(float(row["noticed"]) + float(row["recovery_s"]), change_line(row))
            elif event == "decision":
                self.decision = row
                if row["action"] != "keep":
                    self._note(float(row["time"]), decision_line(row))
            else:
                self._happened(event, row)
        except (KeyError, TypeError, ValueError):  # a row of another version
            return

    def _keep(self, row: Row) -> None:
        """A step's row, for the last while."""
        if not isinstance(row.get("ranks"), list) or not row["ranks"] or not isinstance(row.get("time"), (int, float)):
            return
        if self.recent and (text := batch_line(self.recent[-1], row)):
            self._note(float(row["time"]), text)
        self.recent.append(row)
        if row.get("epoch_steps"):
            self.epoch_steps = int(row["epoch_steps"])

    def _epoch(self, row: Row) -> None:
        number, step = int(row["epoch"]) + 1, int(row["step"])
        if self.epoch_steps is None and number == self.epochs_done + 1:
            self.epoch_steps = step - self.epoch_step
        self.epochs_done, self.epoch_step = number, step
        self.metrics = {str(name): float(value) for name, value in row["metrics"].items() if value is not None}
        if "accuracy" in self.metrics:
            self.accuracy.add(self.metrics["accuracy"])

    def _happened(self, event: str, row: Row) -> None:
        row = {**row, "event": event}
        self.lives.take(row)
        at = float(row["time"])
        if event == "warning":
            self._note(at, f"warning: {row['text']}")
        elif event == "begin":
            self._note(at, f"{'resumed' if row.get('resumed') else 'started'} with {row['workers']} workers")
        elif event == "started" and row.get("spare"):
            self._note(at, "an additional worker is being started")
        elif event == "ended" and self.lives.all:
            found = next((life for life in reversed(self.lives.all) if life.worker_id == row["worker_id"]), None)
            if found is not None and found.is_lost:
                self._note(at, f"worker {found.rank} {row['how']}")
        elif event == "over":
            self._note(at, str(row["state"]) + (f": {str(row['error']).splitlines()[0]}" if row.get("error") else ""))

    def _note(self, at: float, text: str) -> None:
        self.events.append((at, text.splitlines()[0] if text else ""))


def is_gathering(overview: Overview) -> bool:
    """Whether the membership changes at the moment."""
    return any(life.kind == GATHERING for life in overview.lives.there)


def follow(run: Run, every_s: float = 0.2) -> Any:
    """The run's events from now on as (event, row), to its end; the last is ("ended", status)."""
    follower = Follower(run)
    follower.skip()
    try:
        while True:
            status = run.status
            for event, row in follower.poll():
                yield _OF_WORKERS.get(event, event), row
            if status.get("state") != "running":
                yield "ended", {"run": run.name, **status}
                return
            time.sleep(every_s)
    except CheckpointError:  # the folder was taken away
        return
    finally:
        follower.close()


def _float(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:  # null: it was not finite
        return math.nan
