"""A run under a controller whose decisions a test has written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from commandline import rows, status

from smlt.client.optimizer.controller import Controller, Decision
from smlt.client.optimizer.goals import Forecast, Goal, Phase, Standing
from smlt.client.optimizer.observations import EpochEnds, Observation
from smlt.client.optimizer.space import Choice
from smlt.client.runs import Run
from smlt.client.spending import Spending
from smlt.client.steering import Steering
from smlt.client.watching import Unwatched

EPOCHS, STEPS = 15, 60
FORECAST = Forecast(10.0, 9.0, 11.0, 1.0, 0.9, 1.1, 1.0)


class Scripted:
    """A controller that ends a round after six steps and decides what was written down; then it keeps what there is."""

    def __init__(self, *decisions: tuple[str, Choice]) -> None:
        self.decisions, self.observed = list(decisions), list[Observation]()
        self.standings: list[Standing] = []
        self.optimizer, self.limits = self, list[int]()
        self.last_decided: Callable[[], object] = lambda: None
        self._awaited: Choice | None = None  # decided; rounds go by until it is there
        self.ends_in_a_change = False  # as when the money ends, which needs no step

    def limit_workers(self, most: int) -> None:
        self.limits.append(most)

    def round_is_over(self, steps: int, seconds: float, standing: Standing) -> bool:
        return steps >= 6 or (self.ends_in_a_change and not self.decisions and not steps)

    def end_round(self, observation: Observation | None, standing: Standing, *, failures: int, lost_s: float) -> Decision:
        self.standings.append(standing)
        if observation is not None:
            self.observed.append(observation)
        action, choice = "stop" if self.ends_in_a_change else "keep", self.observed[-1].choice
        if self.decisions and self._awaited in (None, choice):
            action, choice = self.decisions.pop(0)
            self._awaited = choice if action == "switch" else None
        elif not self.decisions and self._awaited in (None, choice):
            self.last_decided()
        return Decision(action, choice, FORECAST, f"the test says {action}")


class Flat:
    """A second costs the same with any number of workers."""

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        return 0.1

    def usd_per_s(self, choice: Choice) -> float:
        return 0.5

    def switch_s(self, before: Choice | None, after: Choice) -> float:
        return 1.0

    def why_not(self, choice: Choice) -> str:
        return ""


class Recorder(Unwatched):
    def __init__(self) -> None:
        self.decisions, self.warnings = list[dict[str, Any]](), list[str]()

    def decision(self, row: dict[str, Any]) -> None:
        self.decisions.append(row)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def steering(run: Run, controller: Scripted, choice: Choice, *, on_lambda: bool = False) -> Steering:
    """That controller at the wheel of a run of EPOCHS epochs of 4 steps."""

    def left(epoch: int, steps: int, batch: int) -> tuple[Phase, ...]:
        count = STEPS - 4 * epoch - steps
        return (Phase(count, batch),) if count > 0 else ()

    return Steering(
        run,
        Goal(),
        cast(Controller, controller),
        choice,
        Spending(Flat()),
        left,
        0.0,
        epoch_ends=EpochEnds(lambda batch: 4),
        global_batch_size=16,
        on_lambda=on_lambda,
    )


def nearly_same_end(run: Path, undisturbed: Path) -> None:
    """Every step once and in order, and the same losses but for the order in which workers' parts are added."""
    assert status(run)["state"] == "done"
    here, there = ([row for row in rows(path) if row["kind"] == "step"] for path in (run, undisturbed))
    assert [row["step"] for row in here] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in here] == pytest.approx([row["loss"] for row in there], rel=1e-5)


def decisions_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "decisions.jsonl").read_text().splitlines()]
