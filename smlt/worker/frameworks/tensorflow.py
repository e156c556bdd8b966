"""TensorFlow with Keras 3 on CPU: a compiled function for the gradients, one for the optimizer's step.

Gradients are copied once, with their weight, from TensorFlow's memory into one flat buffer, which the collective reduces in
place. The optimizer reads the buffer where it lies (DLPack).
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from smlt.collective.packing import Packing
from smlt.errors import TaskError
from smlt.tensorflow import array_of, as_tensor, value_of
from smlt.worker.buckets import Send
from smlt.worker.frameworks import Tensors
from smlt.worker.task import Task


class TensorflowAdapter:
    """Drives a task whose model is a `keras.Model` (see `smlt.worker.frameworks.Adapter`).

    `loss` is compiled once (`tf.function`), for batches of any size: their first dimension is None. Before each step
    Keras's seed generators, those of Dropout among them, are set from the step's seed. `tf.random` in a loss draws on by
    itself, and differs after a resume: draw by Keras's layers.
    """

    def __init__(self, task: Task, model: Any) -> None:
        self.task, self.model = task, model
        if not model.built:
            raise TaskError(
                "the Keras model has no variables yet: begin it with keras.Input(shape), or call build() in model()"
            )
        self._variables = list(model.trainable_variables)
        if not self._variables:
            raise TaskError("the model has no variable that wants a gradient")
        self.optimizer = task.optimizer(model)
        if not isinstance(self.optimizer, keras.optimizers.Optimizer):
            raise TaskError(f"optimizer() gave a {type(self.optimizer).__name__}, not a keras.optimizers.Optimizer")
        self.optimizer.build(self._variables)
        self._means = list(model.non_trainable_weights)
        self._seeds = [v for v in model.non_trainable_variables if v.path.endswith("seed_generator_state")]
        packing = Packing([(tuple(v.shape), tf.as_dtype(v.dtype).as_numpy_dtype) for v in self._variables])
        self.gradient = packing.buffers
        self._views = packing.views
        self._gradients = [as_tensor(view) for view in self._views]  # the same memory
        self._checked = False
        self._kept: list[Any] = []
        self._compiled: Any = None
        self._step = tf.function(self._take_step)

    def _differentiate(self, batch: Any) -> Any:
        # One function for all sizes: those that TensorFlow makes by itself depend on which size it meets first, and so
        # would the last bits of a resumed run.
        if self._compiled is None:
            specs = tf.nest.map_structure(lambda part: tf.TensorSpec([None, *part.shape[1:]], part.dtype), batch)
            self._compiled = tf.function(self._loss_and_gradients, input_signature=[specs])
        return self._compiled(batch)

    def _loss_and_gradients(self, batch: Any) -> Any:
        variables = [v.value for v in self._variables]
        with tf.GradientTape() as tape:
            loss = self.task.loss(self.model, batch)
        gradients = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return loss, [tf.convert_to_tensor(gradient) for gradient in gradients]  # also of an embedding: IndexedSlices

    def _take_step(self, gradients: list[Any]) -> None:
        pairs = zip(gradients, self._variables, strict=True)
        self.optimizer.apply([tf.cast(gradient, variable.dtype) for gradient, variable in pairs], self._variables)

    def prepare(self, batch: Any) -> Any:
        return tf.nest.map_structure(tf.convert_to_tensor, batch)

    def compute(self, batch: Any, weight: float, send: Send) -> float:
        for seed in self._seeds:
            seed.assign(np.random.randint(0, 2**31, tuple(seed.shape)))
        loss, gradients = self._differentiate(batch)
        if not tf.is_tensor(loss) or loss.shape.num_elements() != 1:
            raise TaskError("loss() of a TensorFlow task returns a tensor with one element, the mean loss of the batch")
        for view, gradient in zip(self._views, gradients, strict=True):
            np.multiply(array_of(gradient), view.dtype.type(weight), out=view)
        return float(loss)

    def skip(self, send: Send) -> None:
        for buffer in self.gradient.values():
            buffer.fill(0)

    def apply(self) -> None:
        self._step(self._gradients)
        if not self._checked:
            self._checked = True
            self._part_from_gradients()

    def _part_from_gradients(self) -> None:
        """An optimizer that assigns a gradient to a variable makes the two one memory: give it copies from now on."""
        held = [v for v in (*self._variables, *self.optimizer.variables) if v.shape]
        if any(np.may_share_memory(np.asarray(v.value), b) for v in held for b in self.gradient.values()):
            step, views = self._step, self._views
            self._step = lambda _: step([tf.constant(view) for view in views])
            for variable in held:
                variable.assign(value_of(variable))

    def scale_learning_rate(self, times: float) -> None:
        text = f"the learning rate of the optimizer, a {type(self.optimizer).__name__}, cannot be changed"
        try:
            self.optimizer.learning_rate = float(np.asarray(self.optimizer.learning_rate)) * times
        except (AttributeError, TypeError, ValueError) as error:
            raise TaskError(f"{text}: {error}; give it as a number, or train with --lr-rule none") from error

    def evaluate(self, batch: Any) -> dict[str, float]:
        return self.task.evaluate(self.model, batch)

    def parameters(self) -> Any:
        return {str(index): value_of(variable) for index, variable in enumerate(self.model.weights)}

    def set_parameters(self, parameters: Any) -> None:
        for index, variable in enumerate(self.model.weights):
            variable.assign(parameters[str(index)])

    def buffers(self) -> Tensors:
        found = {str(index): value_of(variable) for index, variable in enumerate(self._means)}
        return {name: array if array.dtype.kind in "biu" else array.astype(np.float64) for name, array in found.items()}

    def set_buffers(self, buffers: Tensors) -> None:
        for index, variable in enumerate(self._means):
            variable.assign(buffers[str(index)].astype(tf.as_dtype(variable.dtype).as_numpy_dtype))

    def keep_buffers(self) -> None:
        self._kept = [value_of(variable) for variable in self._means]

    def restore_buffers(self) -> None:
        for variable, before in zip(self._means, self._kept, strict=False):
            variable.assign(before)

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        return {name: _plain(value_of(variable)) for name, variable in self._named().items()}, {}

    def load_state(self, tensors: Tensors, rest: dict[str, Any]) -> None:
        named = self._named()
        for name, variable in named.items():
            if tensors[name].shape != tuple(variable.shape):
                raise ValueError(f"{name} ({variable.path}) has shape {tuple(variable.shape)}, not {tensors[name].shape}")
        for name, variable in named.items():
            variable.assign(tensors[name].astype(tf.as_dtype(variable.dtype).as_numpy_dtype))

    def _named(self) -> dict[str, Any]:
        # By number: Keras counts the layers of a process in their names.
        found = {f"model.{index}": variable for index, variable in enumerate(self.model.weights)}
        return found | {f"optimizer.{index}": variable for index, variable in enumerate(self.optimizer.variables)}


def _plain(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bfloat16 as float32, which a checkpoint can hold."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
