"""What a worker is told: one JSON object, the same for a local process and for a function's event."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from smlt.errors import ConfigError
from smlt.worker.buckets import BUCKET_MB, BUCKET_MB_MAX
from smlt.worker.early_stop import EarlyStop
from smlt.worker.schedule import BatchSchedule, check_lr_rule


@dataclass(frozen=True)
class WorkerConfig:
    """One worker's part of a run. Raises ConfigError from `from_json` for what it does not know or lacks."""

    run: str
    job: str
    rank: int
    world_size: int
    object_store_url: str
    script: str  # path of the script below <run>/code/
    epochs: int
    global_batch_size: int
    seed: int = 0
    codec: str = "fp16"
    error_feedback: bool = False  # add to the next gradient what the codec cut off from this one
    bucket_mb: float = BUCKET_MB  # 0: one all-reduce when backward has ended
    store_window_mb: float | None = None  # of each store node's memory, for all workers; 0: no bound; None: by itself
    worker_id: str = "alone"  # names this start of a worker; a replacement has another
    spare: bool = False  # wait, when a plan has no rank for this worker
    liveness_s: float = 10.0  # a worker whose metadata key nobody has renewed for so long is taken for dead
    warm: bool = True  # paused at the time limit, wait for the next invocation in the same process
    time_limit_s: float | None = None  # this invocation ends then, however it stands
    # None: one worker that nobody watches. Its password must not come into a log by way of a repr.
    store_url: str | None = field(default=None, repr=False)
    hyperparameters: dict[str, Any] | None = None  # class attributes of the task, set before it is instantiated
    has_data: bool = False  # whether <run>/data/ holds files for the task
    data_run: str | None = None  # then below this name, which several runs share
    target_accuracy: float | None = None
    batch_schedule: str | None = None  # "0:64,5:128": from which epoch on how many samples; epoch 0 as `global_batch_size`
    lr_rule: str = "none"  # what becomes of the learning rate when the global batch changes
    patience: int | None = None  # end when `stop_metric` has not been better for so many epochs
    stop_metric: str = "accuracy"
    stop_mode: str = "max"
    timeout_s: float = 300.0
    checkpoint_every_epochs: int = 1
    checkpoints_kept: int = 3
    threads: int = 1
    code_sha256: str | None = None  # of <run>/code/MANIFEST.json: other code is not run; None: whatever lies there

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch_size", "world_size", "checkpoint_every_epochs", "checkpoints_kept", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} is not positive")
        if not 0 <= self.bucket_mb < BUCKET_MB_MAX:
            raise ConfigError(f"bucket_mb {self.bucket_mb} is not between 0 and {BUCKET_MB_MAX}")
        if not self.liveness_s > 0 or (self.time_limit_s is not None and not self.time_limit_s > 0):
            raise ConfigError(f"liveness_s {self.liveness_s} and time_limit_s {self.time_limit_s} must be positive")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} is not between 0 and 2**63 - 1")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise ConfigError(f"target accuracy {self.target_accuracy} is not between 0 and 1")
        check_lr_rule(self.lr_rule)
        if self.schedule.at(0) != self.global_batch_size:
            raise ConfigError(f"batch_schedule {self.batch_schedule} begins with another batch than {self.global_batch_size}")
        _ = self.early_stop  # raises for what cannot be

    @property
    def schedule(self) -> BatchSchedule:
        """The global batch by epoch, as far as the configuration knows: a task's callback may change it."""
        if self.batch_schedule is None:
            return BatchSchedule.constant(self.global_batch_size)
        return BatchSchedule.parse(self.batch_schedule, self.global_batch_size)

    @property
    def early_stop(self) -> EarlyStop | None:
        """When training ends for want of progress; None: never."""
        return None if self.patience is None else EarlyStop(self.patience, self.stop_metric, self.stop_mode)

    def to_json(self) -> str:
        """One line of JSON. It may hold the store's password: it is handed over by pipe, never as an argument."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerConfig:
        """The configuration in `text`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the worker's configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError("the worker's configuration is not a JSON object")
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(values) - set(known))
        lacking = sorted(n for n, f in known.items() if n not in values and f.default is MISSING)
        if unknown or lacking:
            raise ConfigError(f"the worker's configuration has unknown {unknown} and lacks {lacking}")
        return cls(**values)
