"""What `smlt sweep` was asked for, checked before anything is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smlt.client.request import RunRequest, check_request, with_schedule
from smlt.client.sweep.halving import Trial, rungs_of
from smlt.client.sweep.space import RUN_OPTIONS, Space
from smlt.errors import ConfigError
from smlt.worker.hyperparameters import Value

#: For which no more is better, unless --goal says so.
MINIMIZED = ("loss",)
GOALS = ("min", "max")


@dataclass(frozen=True)
class SweepRequest:
    """What `smlt sweep` was asked for. See its --help."""

    script: str
    space: Mapping[str, Any] = field(default_factory=dict)  # as `Space.as_json` has it
    trials: int | None = None
    seed: int = 0  # of the draws and, where none is tried or given, of every trial
    metric: str = "accuracy"
    goal: str | None = None  # "min" or "max"
    epochs: int = 10
    min_epochs: int = 1
    halving: int | None = None  # the best 1 of so many goes on; None: all train to the end
    workers: int = 1  # of each trial
    workers_total: int = 1  # of all trials that run at once
    deadline_s: float | None = None
    budget_usd: float | None = None
    on: str = "local"
    data: str | None = None  # files for the task, uploaded once for all trials
    object_store: str | None = None
    options: Sequence[str] = ()  # of `smlt train`, for every trial, but those above

    @property
    def maximize(self) -> bool:
        """Whether more of the metric is better."""
        return self.goal == "max" if self.goal is not None else self.metric not in MINIMIZED

    @property
    def rungs(self) -> tuple[int, ...]:
        """After how many epochs trials are compared; the last is the full number."""
        return rungs_of(self.min_epochs, self.epochs, self.halving)

    @property
    def train_options(self) -> list[str]:
        """The options of `smlt train` for one trial by itself."""
        where = [("--object-store", self.object_store), ("--data", self.data)]
        return [*self.options, *(text for option, value in where if value is not None for text in (option, value))]

    @property
    def slots(self) -> int:
        """How many trials run at once."""
        return self.workers_total // self.workers

    def make_trials(self) -> list[Trial]:
        """The trials, the same for the same space and seed. ConfigError when there are none to be had."""
        points = Space.from_json(self.space, "the space").points(self.trials, self.seed)
        return [Trial(number, point) for number, point in enumerate(points)]


def check_sweep(request: SweepRequest) -> None:
    """ConfigError for what cannot work: in the sweep, or in any of its trials."""
    if request.goal not in (None, *GOALS):
        raise ConfigError(f"--goal {request.goal!r}: choose one of {', '.join(GOALS)}")
    if request.workers < 1 or request.epochs < 1:
        raise ConfigError(f"--workers {request.workers} and --epochs {request.epochs} must be positive")
    if request.workers_total < request.workers:
        raise ConfigError(f"--workers-total {request.workers_total} has no room for a trial of --workers {request.workers}")
    if request.budget_usd is not None and request.on != "lambda":
        raise ConfigError("--budget is for --on lambda: only there is known what a run costs; --deadline bounds any sweep")
    if request.halving is None and request.min_epochs != 1:
        raise ConfigError("--min-epochs is the first rung of --halving: give both")
    _ = request.rungs  # raises
    for trial in request.make_trials():
        options, _ = split(trial.hyperparameters)
        try:
            run = RunRequest(request.script, workers=request.workers, epochs=request.epochs)
            check_request(with_schedule(replace(run, **options), options.get("global_batch_size")))
        except (ConfigError, TypeError, AttributeError) as error:
            raise ConfigError(f"trial {trial.number}, {point_text(trial.hyperparameters)}: {error}") from error


def split(point: Mapping[str, Value]) -> tuple[dict[str, Any], dict[str, Value]]:
    """Of a trial's point (the run's options, the task's hyper-parameters)."""
    options = {name: value for name, value in point.items() if name in RUN_OPTIONS}
    return options, {name: value for name, value in point.items() if name not in RUN_OPTIONS}


def point_text(point: Mapping[str, Value]) -> str:
    """lr=0.1 width=64"""
    return " ".join(f"{name}={value_text(value)}" for name, value in point.items())


def value_text(value: Any) -> str:
    """A value as `--set` takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
