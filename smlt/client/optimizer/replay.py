"""The optimizer on a table of recorded results: what it would have tried, and how near it comes to the best row.

A table is one of

* JSON `{"first_workers": 10, "objective": [...]}`: something to be made as large as possible, for 10, 11, 12, ... workers;
* JSON `[{"workers": 4, "memory_mb": 1769, "step_s": 0.31}, ...]`, or CSV with these columns;
* JSON lines of a run: its observations.jsonl.

It is the same optimizer as in a run, without a cost model: prices are known, step times are not.
"""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smlt.client.cost import StepModel
from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.observations import Observation, read_observations
from smlt.client.optimizer.optimizer import PerformanceOptimizer
from smlt.client.optimizer.priors import WITHOUT_MODEL
from smlt.client.optimizer.space import Choice, Space
from smlt.client.prices import PRICES
from smlt.errors import ConfigError

EVALUATIONS = 5
STEPS = 1000
MEMORY_MB_DEFAULT = 1769  # where a table does not say: one vCPU
OBSERVATIONS = "observations.jsonl"


@dataclass(frozen=True)
class Table:
    """Recorded step times in seconds. `is_objective`: they are reciprocals of an objective, and money is left out."""

    name: str
    step_s: dict[Choice, float]
    is_objective: bool = False

    @property
    def space(self) -> Space:
        """The grid that holds all rows."""
        workers = sorted({choice.workers for choice in self.step_s})
        return Space(tuple(workers), tuple(sorted({choice.memory_mb for choice in self.step_s})))


@dataclass(frozen=True)
class Evaluation:
    """A row looked up. `value`: of the objective where the table has one, else of the goal for STEPS steps: USD, s or s·USD."""

    choice: Choice
    kind: str
    step_s: float
    value: float
    reason: str


@dataclass(frozen=True)
class Replay:
    """What the optimizer did with a table. `regret`: by which part the best row found is worse than the table's best.

    `believed_best`, `believed_value`: where it would settle, and what it expects there. Values: as in Evaluation.
    """

    table: Table
    goal: Goal
    evaluations: tuple[Evaluation, ...]
    best: Evaluation
    table_best: Choice
    table_best_value: float
    believed_best: Choice
    believed_value: float
    steps: int = STEPS

    @property
    def standing(self) -> Standing:
        """Before the first evaluation: all is still to be done."""
        return Standing(0.0, 0.0, (Phase(self.steps, 1),))

    @property
    def model(self) -> StepModel:
        """What the optimizer began with: it knows nothing."""
        return _Recorded(self.table)

    @property
    def observations(self) -> tuple[Observation, ...]:
        """What it has learnt from, in order."""
        return tuple(Observation(row.choice, row.step_s, self.steps, 1, noise=0.0) for row in self.evaluations)

    @property
    def regret(self) -> float:
        ratio = self.best.value / self.table_best_value
        return 1 - ratio if self.table.is_objective else ratio - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**_choice(row.choice), "kind": row.kind, "step_s": row.step_s, "value": row.value} for row in self.evaluations]
        if self.table.is_objective:
            rows = [{key: value for key, value in row.items() if key != "step_s"} for row in rows]
        return {
            "table": self.table.name,
            "rows": len(self.table.step_s),
            "goal": "most" if self.table.is_objective else _goal(self.goal),
            "evaluations": rows,
            "best": {**_choice(self.best.choice), "value": self.best.value},
            "believed_best": {**_choice(self.believed_best), "value": self.believed_value},
            "table_best": {**_choice(self.table_best), "value": self.table_best_value},
            "regret": self.regret,
        }

    def to_text(self) -> str:
        """For people."""
        what = "objective" if self.table.is_objective else _unit(self.goal)
        lines = [f"{self.table.name}: {len(self.table.step_s)} rows", f"{'':3}{'choice':>16}  {what:>12}"]
        for number, row in enumerate(self.evaluations, 1):
            lines.append(f"{number:>2} {row.choice!s:>16}  {row.value:>12.6g}  {row.kind}")
        lines += [
            f"believed best    {self.believed_best}, {self.believed_value:.6g}",
            f"best evaluated   {self.best.choice}, {self.best.value:.6g}",
            f"best of table    {self.table_best}, {self.table_best_value:.6g}",
            f"short of it by   {100 * self.regret:.2f} %",
        ]
        return "\n".join(lines)


class _Recorded:
    """The StepModel of a table: flat."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.usd_per_gb_s = float(PRICES["lambda.x86_64.gb-second"].usd)

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        return 1.0

    def usd_per_s(self, choice: Choice) -> float:
        return 1.0 if self.table.is_objective else choice.workers * choice.memory_mb / 1024 * self.usd_per_gb_s

    def switch_s(self, before: Choice | None, after: Choice) -> float:
        return 0.0

    def why_not(self, choice: Choice) -> str:
        return "" if choice in self.table.step_s else f"the table has no row of {choice}"


def replay(
    table: Table, goal: Goal | None = None, *, seed: int = 0, evaluations: int = EVALUATIONS, steps: int = STEPS
) -> Replay:
    """Let the optimizer look up at most so many rows of the table; the first is drawn with `seed`.

    It ends earlier when nothing is expected of another. `goal`: of a run of `steps` steps. ConfigError for an objective with a
    goal.
    """
    if evaluations < 1 or steps < 1:
        raise ConfigError("a replay needs at least one evaluation and one step")
    if table.is_objective and goal not in (None, Goal()):
        raise ConfigError("a table of an objective is maximised: it has no step times that a deadline or a budget could be for")
    # Least time under any budget: of reciprocals, the largest objective.
    goal = Goal(budget_usd=math.inf) if table.is_objective else goal or Goal()
    steps = 1 if table.is_objective else steps
    optimizer = PerformanceOptimizer(table.space, _Recorded(table), goal, seed=seed, hyper=WITHOUT_MODEL)
    standing = Standing(0.0, 0.0, (Phase(steps, 1),))
    rows: dict[Choice, Evaluation] = {}
    current: Choice | None = None
    for _ in range(3 * evaluations):
        suggestion = optimizer.suggest(current, standing, round_s=0.0)
        if suggestion.kind == "stay" or (len(rows) == evaluations and suggestion.choice not in rows):
            break
        current = suggestion.choice
        if current not in rows:  # to go back to a known row is no evaluation
            step_s = table.step_s[current]
            rows[current] = Evaluation(
                current, suggestion.kind, step_s, _value(table, goal, current, step_s * steps), suggestion.reason
            )
            optimizer.observe(Observation(current, step_s, steps, 1, noise=0.0))

    def order(choice: Choice, seconds: float) -> tuple[float, float]:
        value = _value(table, goal, choice, seconds)
        return _excess(table, goal, choice, seconds), -value if table.is_objective else value

    best = min(rows.values(), key=lambda row: order(row.choice, row.step_s * steps))
    table_best = min(table.step_s, key=lambda choice: order(choice, table.step_s[choice] * steps))
    settled = optimizer.settle(standing)
    return Replay(
        table, goal, tuple(rows.values()), best, table_best, _value(table, goal, table_best, table.step_s[table_best] * steps),
        settled, _value(table, goal, settled, optimizer.belief(settled, 1).median_s * steps), steps,
    )  # fmt: skip


def load_table(path: Path) -> Table:
    """Read a table in any of the forms above. ConfigError when it is none."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if path.name == OBSERVATIONS or path.suffix == ".jsonl":
        return _of_rows(path, [(row.choice, row.step_s) for row in read_observations(path.parent)])
    try:
        if path.suffix == ".csv":
            found: Any = list(csv.DictReader(io.StringIO(text)))
        else:
            found = json.loads(text)
        if isinstance(found, dict) and "objective" in found:
            return _of_objective(path, found)
        rows = found["rows"] if isinstance(found, dict) else found
        return _of_rows(path, [(_choice_of(row), float(row["step_s"])) for row in rows])
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no table of results ({type(error).__name__}: {error}): it takes columns workers, memory_mb and step_s, "
            "or an objective over workers"
        ) from error


def _of_objective(path: Path, found: dict[str, Any]) -> Table:
    first = int(found.get("first_workers", 1))
    values = [float(value) for value in found["objective"]]
    if not values or not all(value > 0 and math.isfinite(value) for value in values):
        raise ConfigError(f"{path}: an objective has positive values, one for each number of workers")
    choices = [Choice(first + i, MEMORY_MB_DEFAULT) for i in range(len(values))]
    return Table(str(found.get("model", path.stem)), {c: 1 / v for c, v in zip(choices, values, strict=True)}, True)


def _of_rows(path: Path, rows: list[tuple[Choice, float]]) -> Table:
    """Rows of one choice become one, their geometric mean."""
    logs: dict[Choice, list[float]] = {}
    for choice, step_s in rows:
        if not (step_s > 0 and math.isfinite(step_s)):
            raise ConfigError(f"{path}: a step of {choice} cannot have taken {step_s} s")
        if min(choice.workers, choice.memory_mb) < 1:
            raise ConfigError(f"{path}: there is no {choice}")
        logs.setdefault(choice, []).append(math.log(step_s))
    if not logs:
        raise ConfigError(f"{path} has no rows")
    return Table(path.stem, {choice: math.exp(sum(each) / len(each)) for choice, each in logs.items()})


def _choice_of(row: dict[str, Any]) -> Choice:
    return Choice(int(row["workers"]), int(row.get("memory_mb") or MEMORY_MB_DEFAULT))


def _choice(choice: Choice) -> dict[str, int]:
    return {"workers": choice.workers, "memory_mb": choice.memory_mb}


def _goal(goal: Goal) -> dict[str, float] | str:
    """For JSON, which knows no infinity."""
    limits = {"deadline_s": goal.deadline_s, "budget_usd": goal.budget_usd}
    if limits == {"deadline_s": None, "budget_usd": None}:
        return "least product of time and cost"
    found = {name: limit for name, limit in limits.items() if limit is not None and math.isfinite(limit)}
    return found or ("least cost" if goal.deadline_s is not None else "least time")


def _value(table: Table, goal: Goal, choice: Choice, seconds: float) -> float:
    """What the goal is about, for a run of so many seconds; the objective where the table is of one."""
    if table.is_objective:
        return 1 / seconds
    usd = seconds * _Recorded(table).usd_per_s(choice)
    if goal.deadline_s is not None:
        return usd
    return seconds if goal.budget_usd is not None else seconds * usd


def _excess(table: Table, goal: Goal, choice: Choice, seconds: float) -> float:
    """By which factor such a run exceeds the goal, 1 when it keeps it."""
    usd = seconds * _Recorded(table).usd_per_s(choice)
    late = seconds / goal.deadline_s if goal.deadline_s is not None else 0.0
    return max(1.0, late, usd / goal.budget_usd if goal.budget_usd is not None else 0.0)


def _unit(goal: Goal) -> str:
    if goal.deadline_s is not None:
        return "USD"
    return "s" if goal.budget_usd is not None else "s·USD"
