"""JAX on CPU: a jitted function for the gradients, one for the optimizer's step; the model is a pytree of arrays.

Gradients are copied once, with their weight, from XLA's memory into one flat buffer, which the collective reduces in place.
The optimizer reads the buffer where it lies.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smlt.collective.packing import Packing
from smlt.errors import TaskError
from smlt.worker.buckets import Send
from smlt.worker.frameworks import Tensors
from smlt.worker.task import Task


class SGDState(NamedTuple):
    """Of `SGD`: the learning rate, where a rule can change it, and the velocities."""

    hyperparams: dict[str, Any]
    velocity: Any


class SGD:
    """Stochastic gradient descent with momentum, by Optax's protocol: v <- momentum * v + g;  w <- w - lr * v."""

    def __init__(self, lr: float, momentum: float = 0.0) -> None:
        self.lr, self.momentum = lr, momentum

    def init(self, params: Any) -> SGDState:
        """The state to begin with."""
        return SGDState({"learning_rate": jnp.asarray(self.lr, jnp.float32)}, jax.tree_util.tree_map(jnp.zeros_like, params))

    def update(self, updates: Any, state: SGDState, params: Any = None) -> tuple[Any, SGDState]:
        """What to add to the parameters for the gradients `updates`, and the state behind it."""
        velocity = jax.tree_util.tree_map(lambda v, g: self.momentum * v + g, state.velocity, updates)
        lr = state.hyperparams["learning_rate"]
        return jax.tree_util.tree_map(lambda v: -lr.astype(v.dtype) * v, velocity), SGDState(state.hyperparams, velocity)


class JaxAdapter:
    """Drives a task whose model is a pytree of floating-point JAX arrays (see `smlt.worker.frameworks.Adapter`).

    `optimizer` gives an object by Optax's protocol: `init(params)`, `update(gradients, state, params)`; an
    `optax.GradientTransformation`, or `SGD`. `loss` is jitted. A loss that draws random numbers takes a third argument `key`,
    a `jax.random` key of the step and the worker.
    """

    def __init__(self, task: Task, model: Any) -> None:
        self.task, self.model = task, model
        for path, leaf in jax.tree_util.tree_leaves_with_path(model):
            if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jnp.floating):
                kind = f"{leaf.dtype} array" if hasattr(leaf, "dtype") else type(leaf).__name__
                raise TaskError(
                    f"model(){jax.tree_util.keystr(path)} is a {kind}: all leaves must be floating-point JAX arrays"
                )
        self.optimizer = task.optimizer(model)
        if not (callable(getattr(self.optimizer, "init", None)) and callable(getattr(self.optimizer, "update", None))):
            raise TaskError(
                f"optimizer() gave a {type(self.optimizer).__name__}, which has no init() and update(), as Optax's have"
            )
        self._state = jax.tree_util.tree_map(jnp.asarray, self.optimizer.init(model))
        leaves = jax.tree_util.tree_leaves(model)
        packing = Packing([(leaf.shape, leaf.dtype) for leaf in leaves])
        self.gradient = packing.buffers
        self._views = packing.views
        self._places = packing.places
        self._takes_key = "key" in inspect.signature(task.loss).parameters
        self._differentiate = jax.jit(jax.value_and_grad(self._loss))
        self._step = jax.jit(self._take_step)

    def _loss(self, model: Any, batch: Any, key: Any) -> Any:
        loss = self.task.loss(model, batch, key) if self._takes_key else self.task.loss(model, batch)  # type: ignore[call-arg]
        if not isinstance(loss, jax.Array) or loss.size != 1:
            raise TaskError("loss() of a JAX task returns an array with one element, the mean loss of the batch")
        return loss.reshape(())

    def _take_step(self, model: Any, state: Any, buffers: dict[str, Any]) -> tuple[Any, Any]:
        # Behind the barrier nothing that is returned is the buffers' memory, which the next step writes to.
        buffers = jax.lax.optimization_barrier(buffers)
        leaves, structure = jax.tree_util.tree_flatten(model)
        gradients = [
            buffers[name][at : at + leaf.size].reshape(leaf.shape).astype(leaf.dtype)
            for (name, at), leaf in zip(self._places, leaves, strict=True)
        ]
        updates, state = self.optimizer.update(jax.tree_util.tree_unflatten(structure, gradients), state, model)
        return jax.tree_util.tree_map(lambda p, u: jnp.asarray(p + u).astype(p.dtype), model, updates), state

    def prepare(self, batch: Any) -> Any:
        return jax.tree_util.tree_map(jnp.asarray, batch)

    def compute(self, batch: Any, weight: float, send: Send) -> float:
        key = jax.random.key(np.random.randint(0, 2**31)) if self._takes_key else None
        loss, gradients = self._differentiate(self.model, batch, key)
        for view, gradient in zip(self._views, jax.tree_util.tree_leaves(gradients), strict=True):
            np.multiply(np.asarray(gradient), view.dtype.type(weight), out=view)
        return float(loss)

    def skip(self, send: Send) -> None:
        for buffer in self.gradient.values():
            buffer.fill(0)

    def apply(self) -> None:
        buffers = {name: jax.device_put(buffer) for name, buffer in self.gradient.items()}
        self.model, self._state = jax.block_until_ready(self._step(self.model, self._state, buffers))

    def scale_learning_rate(self, times: float) -> None:
        state, found = _scaled(self._state, times)
        if not found:
            raise TaskError(
                f"the optimizer, a {type(self.optimizer).__name__}, has no learning rate that a rule could change: make it by "
                "optax.inject_hyperparams(...)(learning_rate=NUMBER), or train with --lr-rule none"
            )
        self._state = state

    def evaluate(self, batch: Any) -> dict[str, float]:
        return self.task.evaluate(self.model, batch)

    def parameters(self) -> Any:
        return {str(index): np.array(leaf) for index, leaf in enumerate(jax.tree_util.tree_leaves(self.model))}

    def set_parameters(self, parameters: Any) -> None:
        self.model = _refilled(self.model, parameters, "")

    def buffers(self) -> Tensors:
        return {}

    def set_buffers(self, buffers: Tensors) -> None:
        pass

    def keep_buffers(self) -> None:
        pass  # arrays never change

    def restore_buffers(self) -> None:
        pass

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        tensors = {}
        for start, tree in (("model.", self.model), ("optimizer.", self._state)):
            for index, leaf in enumerate(jax.tree_util.tree_leaves(tree)):
                array = np.array(leaf)
                tensors[f"{start}{index}"] = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        return tensors, {}

    def load_state(self, tensors: Tensors, rest: dict[str, Any]) -> None:
        model, state = _refilled(self.model, tensors, "model."), _refilled(self._state, tensors, "optimizer.")
        self.model, self._state = model, state


def _refilled(tree: Any, tensors: Any, start: str) -> Any:
    """A pytree like `tree` with the arrays of `tensors`. ValueError where a shape differs."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    new = []
    for index, leaf in enumerate(leaves):
        array = tensors[f"{start}{index}"]
        if array.shape != leaf.shape:
            raise ValueError(f"{start}{index} has shape {leaf.shape}, not {array.shape}")
        new.append(jnp.array(array, leaf.dtype))
    return jax.tree_util.tree_unflatten(structure, new)


def _scaled(state: Any, times: float) -> tuple[Any, bool]:
    """An optimizer's state with its learning rate multiplied; whether there was one, and no schedule that sets it anew."""
    hyperparams = getattr(state, "hyperparams", None)
    if isinstance(hyperparams, dict) and "learning_rate" in hyperparams:
        if "learning_rate" in getattr(state, "hyperparams_states", {}):
            return state, False
        lr = hyperparams["learning_rate"]
        return state._replace(hyperparams={**hyperparams, "learning_rate": (lr * times).astype(lr.dtype)}), True
    if not isinstance(state, tuple):
        return state, False
    parts = [_scaled(part, times) for part in state]
    values = [value for value, _ in parts]
    return type(state)(*values) if hasattr(state, "_fields") else tuple(values), any(found for _, found in parts)
