"""What a run's folder says, read for a report: whatever is missing, cut short or of an unknown kind is told, not raised."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from smlt.client.bill import FILE as BILL
from smlt.client.bill import Bill
from smlt.client.events import FILE as EVENTS
from smlt.client.invocations import Invocation, read_invocations
from smlt.client.lives import Lives
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.space import Choice
from smlt.client.report.steps import Steps, read_metrics
from smlt.client.runs import Run
from smlt.errors import CheckpointError

Row = dict[str, Any]

#: Of a file of rows, so much is read: more is no run's.
_BYTES_MAX = 256 * 2**20


@dataclass(frozen=True)
class Decision:
    """A row of decisions.jsonl. Numbers that the row does not have are nan; `forecast` and `goal` may be empty."""

    number: int
    step: int
    elapsed_s: float
    spent_usd: float
    choice: Choice | None
    chosen: Choice | None
    action: str = ""
    kind: str = ""
    reason: str = ""
    forecast: Row = field(default_factory=dict)
    goal: Row = field(default_factory=dict)
    row: Row = field(default_factory=dict)

    def expected(self, name: str) -> float:
        """A number of the forecast."""
        return number(self.forecast.get(name))

    def limit(self, name: str) -> float:
        """A limit of the goal: "deadline_s", "budget_usd"; nan when it has none."""
        return number(self.goal.get(name))


@dataclass(frozen=True)
class RunData:
    """All that a report tells of. `missing`: what could not be read or is not there, a sentence for each file."""

    run: Run
    config: Row
    status: Row
    steps: Steps
    decisions: tuple[Decision, ...] = ()
    observations: tuple[Observation, ...] = ()
    workload: Row | None = None
    bill: Bill | None = None
    invocations: tuple[Invocation, ...] = ()
    missing: tuple[str, ...] = ()
    lives: Lives = field(default_factory=Lives)

    @property
    def last_time(self) -> float:
        """Of all that is known to have happened, epoch s; nan when nothing has."""
        known = [at for at in (self.steps.last_time, self.lives.last_time) if math.isfinite(at)]
        return max(known, default=math.nan)

    @property
    def on_lambda(self) -> bool:
        """Else the workers are processes, and cost nothing."""
        return self.config.get("on") == "lambda"

    @property
    def under_way(self) -> bool:
        """Whether there is more to come."""
        return self.status.get("state") == "running"

    @property
    def seconds(self) -> float:
        """From the last start to the end, as far as it has come."""
        began, ended = number(self.status.get("started")), number(self.status.get("ended"))
        if math.isnan(ended):
            ended = self.steps.last_time
        return max(0.0, ended - began)


def gather(run: Run) -> RunData:
    """Read a run's folder. CheckpointError when it has no readable configuration or status."""
    missing: list[str] = []
    config, status = run.config, run.status
    steps = read_metrics(run.path / "metrics.jsonl")
    if not steps.count:
        missing.append("metrics.jsonl has no step yet" if steps.exists else "metrics.jsonl is not there: no step was reported")
    decisions = tuple(_decision(i, row) for i, row in enumerate(_rows(run.path / "decisions.jsonl", missing)))
    observations = tuple(
        found for row in _rows(run.path / "observations.jsonl", missing) if (found := observation_of(row)) is not None
    )
    if not decisions:
        missing.append("decisions.jsonl is not there or empty: the number of workers was not tuned, nothing was forecast")
    workload = _object(run.path / "workload.json", missing)
    if workload is None:
        missing.append("workload.json is not there: what the optimizer believed cannot be worked out again")
    bill, invocations = _billed(run, missing) if config.get("on") == "lambda" else (None, ())
    lives = _lives(run, missing)
    if status.get("state") != "running":
        lives.finish(max([at for at in (lives.last_time, steps.last_time) if math.isfinite(at)], default=0.0))
    return RunData(run, config, status, steps, decisions, observations, workload, bill, invocations, tuple(missing), lives)


def number(value: object) -> float:
    """A number as a file has it; nan for whatever is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def choice_of(value: object) -> Choice | None:
    """{"workers", "memory_mb"}, as the files write a choice."""
    if not isinstance(value, dict):
        return None
    workers, memory = number(value.get("workers")), number(value.get("memory_mb"))
    return Choice(int(workers), int(memory)) if workers >= 1 and memory >= 1 else None


def observation_of(row: Row) -> Observation | None:
    """A row of observations.jsonl; None when it lacks what an observation is: a choice, a step time, a batch."""
    choice, step_s = choice_of(row.get("choice")), number(row.get("step_s"))
    if choice is None or not 0 < step_s < math.inf:
        return None
    known: dict[str, Any] = {"steps": 1, "global_batch_size": 1}
    for one in fields(Observation):
        value = number(row.get(one.name))
        if math.isfinite(value):
            known[one.name] = int(value) if str(one.type) == "int" else value
    return Observation(**{**known, "choice": choice})


def _lives(run: Run, missing: list[str]) -> Lives:
    """Of the run's workers; none where it was not written down."""
    lives = Lives()
    for row in _rows(run.path / EVENTS, missing):
        if 0 < number(row.get("time")) < 1e10 and 0 <= number(row.get("rank", 0)) < 1e6:
            lives.take(row)
    if not lives.all:
        missing.append(f"{EVENTS} is not there or tells of no worker: who ran when is not known")
    return lives


def _decision(position: int, row: Row) -> Decision:
    step = number(row.get("step"))
    texts: dict[str, Any] = {name: str(row.get(name) or "") for name in ("action", "kind", "reason")}
    parts: dict[str, Any] = {name: row[name] if isinstance(row.get(name), dict) else {} for name in ("forecast", "goal")}
    return Decision(
        position + 1,
        int(step) if math.isfinite(step) else 0,
        number(row.get("elapsed_s")),
        number(row.get("spent_usd")),
        choice_of(row.get("choice")),
        choice_of(row.get("chosen")),
        **texts,
        **parts,
        row=row,
    )


def _rows(path: Path, missing: list[str]) -> Iterator[Row]:
    """The rows of a file of JSON lines, without those that are no JSON objects; how many those are is told."""
    try:
        if path.stat().st_size > _BYTES_MAX:
            missing.append(f"{path.name} is larger than {_BYTES_MAX >> 20} MB and is not read")
            return
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        missing.append(f"{path.name} cannot be read: {error.strerror}")
        return
    bad = 0
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        else:
            bad += 1
    if bad:
        missing.append(f"{bad} of {len(lines)} lines of {path.name} could not be read")


def _object(path: Path, missing: list[str]) -> Row | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{path.name} cannot be read: {error}")
        return None
    if not isinstance(value, dict):
        missing.append(f"{path.name} is not a JSON object")
        return None
    return value


def _billed(run: Run, missing: list[str]) -> tuple[Bill | None, tuple[Invocation, ...]]:
    bill = None
    value = _object(run.path / BILL, missing)
    try:
        bill = Bill.from_dict(value) if value is not None else None
    except (KeyError, TypeError, ValueError) as error:
        missing.append(f"{BILL} is no bill of this version's: {error!r}")
    if value is None:
        missing.append(f"{BILL} is not there: smlt bill {run.name} makes it when the run is over")
    try:
        return bill, tuple(read_invocations(run.path))
    except CheckpointError as error:
        missing.append(str(error))
        return bill, ()
