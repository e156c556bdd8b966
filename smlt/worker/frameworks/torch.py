"""PyTorch on CPU: every parameter's gradient is a view into one flat buffer, which the collective reduces in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from smlt.errors import TaskError
from smlt.worker.frameworks import Tensors
from smlt.worker.task import Task


class TorchAdapter:
    """Drives a PyTorch task (see `smlt.worker.frameworks.Adapter`)."""

    def __init__(self, task: Task, model: torch.nn.Module) -> None:
        self.task, self.model = task, model
        self.optimizer = task.optimizer(model)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TaskError(f"optimizer() gave a {type(self.optimizer).__name__}, not a torch.optim.Optimizer")
        self.gradient: dict[str, torch.Tensor] = {}
        self._views: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        if not by_dtype:
            raise TaskError("the model has no parameter that wants a gradient")
        for dtype, parameters in by_dtype.items():
            flat = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype)
            at = 0
            for parameter in parameters:  # backward adds into .grad where it is: the flat buffer
                parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
                self._views.append((parameter, parameter.grad))
                at += parameter.numel()
            self.gradient[str(dtype).removeprefix("torch.")] = flat

    def prepare(self, batch: Any) -> Any:
        if isinstance(batch, np.ndarray):
            return torch.from_numpy(batch)
        if isinstance(batch, tuple):
            return tuple(self.prepare(part) for part in batch)
        if isinstance(batch, dict):
            return {name: self.prepare(part) for name, part in batch.items()}
        return batch

    def compute(self, batch: Any, weight: float) -> float:
        self.skip()
        self.model.train()
        loss = self.task.loss(self.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TaskError("loss() of a PyTorch task returns a tensor with one element, the mean loss of the batch")
        torch.autograd.backward(loss if weight == 1 else loss * weight)
        for parameter, view in self._views:
            # The task may have let go of the view, as zero_grad() does: without it the workers would drift apart.
            if parameter.grad is not view:
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                parameter.grad = view
        return float(loss.detach())

    def skip(self) -> None:
        for flat in self.gradient.values():
            flat.zero_()
        for parameter, view in self._views:
            parameter.grad = view

    def apply(self) -> None:
        self.optimizer.step()

    def evaluate(self, batch: Any) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            return self.task.evaluate(self.model, batch)

    def parameters(self) -> Any:
        return {name: tensor for name, tensor in self.model.state_dict().items() if isinstance(tensor, torch.Tensor)}

    def buffers(self) -> Tensors:
        return {
            name: np.array(_array(buffer.double() if buffer.is_floating_point() else buffer))
            for name, buffer in self._buffers().items()
        }

    @torch.no_grad()
    def set_buffers(self, buffers: Tensors) -> None:
        for name, buffer in self._buffers().items():
            buffer.copy_(_tensor(buffers[name]))

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
        dtypes = {
            name: str(t.dtype).removeprefix("torch.") for name, t in self.parameters().items() if t.dtype == torch.bfloat16
        }
        return tensors, {"scalars": scalars, "groups": groups, "bfloat16": sorted(dtypes)}

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


def _array(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.generic]]:
    plain = tensor.detach().contiguous()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()


def _tensor(array: np.ndarray[Any, np.dtype[np.generic]]) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
