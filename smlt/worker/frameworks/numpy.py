"""Plain NumPy: the model is a dict of arrays, the task computes its own gradients."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from smlt.errors import TaskError
from smlt.worker.buckets import Send
from smlt.worker.frameworks import Tensors
from smlt.worker.task import Task

Arrays = dict[str, npt.NDArray[Any]]


class NumpyOptimizer(Protocol):
    """What a NumPy task's optimizer must offer."""

    def step(self, gradients: Arrays) -> None:
        """Change the model in place."""

    def state_dict(self) -> Arrays:
        """Its state as arrays by name."""

    def load_state_dict(self, state: Arrays) -> None:
        """The inverse of `state_dict`."""


class SGD:
    """Stochastic gradient descent with momentum, in place on `model` (arrays by name).

    v <- momentum * v + g;  w <- w - lr * v  (Sutskever et al., 2013, in PyTorch's form.)
    """

    def __init__(self, model: Arrays, lr: float, momentum: float = 0.0) -> None:
        self.model, self.lr, self.momentum = model, lr, momentum
        self.velocity = {name: np.zeros_like(array) for name, array in model.items()}

    def step(self, gradients: Arrays) -> None:
        """One step against `gradients`, shaped like the model."""
        for name, array in self.model.items():
            velocity = self.velocity[name]
            velocity *= self.momentum
            velocity += gradients[name]
            array -= np.asarray(self.lr, array.dtype) * velocity

    def state_dict(self) -> Arrays:
        """The velocities."""
        return dict(self.velocity)

    def load_state_dict(self, state: Arrays) -> None:
        """Take over velocities."""
        for name, array in self.velocity.items():
            array[...] = state[name]


class NumpyAdapter:
    """Drives a NumPy task (see `smlt.worker.frameworks.Adapter`)."""

    def __init__(self, task: Task, model: Arrays) -> None:
        self.task, self.model = task, model
        self.optimizer: NumpyOptimizer = task.optimizer(model)
        self.gradient: Arrays = {name: np.zeros_like(array) for name, array in model.items()}

    def prepare(self, batch: Any) -> Any:
        return batch

    def compute(self, batch: Any, weight: float, send: Send) -> float:
        answer = self.task.loss(self.model, batch)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
            raise TaskError("loss() of a NumPy task returns (loss, gradients by name)")
        loss, gradients = answer
        if set(gradients) != set(self.model):
            raise TaskError(f"loss() gave gradients {sorted(gradients)} for a model of {sorted(self.model)}")
        for name, target in self.gradient.items():
            if np.shape(gradients[name]) != target.shape:
                raise TaskError(f"loss() gave {name} a gradient of shape {np.shape(gradients[name])}, not {target.shape}")
            np.multiply(gradients[name], target.dtype.type(weight), out=target)
        return float(loss)

    def skip(self, send: Send) -> None:
        for target in self.gradient.values():
            target.fill(0)

    def apply(self) -> None:
        self.optimizer.step(self.gradient)

    def scale_learning_rate(self, times: float) -> None:
        lr = self._learning_rate()
        if lr is None:
            raise TaskError(
                f"the optimizer, a {type(self.optimizer).__name__}, has no number `lr` that a rule could change: give it one, "
                "or train with --lr-rule none"
            )
        try:
            self._set_learning_rate(lr * times)
        except AttributeError as error:
            text = f"the lr of the optimizer, a {type(self.optimizer).__name__}, cannot be changed"
            raise TaskError(f"{text}: {error}; train with --lr-rule none") from error

    def _learning_rate(self) -> float | None:
        lr = getattr(self.optimizer, "lr", None)
        return float(lr) if isinstance(lr, (int, float, np.floating)) and not isinstance(lr, bool) else None

    def _set_learning_rate(self, lr: float) -> None:
        before: Any = self._learning_rate()
        if lr != before:
            self.optimizer.lr = lr  # type: ignore[attr-defined]

    def evaluate(self, batch: Any) -> dict[str, float]:
        return self.task.evaluate(self.model, batch)

    def parameters(self) -> Any:
        return self.model

    def set_parameters(self, parameters: Any) -> None:
        pass  # they are the model's own memory

    def buffers(self) -> Tensors:
        return {}

    def set_buffers(self, buffers: Tensors) -> None:
        pass

    def keep_buffers(self) -> None:
        pass

    def restore_buffers(self) -> None:
        pass

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        tensors = {f"model.{name}": array for name, array in self.model.items()}
        tensors |= {f"optimizer.{name}": np.asarray(array) for name, array in self.optimizer.state_dict().items()}
        lr = self._learning_rate()
        return tensors, {} if lr is None else {"lr": lr}

    def load_state(self, tensors: Tensors, rest: dict[str, Any]) -> None:
        for name, array in self.model.items():
            array[...] = tensors[f"model.{name}"]
        start = len("optimizer.")
        self.optimizer.load_state_dict({name[start:]: a for name, a in tensors.items() if name.startswith("optimizer.")})
        if "lr" in rest:  # not in what was written before there were learning-rate rules
            self._set_learning_rate(float(rest["lr"]))
