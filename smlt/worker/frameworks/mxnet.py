"""MXNet 1.9 with Gluon on CPU: each gradient is a view into one flat buffer, which the collective reduces in place.

MXNet is no longer developed and needs NumPy before 1.24. The views are put in `Parameter._grad`, for which there is no
public way; there will be no later MXNet that could change it.
"""

from __future__ import annotations

from typing import Any

import mxnet
import numpy as np
from mxnet import autograd, gluon

from smlt.collective.packing import Packing
from smlt.errors import TaskError
from smlt.worker.buckets import Send
from smlt.worker.frameworks import Tensors
from smlt.worker.task import Task


class MxnetAdapter:
    """Drives a task whose model is a `gluon.Block` (see `smlt.worker.frameworks.Adapter`).

    `loss` is recorded by `autograd` in training mode. `optimizer` gives a `gluon.Trainer(..., kvstore=None)`.
    """

    def __init__(self, task: Task, model: Any) -> None:
        self.task, self.model = task, model
        parameters = dict(model.collect_params())
        for name, parameter in parameters.items():
            if parameter._deferred_init or parameter._data is None:
                raise TaskError(f"{name} has no value yet: give layers their input's size (in_units=…), and call initialize()")
            if parameter.grad_req != "null" and np.dtype(parameter.dtype) not in (np.float32, np.float64):
                raise TaskError(f"{name} is {np.dtype(parameter.dtype).name}: parameters must be float32 or float64")
            if parameter.grad_req != "null" and parameter._grad_stype != "default":
                raise TaskError(f"{name} gets a sparse gradient, which cannot be averaged: use sparse_grad=False")
        self._all = list(parameters.values())
        self._parameters = [parameter for parameter in self._all if parameter.grad_req != "null"]
        self._means = [parameter for parameter in self._all if parameter.grad_req == "null"]
        if not self._parameters:
            raise TaskError("the model has no parameter that wants a gradient")
        self._trainer = task.optimizer(model)
        if not isinstance(self._trainer, gluon.Trainer):
            raise TaskError(f"optimizer() gave a {type(self._trainer).__name__}, not a gluon.Trainer")
        if not {id(parameter) for parameter in self._trainer._params} <= {id(parameter) for parameter in self._all}:
            raise TaskError("the gluon.Trainer has parameters that the model has not")
        packing = Packing([(parameter.shape, parameter.dtype) for parameter in self._parameters])
        self.gradient = packing.buffers
        for parameter, view in zip(self._parameters, packing.views, strict=True):
            parameter.grad_req = "write"
            parameter._grad = [mxnet.nd.from_numpy(view, zero_copy=True)]
            autograd.mark_variables(parameter.list_data(), parameter.list_grad(), "write")
        self._kept: list[Any] = []

    def prepare(self, batch: Any) -> Any:
        if isinstance(batch, np.ndarray):
            return mxnet.nd.array(batch, dtype=batch.dtype)
        if isinstance(batch, tuple):
            return tuple(self.prepare(part) for part in batch)
        if isinstance(batch, dict):
            return {name: self.prepare(part) for name, part in batch.items()}
        return batch

    def compute(self, batch: Any, weight: float, send: Send) -> float:
        self.skip(send)  # parameters that the loss does not use keep these zeros
        with autograd.record():
            loss = self.task.loss(self.model, batch)
            if not isinstance(loss, mxnet.nd.NDArray) or loss.size != 1:
                raise TaskError("loss() of an MXNet task returns an NDArray with one element, the mean loss of the batch")
            scaled = loss if weight == 1 else loss * weight
        scaled.backward()
        mxnet.nd.waitall()  # backward only queues
        return float(loss.asscalar())

    def skip(self, send: Send) -> None:
        for buffer in self.gradient.values():
            buffer.fill(0)

    def apply(self) -> None:
        for parameter in self._parameters:  # of a parameter that only other workers used MXNet would say that it is stale
            parameter.data()._fresh_grad = True
        self._trainer.update(1)  # the gradients are means already
        mxnet.nd.waitall()

    def scale_learning_rate(self, times: float) -> None:
        if self._trainer.optimizer.lr_scheduler is not None:
            raise TaskError("the learning rate of the gluon.Trainer follows an lr_scheduler: train with --lr-rule none")
        self._trainer.set_learning_rate(self._trainer.learning_rate * times)

    def evaluate(self, batch: Any) -> dict[str, float]:
        return self.task.evaluate(self.model, batch)

    def parameters(self) -> Any:
        return {str(index): parameter.data().asnumpy() for index, parameter in enumerate(self._all)}

    def set_parameters(self, parameters: Any) -> None:
        for index, parameter in enumerate(self._all):
            _fill(parameter.data(), parameters[str(index)])

    def buffers(self) -> Tensors:
        found = {str(index): parameter.data().asnumpy() for index, parameter in enumerate(self._means)}
        return {name: array if array.dtype.kind in "biu" else array.astype(np.float64) for name, array in found.items()}

    def set_buffers(self, buffers: Tensors) -> None:
        for index, parameter in enumerate(self._means):
            _fill(parameter.data(), buffers[str(index)])

    def keep_buffers(self) -> None:
        self._kept = [parameter.data().asnumpy() for parameter in self._means]

    def restore_buffers(self) -> None:
        for parameter, before in zip(self._means, self._kept, strict=False):
            _fill(parameter.data(), before)

    # ---- checkpoints ----

    @property
    def _updater(self) -> Any:
        return self._trainer._updaters[0]

    def _positions(self) -> dict[int, int]:
        """The place in the model of each of the trainer's parameters.

        The trainer has them in the order of their names, which count the layers of a process: dense10 comes before dense9.
        """
        places = {id(parameter): place for place, parameter in enumerate(self._all)}
        return {index: places[id(parameter)] for index, parameter in enumerate(self._trainer._params)}

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        tensors: Tensors = {f"model.{index}": parameter.data().asnumpy() for index, parameter in enumerate(self._all)}
        positions, states = self._positions(), self._updater.states
        for index, state in states.items():
            for place, array in _leaves(state):
                tensors[f"optimizer.{positions[index]}{place}"] = array.asnumpy()
        optimizer = self._trainer.optimizer
        counts = {str(positions[index]): count for index, count in optimizer._index_update_count.items()}
        rest = {"num_update": optimizer.num_update, "counts": counts, "held": sorted(positions[index] for index in states)}
        if optimizer.lr_scheduler is None:
            rest["lr"] = self._trainer.learning_rate
        return tensors, rest

    def load_state(self, tensors: Tensors, rest: dict[str, Any]) -> None:
        for index, parameter in enumerate(self._all):
            if tensors[f"model.{index}"].shape != parameter.shape:
                raise ValueError(f"{parameter.name} has shape {parameter.shape}, not {tensors[f'model.{index}'].shape}")
        self.set_parameters({str(index): tensors[f"model.{index}"] for index in range(len(self._all))})
        optimizer, updater = self._trainer.optimizer, self._updater
        indices = {position: index for index, position in self._positions().items()}
        for position in rest["held"]:
            index = indices[position]
            state = optimizer.create_state_multi_precision(index, self._trainer._params[index].data())
            for place, array in _leaves(state):
                _fill(array, tensors[f"optimizer.{position}{place}"])
            updater.states[index], updater.states_synced[index] = state, True
        optimizer.num_update = int(rest["num_update"])
        optimizer._index_update_count.clear()
        optimizer._index_update_count.update({indices[int(at)]: int(count) for at, count in rest["counts"].items()})
        if "lr" in rest:
            self._trainer.set_learning_rate(float(rest["lr"]))


def _fill(target: Any, array: Any) -> None:
    """Copy an array into an NDArray. ValueError where the shapes differ."""
    if target.shape != array.shape:
        raise ValueError(f"an array of shape {array.shape} does not fit one of {target.shape}")
    target[:] = mxnet.nd.array(array, dtype=target.dtype)
    target.wait_to_read()


def _leaves(state: Any, place: str = "") -> list[tuple[str, Any]]:
    """The NDArrays in an optimizer's state, each with its place in it."""
    if isinstance(state, mxnet.nd.NDArray):
        return [(place, state)]
    if isinstance(state, (tuple, list)):
        return [leaf for index, part in enumerate(state) for leaf in _leaves(part, f"{place}.{index}")]
    return []
