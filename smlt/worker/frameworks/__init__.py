"""One adapter for each framework, imported when a task of it runs."""

from __future__ import annotations

import random
import sys
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from smlt.errors import TaskError
from smlt.worker.buckets import Send
from smlt.worker.task import Task

Tensors = dict[str, npt.NDArray[np.generic]]


class Adapter(Protocol):
    """What the Trainer needs of a framework. The model and its optimizer live in here."""

    #: The gradients, as a value for an all-reduce in place; of those in buckets the last bucket only.
    gradient: Any

    def prepare(self, batch: Any) -> Any:
        """A batch in the framework's own arrays."""

    def compute(self, batch: Any, weight: float, send: Send) -> float:
        """Forward and backward: leaves `weight` times the gradients in `gradient`, returns the mean loss.

        Buckets before the last are given to `send` when they are complete, in the same order on every worker.
        """

    def skip(self, send: Send) -> None:
        """This worker's part of the batch is empty: zeros take the place of `compute`'s gradients."""

    def apply(self) -> None:
        """Take an optimizer step with what is in `gradient`."""

    def scale_learning_rate(self, times: float) -> None:
        """Multiply the optimizer's learning rates. TaskError when it has none that can be found."""

    def evaluate(self, batch: Any) -> dict[str, float]:
        """The task's metrics of a batch."""

    def parameters(self) -> Any:
        """The model's state, as a value for a broadcast in place: its own memory, or copies where that cannot be written."""

    def set_parameters(self, parameters: Any) -> None:
        """Take over what `parameters` gave, of another worker."""

    def buffers(self) -> Tensors:
        """Copies of the part of `parameters` that gradients do not reach, such as running means; floats as float64."""

    def set_buffers(self, buffers: Tensors) -> None:
        """Take over what `buffers` gave, of all workers."""

    def keep_buffers(self) -> None:
        """Before a step: keep what its forward pass changes beside the gradients, in case it must be computed again."""

    def restore_buffers(self) -> None:
        """Put back what `keep_buffers` kept."""

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Model and optimizer as arrays by name, and the rest as JSON."""

    def load_state(self, tensors: Tensors, rest: dict[str, Any]) -> None:
        """The inverse of `state`. Raises KeyError or ValueError when it does not fit the model."""


#: Frameworks with random numbers of their own: when model() was the first to import one, it drew from it unseeded.
WITH_GENERATORS = ("torch", "tensorflow", "mxnet")


def seed_generators(seed: int) -> None:
    """Seed the process's random numbers: Python's, NumPy's, and PyTorch's and MXNet's where they are loaded.

    TensorFlow's are seeded once, by `make_adapter`: what `tf.random` draws in a compiled step does not follow a later seed.
    Keras draws its seeds from Python's. JAX has no generator: see `smlt.worker.frameworks.jax`.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(seed)
    if "mxnet" in sys.modules:
        import mxnet

        mxnet.random.seed(seed % 2**31)


def _seeded_model(task: Task, seed: int) -> Any:
    """The task's model, from random numbers that `seed` alone determines."""

    def build() -> Any:
        seed_generators(seed)
        if "tensorflow" in sys.modules:
            import tensorflow

            tensorflow.random.set_seed(seed % 2**31)
        return task.model()

    loaded = {name for name in WITH_GENERATORS if name in sys.modules}
    model = build()
    return build() if any(name in sys.modules and name not in loaded for name in WITH_GENERATORS) else model


def make_adapter(task: Task, seed: int, threads: int, bucket_mb: float) -> Adapter:
    """Build the task's model, seeded, and the adapter that fits it. TaskError when there is none.

    With `bucket_mb` above 0 a framework that can cuts the gradients in buckets. No framework is imported that the task has
    not imported.
    """
    model = _seeded_model(task, seed)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
    if isinstance(model, dict) and model and all(isinstance(value, np.ndarray) for value in model.values()):
        from smlt.worker.frameworks.numpy import NumpyAdapter

        return NumpyAdapter(task, model)
    if (adapter := _deep_learning_adapter(task, model, bucket_mb)) is not None:
        return adapter
    if "sklearn" in sys.modules:
        from sklearn.base import BaseEstimator

        if isinstance(model, BaseEstimator):
            from smlt.worker.frameworks.sklearn import SklearnAdapter

            return SklearnAdapter(task, model)
    raise TaskError(
        f"model() gave a {type(model).__module__}.{type(model).__qualname__}: a torch.nn.Module, a keras.Model, a pytree of "
        "JAX arrays, a gluon.Block of MXNet, a scikit-learn estimator or a dict of NumPy arrays is wanted"
    )


def _deep_learning_adapter(task: Task, model: Any, bucket_mb: float) -> Adapter | None:
    if "torch" in sys.modules:
        import torch

        if isinstance(model, torch.nn.Module):
            from smlt.worker.frameworks.torch import TorchAdapter

            return TorchAdapter(task, model, int(bucket_mb * 2**20))
    if "keras" in sys.modules:
        import keras

        if isinstance(model, keras.Model):
            if keras.backend.backend() != "tensorflow":
                raise TaskError(f"Keras computes with {keras.backend.backend()}: set KERAS_BACKEND=tensorflow, or torch")
            from smlt.worker.frameworks.tensorflow import TensorflowAdapter

            return TensorflowAdapter(task, model)
    if "mxnet" in sys.modules:
        from mxnet import gluon

        if isinstance(model, gluon.Block):
            from smlt.worker.frameworks.mxnet import MxnetAdapter

            return MxnetAdapter(task, model)
    if "jax" in sys.modules:
        import jax

        if any(isinstance(leaf, jax.Array) for leaf in jax.tree_util.tree_leaves(model)):
            from smlt.worker.frameworks.jax import JaxAdapter

            return JaxAdapter(task, model)
    return None
