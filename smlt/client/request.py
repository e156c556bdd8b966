"""What `smlt train` was asked for, checked before anything is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smlt.client.executors.registry import check_executor
from smlt.client.optimizer.goals import Goal, check_goal
from smlt.collective.codecs import check_codec
from smlt.collective.window import check_least_window
from smlt.errors import ConfigError
from smlt.worker.buckets import BUCKET_MB, BUCKET_MB_MAX
from smlt.worker.checkpoint import KEPT
from smlt.worker.early_stop import EarlyStop
from smlt.worker.schedule import BatchSchedule, check_lr_rule

ON_FAILURE = ("restart", "shrink", "stop")
#: Of which it is known what a job takes and costs there: `smlt estimate`, deadlines, budgets.
PLACES = ("local", "lambda")
#: The function that `smlt train --on lambda` uses when none is named.
FUNCTION = "smlt"


@dataclass(frozen=True)
class RunRequest:
    """What `smlt train` was asked for. See its --help."""

    script: str
    workers: int = 1
    epochs: int = 10
    global_batch_size: int = 64
    seed: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)  # class attributes of the task: --set
    codec: str = "fp16"
    error_feedback: bool | None = None  # None: with int8
    bucket_mb: float = BUCKET_MB
    store_window_mb: float | None = None  # None: what the store's memory allows; 0: none
    target_accuracy: float | None = None
    batch_schedule: str | None = None  # "0:64,5:128"; then `global_batch_size` is that of epoch 0
    lr_rule: str = "none"
    patience: int | None = None  # epochs without a better `stop_metric`
    stop_metric: str = "accuracy"
    stop_mode: str = "max"
    memory_mb: int | None = None
    threads: int | None = None  # each worker computes with; None: the cores shared out
    timeout_s: float = 300.0
    object_store: str | None = None
    data: str | None = None
    data_run: str | None = None  # whose data lie in the object store already: a sweep's trials share them
    on_failure: str = "restart"
    max_restarts: int = 5  # in a row, without a step in between
    liveness_s: float = 10.0
    spares: int = 0
    replace_stragglers: float | None = None  # times the others' median; None: show them only
    time_limit_s: float | None = None
    warm: bool = True
    keep_checkpoints: int = KEPT
    on: str = "local"  # the executor that starts the workers
    on_options: Mapping[str, str] = field(default_factory=dict)  # what it wants to know
    function: str = FUNCTION  # with "lambda"
    # With "lambda" and other places elsewhere, as workers are given it: its password is in a secret manager, not here.
    store: str | None = None
    store_tunnel: str | None = None  # host:port at which this machine reaches that store
    # Workers, and with "lambda" their memory, are chosen and changed while the run goes on; with a goal, toward it.
    tune: bool = False
    deadline_s: float | None = None
    budget_usd: float | None = None
    on_miss: str = "ask"
    max_workers: int | None = None
    log: Sequence[str] = ()  # where numbers go beside the run's folder: "tensorboard=DIR", "mlflow=URI"
    metrics_port: int | None = None  # for Prometheus; 0: any free one
    metrics_host: str = "127.0.0.1"
    store_node: str | None = None  # what that store runs on ("cache.t4g.small"): its hours are on the bill
    store_nodes: int | None = None  # how many of them; None: as many as `store` lists

    @property
    def goal(self) -> Goal:
        """What the run is to keep to."""
        return Goal(self.deadline_s, self.budget_usd, self.on_miss)

    @property
    def schedule(self) -> BatchSchedule:
        """The global batch by epoch, as far as it is known before: a task's callback may change it."""
        if self.batch_schedule is None:
            return BatchSchedule.constant(self.global_batch_size)
        return BatchSchedule.parse(self.batch_schedule, self.global_batch_size)


def with_schedule(request: RunRequest, global_batch_size: int | None) -> RunRequest:
    """The request with its batch schedule in canonical form, from epoch 0 on.

    `global_batch_size`: what was asked for beside it, if anything; ConfigError when the schedule begins with another.
    """
    if request.batch_schedule is None:
        return request
    schedule = request.schedule
    if global_batch_size not in (None, schedule.at(0)):
        raise ConfigError(f"--global-batch-size {global_batch_size}, but --batch-schedule begins with {schedule.at(0)}")
    return replace(request, global_batch_size=schedule.at(0), batch_schedule=str(schedule))


def check_request(request: RunRequest, status: Mapping[str, Any] | None = None) -> None:
    """ConfigError for numbers that cannot work. `status`: where the run stands, if it has begun."""
    for name, whole in (
        ("--workers", request.workers),
        ("--epochs", request.epochs),
        ("--global-batch-size", request.global_batch_size),
        ("--keep-checkpoints", request.keep_checkpoints),
        ("--memory", request.memory_mb),
        ("--threads", request.threads),
    ):
        if whole is not None and whole < 1:
            raise ConfigError(f"{name} {whole} is not positive")
    for name, number in (
        ("--timeout", request.timeout_s),
        ("--liveness", request.liveness_s),
        ("--time-limit", request.time_limit_s),
    ):
        if number is not None and not number > 0:
            raise ConfigError(f"{name} {number} is not positive")
    for name, count in (("--spares", request.spares), ("--max-restarts", request.max_restarts)):
        if count < 0:
            raise ConfigError(f"{name} {count} is negative")
    if not 0 <= request.bucket_mb < BUCKET_MB_MAX:
        raise ConfigError(f"--bucket-mb {request.bucket_mb} is not between 0 and {BUCKET_MB_MAX}")
    if request.store_window_mb is not None and request.workers > 1:
        check_least_window(request.store_window_mb, request.workers)
    if not 0 <= request.seed < 2**63:
        raise ConfigError(f"--seed {request.seed} is not between 0 and 2**63 - 1")
    if request.target_accuracy is not None and not 0 < request.target_accuracy <= 1:
        raise ConfigError(f"--target-accuracy {request.target_accuracy} is not between 0 and 1")
    if request.data is not None and request.data_run is not None:
        raise ConfigError("--data and --shared-data: one of them")
    if request.on_failure not in ON_FAILURE:
        raise ConfigError(f"--on-failure {request.on_failure!r}: choose one of {', '.join(ON_FAILURE)}")
    check_executor(request.on, request.on_options)
    if request.on == "lambda" and request.memory_mb is not None and not 128 <= request.memory_mb <= 10_240:
        raise ConfigError(f"--memory {request.memory_mb}: a function has 128 to 10240 MB")
    if request.replace_stragglers is not None and not request.replace_stragglers > 1:
        raise ConfigError(f"--replace-stragglers {request.replace_stragglers} is not above 1: how many times the others' step")
    if request.metrics_port is not None and not 0 <= request.metrics_port < 65536:
        raise ConfigError(f"--metrics-port {request.metrics_port} is not between 0 and 65535")
    check_lr_rule(request.lr_rule)
    if request.schedule.at(0) != request.global_batch_size:
        raise ConfigError(
            f"--batch-schedule {request.batch_schedule}: epoch 0 is --global-batch-size {request.global_batch_size}"
        )
    if request.patience is not None:
        EarlyStop(request.patience, request.stop_metric, request.stop_mode)  # raises
    check_workers(request.workers, smallest_batch(request, status or {}))
    _check_goal(request)
    check_codec(request.codec)


def smallest_batch(request: RunRequest, status: Mapping[str, Any]) -> int:
    """The smallest global batch to come, as far as is known, of a run with that status.

    Without a schedule a callback may change it: where it has grown that counts; where it has shrunk, workers beyond it have
    nothing to do, which is no error.
    """
    if request.batch_schedule is not None:
        return request.schedule.smallest(int(status.get("epoch") or 0))
    return max(request.global_batch_size, int(status.get("global_batch_size") or 0))


def _check_goal(request: RunRequest) -> None:
    check_goal(request.goal)
    if (request.deadline_s is not None or request.budget_usd is not None) and not request.tune:
        raise ConfigError("a deadline or a budget needs a run that tunes itself")
    if request.tune and request.on not in PLACES:
        raise ConfigError(
            f"--deadline, --budget and --tune are for --on {' and '.join(PLACES)}: what one takes elsewhere is not known"
        )
    if request.budget_usd is not None and request.on == "local":
        raise ConfigError("--budget is for --on lambda: on this machine a run costs nothing")
    if request.max_workers is not None:
        check_workers(request.max_workers, request.global_batch_size)


def check_workers(workers: int, global_batch_size: int) -> None:
    """ConfigError when so many workers cannot share the batch."""
    if workers < 1:
        raise ConfigError(f"--workers {workers} is not positive")
    if workers > global_batch_size:
        raise ConfigError(
            f"{workers} workers cannot share a global batch of {global_batch_size}: "
            "give a larger --global-batch-size (or --batch-schedule) or fewer --workers"
        )
