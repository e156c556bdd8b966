"""The global batch that is in force on a worker, and the learning rate that goes with it."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from smlt.collective.communicator import Communicator
from smlt.errors import TaskError
from smlt.worker.config import WorkerConfig
from smlt.worker.frameworks import Adapter
from smlt.worker.schedule import LARGEST, lr_ratio
from smlt.worker.task import Task


class GlobalBatch:
    """Changes the global batch at epochs' beginnings, by the configuration's schedule or by the task's callback.

    The optimizer's learning rate belongs to the first batch, `config.global_batch_size`; at each change it is multiplied by
    what `config.lr_rule` says. `size`: samples a step in the epoch under way; `lr_factor`: the product of all changes so far.
    TaskError when the task has a callback beside a schedule, or a rule finds no learning rate to change.
    """

    def __init__(self, config: WorkerConfig, task: Task, adapter: Adapter) -> None:
        self.rule, self.adapter, self.schedule = config.lr_rule, adapter, config.schedule
        self.size, self.lr_factor = config.global_batch_size, 1.0
        self.by_callback = type(task).global_batch_size is not Task.global_batch_size
        self._ask = task.global_batch_size
        self._epoch = -1  # the last for which it was decided
        if self.by_callback and config.batch_schedule is not None:
            raise TaskError(
                f"{type(task).__name__} has a global_batch_size() of its own and the run a --batch-schedule: one must go"
            )
        if self.by_callback and not callable(self._ask):
            raise TaskError(
                f"{type(task).__name__}.global_batch_size is a {type(self._ask).__name__}, not a method: "
                "the global batch of a run is given by --global-batch-size"
            )
        if self.rule != "none" and (self.by_callback or config.batch_schedule is not None):
            adapter.scale_learning_rate(1.0)  # that there is none is told now, not some epochs later

    def of(self, epoch: int) -> int:
        """The global batch of an epoch up to `known_until`."""
        return self.size if self.by_callback else self.schedule.at(epoch)

    def known_until(self, epoch: int, epochs: int) -> int:
        """Up to which epoch, exclusive, the batches can be loaded ahead during `epoch` of `epochs`."""
        return epoch + 1 if self.by_callback else epochs

    def growth_behind(self, epoch: int) -> float:
        """How many times as large the batch of the next epoch is, as far as that is known; at least 1."""
        return 1.0 if self.by_callback else max(1.0, self.schedule.at(epoch + 1) / self.size)

    def begin(self, epoch: int, metrics: dict[str, float], comm: Communicator) -> float:
        """Decide and apply what holds in `epoch`, with all other workers; returns how many times as large the batch is.

        Called again for the same epoch, after a failure or a change of the membership, it changes nothing more where it was
        applied already: some workers may have come through it and others not.
        """
        if self.by_callback:
            size = self._agreed(epoch, self.size if self._epoch == epoch else self._asked(epoch, metrics), comm)
        else:
            size = self.schedule.at(epoch)
        before, self._epoch = self.size, epoch
        if size == before:
            return 1.0
        ratio = lr_ratio(self.rule, before, size)
        if ratio != 1:
            self.adapter.scale_learning_rate(ratio)
        self.size, self.lr_factor = size, self.lr_factor * ratio
        return size / before

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON. The learning rate itself is in the adapter's state."""
        return {"size": self.size, "lr_factor": self.lr_factor, "decided_epoch": self._epoch}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state`; None: the checkpoint is of a time when there was but one batch."""
        if state is not None:
            self.size, self.lr_factor = int(state["size"]), float(state["lr_factor"])
            self._epoch = int(state["decided_epoch"])

    def _asked(self, epoch: int, metrics: dict[str, float]) -> int:
        """What the task wants."""
        known = {"global_batch_size": self.size, **metrics}
        call = f"global_batch_size(epoch={epoch}, metrics={known})"
        try:
            answer: Any = self._ask(epoch, known)
        except Exception as error:
            raise TaskError(f"{call} raised {type(error).__name__}: {error}") from error
        if answer is None:
            return self.size
        try:
            size = None if isinstance(answer, (bool, np.bool_)) else operator.index(answer)
        except TypeError:
            size = None
        if size is None:
            raise TaskError(f"{call} gave {answer!r}, a {type(answer).__name__}, not an int or None")
        if not 1 <= size <= LARGEST:
            raise TaskError(f"{call} gave {size}, not 1 to {LARGEST} samples")
        return size

    def _agreed(self, epoch: int, size: int, comm: Communicator) -> int:
        sizes = [int(other) for other in comm.allgather(np.array(size, np.int64))]
        if len(set(sizes)) > 1:
            raise TaskError(
                f"the workers disagree about the global batch of epoch {epoch}, by rank {sizes}: "
                "global_batch_size() must depend on nothing but its arguments"
            )
        return size
