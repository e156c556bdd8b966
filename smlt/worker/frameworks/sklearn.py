"""scikit-learn: `loss` calls `partial_fit`, and the workers' changes of the parameters take the place of gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from smlt.errors import ConfigError, TaskError
from smlt.sklearn import parameters_of, set_parameters
from smlt.worker.buckets import Send
from smlt.worker.frameworks import Tensors
from smlt.worker.task import Task

#: Counted by samples or steps, not weighted by a worker's part of the batch.
COUNTED = ("t", "sums", "counts")


class SklearnAdapter:
    """Drives a task whose model is an estimator that `smlt.sklearn` can average (see `smlt.worker.frameworks.Adapter`).

    `loss` calls `model.partial_fit` on the batch and returns a loss; `optimizer` returns None. model() must have called
    `partial_fit` once, for the parameters to be there. A step leaves the model where it was, plus the weighted mean of
    the workers' changes. An estimator's own random numbers are drawn anew from each step's seed.
    """

    def __init__(self, task: Task, model: Any) -> None:
        self.task, self.model = task, model
        try:
            self._before = parameters_of(model)
        except ConfigError as error:
            raise TaskError(f"model() gave an estimator that cannot be trained: {error}") from error
        if (given := task.optimizer(model)) is not None:
            raise TaskError(f"optimizer() gave a {type(given).__name__}: partial_fit takes the steps, return None")
        self.gradient = {name: np.zeros_like(array) for name, array in self._before.items()}
        self._kept: tuple[Tensors, dict[str, Any]] | None = None

    def prepare(self, batch: Any) -> Any:
        return batch

    def compute(self, batch: Any, weight: float, send: Send) -> float:
        self._before = parameters_of(self.model)
        for name in ("_random_state", "random_state"):
            if isinstance(getattr(self.model, name, None), np.random.RandomState):
                setattr(self.model, name, np.random.RandomState(np.random.randint(2**31)))
        loss = self.task.loss(self.model, batch)
        try:
            loss = float(loss)
        except (TypeError, ValueError) as error:
            raise TaskError(f"loss() of a scikit-learn task calls partial_fit and returns a number: {error}") from error
        after = parameters_of(self.model)
        for name, change in self.gradient.items():
            if after[name].shape != change.shape:
                raise TaskError(f"partial_fit has changed the shape of {name} from {change.shape} to {after[name].shape}")
            np.subtract(after[name], self._before[name], out=change)
            if name not in COUNTED:
                change *= weight
        set_parameters(self.model, self._before)
        return loss

    def skip(self, send: Send) -> None:
        self._before = parameters_of(self.model)
        for change in self.gradient.values():
            change.fill(0)

    def apply(self) -> None:
        set_parameters(self.model, {name: self._before[name] + change for name, change in self.gradient.items()})

    def scale_learning_rate(self, times: float) -> None:
        optimizer = getattr(self.model, "_optimizer", None)
        if optimizer is not None:
            optimizer.learning_rate_init *= times
            optimizer.learning_rate *= times
        elif getattr(self.model, "learning_rate", None) in ("constant", "invscaling", "adaptive"):
            self.model.eta0 *= times
        else:
            raise TaskError(
                f"a {type(self.model).__name__} has no learning rate that a rule could change: train with --lr-rule none"
            )

    def evaluate(self, batch: Any) -> dict[str, float]:
        return self.task.evaluate(self.model, batch)

    def parameters(self) -> Any:
        return parameters_of(self.model)

    def set_parameters(self, parameters: Any) -> None:
        set_parameters(self.model, parameters)

    def buffers(self) -> Tensors:
        return {}

    def set_buffers(self, buffers: Tensors) -> None:
        pass

    def keep_buffers(self) -> None:
        self._kept = self.state()

    def restore_buffers(self) -> None:
        if self._kept is not None:
            self.load_state(*self._kept)

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        tensors: Tensors = {}
        numbers: dict[str, Any] = {}
        for name, (owner, attribute) in self._fitted().items():
            value = getattr(owner, attribute)
            if isinstance(value, np.ndarray):
                tensors[name] = np.array(value)
            elif isinstance(value, list):
                tensors |= {f"{name}.{index}": np.array(array) for index, array in enumerate(value)}
            else:
                numbers[name] = value.item() if isinstance(value, np.generic) else value
        return tensors, {"numbers": numbers}

    def load_state(self, tensors: Tensors, rest: dict[str, Any]) -> None:
        for name, (owner, attribute) in self._fitted().items():
            value = getattr(owner, attribute)
            if isinstance(value, np.ndarray):
                if value.shape != tensors[name].shape and name.endswith(("labels_", "_indices_")):
                    continue  # of the last batch
                value[...] = tensors[name]
            elif isinstance(value, list):
                for index, array in enumerate(value):
                    array[...] = tensors[f"{name}.{index}"]
            else:
                setattr(owner, attribute, rest["numbers"][name])

    def _fitted(self) -> dict[str, tuple[Any, str]]:
        """What fitting changes: arrays of numbers, lists of them, and numbers, of the estimator and an MLP's optimizer."""
        found = {}
        for owner, start in ((self.model, "model."), (getattr(self.model, "_optimizer", None), "optimizer.")):
            for name, value in vars(owner).items() if owner is not None else ():
                fitted = start == "optimizer." or name.startswith("_") or name.endswith("_") or name == "eta0"
                if fitted and _is_numeric(value):
                    found[start + name] = (owner, name)
        return found


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, np.ndarray) for part in value)
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return isinstance(value, (bool, int, float, np.integer, np.floating, np.bool_))
