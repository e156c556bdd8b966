"""PyTorch on CPU: every parameter's gradient is a view into one flat buffer, which the collective reduces in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from smlt.errors import TaskError
from smlt.worker.buckets import FIRST_BUCKET_MB, Bucket, Countdown, Send, plan_buckets
from smlt.worker.frameworks import Tensors
from smlt.worker.task import Task

#: What a parameter group holds of its learning rate. All but the first are what PyTorch's schedulers compute from.
LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


class TorchAdapter:
    """Drives a PyTorch task (see `smlt.worker.frameworks.Adapter`)."""

    def __init__(self, task: Task, model: torch.nn.Module, bucket_bytes: int = 0) -> None:
        self.task, self.model = task, model
        self.optimizer = task.optimizer(model)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TaskError(f"optimizer() gave a {type(self.optimizer).__name__}, not a torch.optim.Optimizer")
        # Backward comes to the last parameters first.
        reverse = list(model.named_parameters())[::-1]
        self._names = [name for name, parameter in reverse if parameter.requires_grad]
        self._parameters = [parameter for _, parameter in reverse if parameter.requires_grad]
        self._frozen = [(name, parameter) for name, parameter in reverse if not parameter.requires_grad]
        if not self._parameters:
            raise TaskError("the model has no parameter that wants a gradient")
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._flat: dict[str, torch.Tensor] = {}
        self._views = self._lay_out()
        plan: list[Bucket] = []
        if bucket_bytes:
            sizes = [(_dtype(parameter), parameter.numel(), parameter.element_size()) for parameter in self._parameters]
            plan = plan_buckets(sizes, bucket_bytes, int(FIRST_BUCKET_MB * 2**20))
        self.gradient: dict[str, torch.Tensor] = self._flat
        self._early: list[torch.Tensor] = []
        if len(plan) > 1:
            *self._early, last = [self._flat[bucket.dtype][bucket.start : bucket.end] for bucket in plan]
            self.gradient = {plan[-1].dtype: last}
        self._countdown = Countdown(plan[:-1])
        hooked: Sequence[Any] = self._parameters  # the registrations have no annotations
        for index, parameter in enumerate(hooked):
            parameter.register_hook(partial(self._check, index))
            parameter.register_post_accumulate_grad_hook(partial(self._ready, index))

    def _lay_out(self) -> list[torch.Tensor]:
        """Make the flat buffers; returns the parameters' views, into which backward adds where `.grad` is one."""
        for dtype in dict.fromkeys(parameter.dtype for parameter in self._parameters):
            alike = [parameter for parameter in self._parameters if parameter.dtype == dtype]
            self._flat[_dtype(alike[0])] = torch.zeros(sum(parameter.numel() for parameter in alike), dtype=dtype)
        views, used = [], dict.fromkeys(self._flat, 0)
        for parameter in self._parameters:
            dtype_name = _dtype(parameter)
            at = used[dtype_name]
            used[dtype_name] += parameter.numel()
            views.append(self._flat[dtype_name][at : used[dtype_name]].view(parameter.shape))
        return views

    def _check(self, index: int, gradient: torch.Tensor) -> None:
        """Called by autograd before a gradient is added."""
        if gradient.layout != torch.strided:
            raise TaskError(f"{self._names[index]} gets a sparse gradient, which cannot be averaged: use sparse=False")

    def _ready(self, index: int, parameter: torch.Tensor) -> None:
        """Called by autograd when a gradient has been added."""
        self._restore(index)
        self._countdown.ready(index)

    def _restore(self, index: int) -> None:
        # The task may have let go of the view, as zero_grad() does: without it the workers would drift apart.
        parameter, view = self._parameters[index], self._views[index]
        if parameter.grad is not view:
            with torch.no_grad():
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
            parameter.grad = view

    def prepare(self, batch: Any) -> Any:
        if isinstance(batch, np.ndarray):
            return torch.from_numpy(batch)
        if isinstance(batch, tuple):
            return tuple(self.prepare(part) for part in batch)
        if isinstance(batch, dict):
            return {name: self.prepare(part) for name, part in batch.items()}
        return batch

    def compute(self, batch: Any, weight: float, send: Send) -> float:
        self._clear()
        self.model.train()
        loss = self.task.loss(self.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TaskError("loss() of a PyTorch task returns a tensor with one element, the mean loss of the batch")
        scaled = loss if weight == 1 else loss * weight
        for index in range(len(self._parameters)):
            self._restore(index)  # now: what is sent may not be written to
        if self._early:
            self._countdown.begin(lambda number: send(self._early[number]), self._absent(scaled))
        try:
            torch.autograd.backward(scaled)
        except BaseException:
            self._countdown.cancel()
            raise
        self._attach()
        for name, parameter in self._frozen:
            if parameter.grad is not None:
                raise TaskError(f"{name} was frozen when training began and got a gradient: unfreeze it in model()")
        self._countdown.finish()
        return float(loss.detach())

    def _absent(self, loss: torch.Tensor) -> list[int]:
        """The parameters that went without a gradient last time and will again: they are not in the graph of `loss`."""
        absent = self._countdown.lacking
        if not absent:
            return []
        found: set[int] = set()
        visited, front = set(), [loss.grad_fn]
        while front:
            node = front.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
            front += [following for following, _ in node.next_functions]
        return [index for index in absent if id(self._parameters[index]) not in found]

    def _clear(self) -> None:
        for flat in self._flat.values():
            flat.zero_()
        self._attach()

    def _attach(self) -> None:
        """Let `.grad` be the views."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def skip(self, send: Send) -> None:
        self._clear()
        for bucket in self._early:
            send(bucket)

    def apply(self) -> None:
        self.optimizer.step()

    def scale_learning_rate(self, times: float) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            if not isinstance(group.get("lr"), (int, float, torch.Tensor)):
                raise TaskError(
                    f'parameter group {index} of the optimizer, a {type(self.optimizer).__name__}, has no "lr" that a rule '
                    "could change: give it one, or train with --lr-rule none"
                )
            for name in LEARNING_RATES:
                if isinstance(group.get(name), (int, float, torch.Tensor)):
                    group[name] = group[name] * times  # not in place: groups may share a tensor

    def evaluate(self, batch: Any) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            return self.task.evaluate(self.model, batch)

    def parameters(self) -> Any:
        return {name: tensor for name, tensor in self.model.state_dict().items() if isinstance(tensor, torch.Tensor)}

    def set_parameters(self, parameters: Any) -> None:
        pass  # they are the model's own memory

    def buffers(self) -> Tensors:
        return {
            name: np.array(_array(buffer.double() if buffer.is_floating_point() else buffer))
            for name, buffer in self._buffers().items()
        }

    @torch.no_grad()
    def set_buffers(self, buffers: Tensors) -> None:
        for name, buffer in self._buffers().items():
            buffer.copy_(_tensor(buffers[name]))

    @torch.no_grad()
    def keep_buffers(self) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

    @torch.no_grad()
    def restore_buffers(self) -> None:
        for buffer, before in self._kept:
            buffer.copy_(before)

    def _buffers(self) -> dict[str, torch.Tensor]:
        # What is not persistent, such as a cache, may have another shape on each worker.
        persistent = self.model.state_dict()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in persistent}

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        tensors = {f"model.{name}": _array(tensor) for name, tensor in self.parameters().items()}
        state = self.optimizer.state_dict()
        scalars: dict[str, dict[str, Any]] = {}
        for index, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{name}"] = _array(value)
                else:
                    scalars.setdefault(str(index), {})[name] = value
        groups = []
        for index, group in enumerate(state["param_groups"]):
            tensors |= {f"group.{index}.{k}": _array(v) for k, v in group.items() if isinstance(v, torch.Tensor)}
            groups.append({k: v for k, v in group.items() if not isinstance(v, torch.Tensor)})
        bfloat16 = sorted(name for name, tensor in self.parameters().items() if tensor.dtype == torch.bfloat16)
        return tensors, {"scalars": scalars, "groups": groups, "bfloat16": bfloat16}

    def load_state(self, tensors: Tensors, rest: dict[str, Any]) -> None:
        start = len("model.")
        model = {name[start:]: _tensor(array) for name, array in tensors.items() if name.startswith("model.")}
        for name in rest["bfloat16"]:
            model[name] = model[name].to(torch.bfloat16)
        self.model.load_state_dict(model)
        state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["scalars"].items()}
        for name, array in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = _tensor(array)
        groups = [{k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in g.items()} for g in rest["groups"]]
        for name, array in tensors.items():
            if name.startswith("group."):  # a learning rate may be a tensor
                _, index, key = name.split(".", 2)
                groups[int(index)][key] = _tensor(array)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _array(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.generic]]:
    plain = tensor.detach().contiguous()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()


def _tensor(array: np.ndarray[Any, np.dtype[np.generic]]) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
