"""A run that tunes itself: what must be known before it starts, and how it goes on when it is resumed."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from smlt.client.cost import CostModel
from smlt.client.deployment.lookup import find_deployment
from smlt.client.executors.local import TUNED_THREADS
from smlt.client.executors.preparation import available
from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.observations import EpochEnds, carried_observations, comparable, read_observations
from smlt.client.optimizer.remaining import phases
from smlt.client.optimizer.space import Choice, Space
from smlt.client.platforms import STORE_NODE, Platform, nodes_of
from smlt.client.prices import load_prices
from smlt.client.request import RunRequest
from smlt.client.runs import Run
from smlt.client.spending import Spending
from smlt.client.steering import Steering
from smlt.client.watching import Progress
from smlt.errors import CheckpointError, ConfigError
from smlt.store.aws import aws_client
from smlt.worker.schedule import BatchSchedule

if TYPE_CHECKING:
    from smlt.client.optimizer.optimizer import PerformanceOptimizer

FILE = "workload.json"
#: No more workers than that are looked at when nothing else limits them.
WORKERS_MAX = 128
#: Until a lost worker is noticed, in seconds: a process at once, a function by its metadata key.
NOTICED_S = {"local": 1.0, "lambda": 10.0}
#: How many times the cores are tried on this machine: the store and the waiting leave some of them idle.
LOCAL_FACTOR = 2


@dataclass
class Tuned:
    """A run that tunes itself, about to start. `request` holds the workers, and the memory, that it starts with."""

    request: RunRequest
    model: CostModel
    space: Space
    optimizer: PerformanceOptimizer
    choice: Choice
    reason: str
    began: float  # epoch s: a deadline counts from there

    def begin(self, run: Run) -> Steering:
        """At the wheel of a new run."""
        known = {**json.loads(self.model.to_json()), "space": asdict(self.space)}
        (run.path / FILE).write_text(json.dumps(known, indent=1) + "\n")
        run.write_status(deadline_from=self.began, spent_usd=0.0)
        return self._steering(run, 0.0, self.began)

    def go_on(self, run: Run, *, anew: bool) -> Steering:
        """At the wheel of a run that is resumed. `anew`: a deadline was given, and counts from now."""
        status = run.status
        from_s = self.began if anew else float(status.get("deadline_from") or self.began)
        run.write_status(deadline_from=from_s)
        # The bill knows best what an ended run has cost; its own count is there when no bill could be made.
        spent = status.get("cost_usd") if status.get("cost_usd") is not None else status.get("spent_usd")
        return self._steering(run, float(spent or 0.0), from_s)

    def _steering(self, run: Run, spent_usd: float, from_s: float) -> Steering:
        from smlt.client.optimizer.controller import Controller

        request = self.request
        goal = replace(request.goal, on_miss=_on_miss(request.on_miss))
        controller = Controller(self.optimizer, goal, self.choice, noticed_s=NOTICED_S[request.on])
        spending = Spending(self.model, spent_usd)
        left = _left(request, self.model.workload.samples)
        workload, model = self.model.workload, self.model
        ends = EpochEnds(workload.steps_of, lambda choice, batch: model.step(choice, batch).epoch_end_s)
        return Steering(
            run,
            goal,
            controller,
            self.choice,
            spending,
            left,
            from_s,
            epoch_ends=ends,
            task=_task(request, model),
            global_batch_size=request.global_batch_size,
            on_lambda=request.on == "lambda",
        )


def steered(request: RunRequest, *, workers: int | None, learn_from: Run | None, progress: Progress) -> Tuned:
    """Profile the task here, and choose what to start with: `workers` of them if that is given.

    `learn_from`: a run of the same task, whose observations are believed, if less than this run's own. TaskError for a task
    that does not run, ConfigError when no choice can work.
    """
    from smlt.client.profiling import profile

    began = time.time()
    workload = profile(
        Path(request.script),
        None if request.data is None else Path(request.data),
        epochs=request.epochs,
        global_batch_size=request.global_batch_size,
        codec=request.codec,
        bucket_mb=request.bucket_mb,
        crowd=request.on == "local",
        hyperparameters=request.hyperparameters,
        say=progress.preparing,
    )
    model = CostModel(workload, _platform(request), load_prices())
    most = request.max_workers or _most(request)
    fixed = [request.memory_mb] if request.memory_mb is not None and request.on == "lambda" else None
    space = model.space(max(most, workers or 1), fixed)
    if workers is not None and workers not in space.workers:
        space = Space(tuple(sorted({*space.workers, workers})), space.memory_mb)
    optimizer = _optimizer(space, model, request)
    if learn_from is not None:
        for observation in carried_observations(learn_from.path, _task(request, model)):
            optimizer.observe(observation, carried=True)
    return _started(request, model, space, optimizer, workers, began)


def steered_again(run: Run, request: RunRequest) -> Tuned:
    """What a run that tunes itself knew, for it to be resumed. CheckpointError when that is missing."""
    path = run.path / FILE
    try:
        text = path.read_text()
        model = CostModel.from_json(text, load_prices())
        sizes = json.loads(text)["space"]
        space = Space(tuple(sizes["workers"]), tuple(sizes["memory_mb"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"run {run.name}: {path} cannot be read: {error}") from error
    model = CostModel(model.workload.changed(epochs=request.epochs), model.platform, model.prices, scales=model.scales)
    optimizer = _optimizer(space, model, request)
    for observation in read_observations(run.path):
        optimizer.observe(observation)
    memory_mb = request.memory_mb if request.on == "lambda" and request.memory_mb else space.memory_mb[0]
    return Tuned(request, model, space, optimizer, Choice(request.workers, memory_mb), "as before", time.time())


def _started(
    request: RunRequest,
    model: CostModel,
    space: Space,
    optimizer: PerformanceOptimizer,
    workers: int | None,
    began: float,
) -> Tuned:
    standing = Standing(time.time() - began, 0.0, _left(request, model.workload.samples)(0, 0, request.global_batch_size))
    if workers is None:
        from smlt.client.optimizer.controller import first_choice

        suggestion = first_choice(optimizer, optimizer.goal, standing, noticed_s=NOTICED_S[request.on])
        choice, reason = suggestion.choice, suggestion.reason
    else:
        able = [choice for choice in optimizer.choices if choice.workers == workers]
        if not able:
            raise ConfigError(f"--workers {workers}: {model.why_not(Choice(workers, space.memory_mb[-1]))}")
        choice, reason = min(able, key=lambda one: model.job(one).usd), "as asked for"
    memory_mb = choice.memory_mb if request.on == "lambda" else request.memory_mb
    request = replace(request, workers=choice.workers, memory_mb=memory_mb)
    return Tuned(request, model, space, optimizer, choice, reason, began)


def _optimizer(space: Space, model: CostModel, request: RunRequest) -> PerformanceOptimizer:
    from smlt.client.optimizer.optimizer import PerformanceOptimizer

    goal, seed = Goal(request.deadline_s, request.budget_usd), request.seed % 2**32
    return PerformanceOptimizer(space, model, goal, seed=seed, is_paid=request.on == "lambda")


def _platform(request: RunRequest) -> Platform:
    if request.on == "local":
        return Platform.local(threads=TUNED_THREADS)
    deployment = find_deployment(request.function)
    nodes = request.store_nodes or nodes_of(request.store)
    node = request.store_node or STORE_NODE
    return Platform.on_lambda(deployment.arch, node, store_nodes=nodes, ephemeral_mb=deployment.tmp_mb)


def _most(request: RunRequest) -> int:
    if request.on == "lambda":
        at_once = available(aws_client("lambda"), find_deployment(request.function)) - request.spares
        return max(1, min(WORKERS_MAX, request.global_batch_size, at_once))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(LOCAL_FACTOR * cores, request.global_batch_size)


def _task(request: RunRequest, model: CostModel) -> str:
    """Runs whose step times are alike: the same task on the same kind of machine."""
    here = f"{model.workload.processor}, {model.workload.cores} cores"
    return comparable(asdict(request), here if request.on == "local" else model.platform.architecture)


def _left(request: RunRequest, samples: int) -> Callable[[int, int, int], tuple[Phase, ...]]:
    """What is left behind so many epochs and the steps of the next one that are done, with the batch in force."""

    def left(epoch: int, steps: int, global_batch_size: int) -> tuple[Phase, ...]:
        known = request.batch_schedule is not None
        schedule = request.schedule if known else BatchSchedule.constant(global_batch_size)
        return phases(schedule, samples, request.epochs, epoch, steps)

    return left


def _on_miss(asked: str) -> str:
    """Nobody can be asked where stdin or stdout is no terminal."""
    return asked if asked != "ask" or (sys.stdin.isatty() and sys.stdout.isatty()) else "best-effort"


def chosen_line(tuned: Tuned) -> str:
    """What the run starts with, and why, in a line."""
    what = f"{tuned.choice.workers} workers"
    if tuned.request.on == "lambda":
        what += f" of {tuned.choice.memory_mb} MB"
    return f"starts with {what}: {tuned.reason}"
