"""Carries out what the controller decides while a run goes on: ends rounds, changes workers and memory, says so."""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from smlt.client.crew import Crew
from smlt.client.executors import Executor
from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.observations import EpochEnds, append_observation, observe_round
from smlt.client.optimizer.space import Choice
from smlt.client.records import Records, json_line
from smlt.client.rows import append_row
from smlt.client.runs import Run
from smlt.client.spending import Spending
from smlt.client.watching import Progress
from smlt.errors import SmltError

if TYPE_CHECKING:
    from smlt.client.optimizer.controller import Controller, Decision

DECISIONS = "decisions.jsonl"
#: What can be done about a goal that cannot be kept.
ANSWERS = ("stop", "continue", "best-effort")


class Steering:
    """One run's controller at the wheel.

    `left`: what is still to be trained behind so many epochs and steps of the next one, by the global batch in force. `from_s`:
    epoch s, the deadline counts from there. `task`: which runs' observations are alike (`comparable`).
    """

    def __init__(
        self,
        run: Run,
        goal: Goal,
        controller: Controller,
        choice: Choice,
        spending: Spending,
        left: Callable[[int, int, int], tuple[Phase, ...]],
        from_s: float,
        *,
        epoch_ends: EpochEnds,
        task: str = "",
        global_batch_size: int,
        on_lambda: bool,
    ) -> None:
        self.run, self.goal, self.controller, self.choice = run, goal, controller, choice
        self.spending, self.left, self.from_s, self.on_lambda = spending, left, from_s, on_lambda
        self.epoch_ends, self.task = epoch_ends, task
        self.global_batch_size = global_batch_size  # at the beginning
        self.stopped_for = ""  # why the goal has ended the run
        self._wanted: Choice | None = None  # its memory is being made ready
        self._began: float | None = None  # monotonic: this round; None: none is under way
        self._rows: list[dict[str, Any]] = []
        self._failures, self._lost_s = 0, 0.0  # of this round, and of the change before it
        self._asked = False  # what to do about a goal that cannot be kept; the answer is still to come

    def tick(self, crew: Crew, executor: Executor, records: Records, progress: Progress) -> bool:
        """Look whether a round is over, and do what is decided then. False when the run is to stop."""
        now = time.monotonic()
        workers = sum(start.handle is not None and not start.gone for start in crew.started.values())
        self.spending.tick(now, workers, self.choice.memory_mb)
        if records.ended:
            return True
        if self._wanted is not None and not crew.is_changing:
            self._make_ready(crew, executor, progress)
        if crew.is_changing:
            self._began = None
            standing = self._standing(records)
            if standing.left and self.controller.round_is_over(0, 0.0, standing):  # the money ends
                return self._end_round(crew, executor, records, progress, standing)
            return True
        if self._began is None or crew.size != self.choice.workers:
            self._begin_round(crew, records, now)
            return True
        if self._asked:
            self._take_answer()
        self._take(records)
        steps = sum(row["kind"] == "step" for row in self._rows)
        standing = self._standing(records)
        if not standing.left or not self.controller.round_is_over(steps, now - self._began, standing):
            return True
        return self._end_round(crew, executor, records, progress, standing)

    def _begin_round(self, crew: Crew, records: Records, now: float) -> None:
        """The crew is as it was wanted, or as it could be had: a worker less, another one by `smlt scale`."""
        if crew.too_many is not None:
            self.controller.optimizer.limit_workers(crew.too_many - 1)
            crew.too_many = None
        self.choice = Choice(crew.size, self.choice.memory_mb)
        self._take(records)
        self._rows, self._began = [], now

    def _take(self, records: Records) -> None:
        rows = records.take_round()
        lost = [row for row in rows if row["kind"] == "membership" and row["lost_ranks"]]
        self._failures += sum(len(row["lost_ranks"]) for row in lost)
        self._lost_s += sum(row["recovery_s"] for row in lost)
        self._rows += rows

    def _standing(self, records: Records) -> Standing:
        batch = records.global_batch_size or self.global_batch_size
        left = self.left(records.epoch, records.done_step - records.epoch_step, batch)
        return Standing(time.time() - self.from_s, self.spending.usd, left)

    def _end_round(self, crew: Crew, executor: Executor, records: Records, progress: Progress, standing: Standing) -> bool:
        observation = observe_round(self._rows, self.choice, self.epoch_ends)
        if observation is not None:
            append_observation(self.run.path, observation, self.task)
        decision = self.controller.end_round(observation, standing, failures=self._failures, lost_s=self._lost_s)
        self._rows, self._began = [], time.monotonic()
        self._failures, self._lost_s = 0, 0.0
        self._write(decision, records, standing, progress)
        self.run.write_status(spent_usd=self.spending.usd)
        if decision.action == "stop":
            self.stopped_for = decision.reason
            return False
        if decision.action == "ask":
            self._ask(decision.reason, progress)
        if decision.action == "switch":
            self._switch(decision.choice, crew, executor, progress)
        return True

    def _ask(self, reason: str, progress: Progress) -> None:
        """Training goes on while the user thinks; the line that is typed is looked for in each tick."""
        self._asked = True
        progress.warning(f"{reason}. Type one of {', '.join(ANSWERS)} and Enter; until then training goes on")

    def _take_answer(self) -> None:
        if not select.select([sys.stdin], [], [], 0)[0]:
            return
        line = sys.stdin.readline().strip().lower()
        found = [answer for answer in ANSWERS if line and answer.startswith(line)]
        if found or not line:  # stdin has ended, or nothing was typed: nobody is there to be asked
            self._asked = False
            self.controller.answer(found[0] if found else "best-effort")

    def _switch(self, to: Choice, crew: Crew, executor: Executor, progress: Progress) -> None:
        if to.memory_mb == self.choice.memory_mb:
            crew.resize(to.workers)
            self.choice = to
        else:
            self._wanted = to
            self._make_ready(crew, executor, progress)

    def _make_ready(self, crew: Crew, executor: Executor, progress: Progress) -> None:
        """Training goes on until the function has the other memory; then all pause and are invoked again with it."""
        to = self._wanted
        assert to is not None
        try:
            if not executor.make_ready(to.memory_mb):
                return
        except SmltError as error:
            self._wanted = None
            progress.warning(f"{to} cannot be had, {self.choice} go on: {error}")
            return
        self._wanted = None

        def use() -> str:
            executor.use(to.memory_mb)
            template = crew.started.template
            crew.started.template = replace(template, threads=executor.threads(to.workers), world_size=to.workers)
            was, self.choice = self.choice, to
            return f"{to} instead of {was}"

        crew.reshape(to.workers, use)

    def _write(self, decision: Decision, records: Records, standing: Standing, progress: Progress) -> None:
        row = {
            "time": time.time(),
            "step": records.done_step,
            "elapsed_s": standing.elapsed_s,
            "spent_usd": standing.spent_usd,
            "choice": asdict(self.choice),
            "chosen": asdict(decision.choice),
            "action": decision.action,
            "kind": decision.kind,
            "missed": decision.missed,
            "reason": decision.reason,
            "left": [asdict(phase) for phase in standing.left],
            "forecast": asdict(decision.forecast),
            "on_lambda": self.on_lambda,
            "goal": {"deadline_s": self.goal.deadline_s, "budget_usd": self.goal.budget_usd},
        }
        append_row(self.run.path / DECISIONS, json_line(row))
        progress.decision(row)


def last_decision(run: Run) -> dict[str, Any] | None:
    """The newest row of a run's decisions.jsonl; None when there is none. A row that was cut short is left out."""
    try:
        lines = (run.path / DECISIONS).read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "forecast" in row:
                return row
    return None
