"""What a worker does in the tests of the communication hooks: see ddp_cases.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ddp_cases import Branches, ToyModel, batches, outcome, seeded, train
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

import smlt.torch
from smlt.collective.two_level import TwoLevelCommunicator

#: int8 has 127 steps between 0 and the largest value of a block; a gradient of less than half a step is rounded away.
STEP = 1 / 127


class Constants(nn.Module):
    """Gradients that never change: in each of three layers 1.0 in every 16th element, in the others 0.3 steps of int8.

    The layers are used in the order in which they were made, so DDP expects their gradients in the order in which they
    do not come, and lays its buckets out anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.zeros(size) for size in (160, 320, 480))

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for layer in reversed(self.layers):
            gradient = torch.full_like(layer, 0.3 * STEP)
            gradient[::16] = 1.0
            total = total + (layer * gradient).sum()
        return total * times


def constants_after(steps: int, feedback: bool | None, saved_after: int = 0) -> dict[str, Any]:
    """Rank 0 and 1 alike; behind step `saved_after` all goes on in a new process's objects."""
    model, state = _hooked(Constants(), feedback)
    for step in range(steps):
        if saved_after and step == saved_after:
            kept, weights = state.state_dict(model), model.module.state_dict()
            fresh = Constants()
            fresh.load_state_dict(weights)
            model, state = _hooked(fresh, feedback)
            state.load_state_dict(kept, model)
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        optimizer.zero_grad()
        model(torch.ones(())).backward()
        optimizer.step()
    small = torch.cat([layer.detach().view(-1, 16)[:, 1:].reshape(-1) for layer in model.module.layers])
    large = torch.cat([layer.detach()[::16] for layer in model.module.layers])
    residuals = state.state_dict(model)["residuals"]
    buckets = [[parameter.numel() for parameter in bucket.parameters] for bucket in state._buckets.values()]
    return {"small": small, "large": large, "residuals": residuals, "buckets": buckets}


def _hooked(module: nn.Module, feedback: bool | None) -> tuple[DistributedDataParallel, smlt.torch.HookState]:
    model = DistributedDataParallel(module, bucket_cap_mb=0.0015)
    state = smlt.torch.HookState("int8", feedback=feedback)
    model.register_comm_hook(state, smlt.torch.compress_hook)
    return model, state


def hooked(name: str, **settings: Any) -> dict[str, Any]:
    """The tutorial's training, with a hook."""
    model = DistributedDataParallel(seeded(ToyModel), **settings)
    _register(model, name)
    return outcome(model, train(model, batches()))


def hooked_branches() -> dict[str, Any]:
    model = DistributedDataParallel(seeded(Branches), find_unused_parameters=True)
    _register(model, "fp16")
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        with model.no_sync():
            nn.functional.mse_loss(model(x, second=bool(step % 2)), y).backward()
        nn.functional.mse_loss(model(x, second=bool((step + dist.get_rank()) % 2)), y).backward()
        optimizer.step()
    return outcome(model)


def _register(model: DistributedDataParallel, name: str) -> None:
    if name in ("fp16", "bf16"):
        model.register_comm_hook(None, getattr(smlt.torch, f"{name}_hook"))
    else:
        model.register_comm_hook(smlt.torch.HookState(name), smlt.torch.compress_hook)


def hooked_two_level(job: str) -> dict[str, Any]:
    """Both workers on one machine; then the other leaves, which the next step must say."""
    place: dict[str, Any] = {"rank": dist.get_rank(), "world_size": 2, "local_rank": dist.get_rank(), "local_size": 2}
    model = DistributedDataParallel(seeded(ToyModel), bucket_cap_mb=0.0001)
    with TwoLevelCommunicator(job=job, timeout_s=30, **place) as comm:
        model.register_comm_hook(comm, smlt.torch.two_level_hook)
        found = outcome(model, train(model, batches()))
        if dist.get_rank() == 0:
            found["error"] = _error_of_a_step(model)
    return found


def among_others() -> list[float]:
    """Collectives of the same group's begin between backward and step, and are waited for a step later."""
    model = DistributedDataParallel(seeded(ToyModel))
    _register(model, "fp16")
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    sums: list[float] = []
    earlier: tuple[Any, torch.Tensor] | None = None
    for x, y in batches():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        count = torch.ones(1)
        work = dist.all_reduce(count, async_op=True)
        loss.backward()
        optimizer.step()
        if earlier is not None:
            earlier[0].wait()
            sums.append(earlier[1].item())
        earlier = work, count
    assert earlier is not None
    earlier[0].wait()
    return sums


def on_group_of_gloo() -> str:
    model = DistributedDataParallel(seeded(ToyModel), process_group=dist.new_group(backend="gloo"))
    model.register_comm_hook(dist.new_group(backend="gloo"), smlt.torch.fp16_hook)
    return _error_of_a_step(model)


def disagreeing() -> str:
    model = DistributedDataParallel(seeded(ToyModel))
    _register(model, "fp16" if dist.get_rank() == 0 else "bf16")
    return _error_of_a_step(model)


def _error_of_a_step(model: nn.Module) -> str:
    try:
        train(model, batches(1)[:1])
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    except smlt.errors.SmltError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def misfitting_state() -> list[str]:
    model, state = _hooked(Constants(), None)
    kept = state.state_dict(model)
    found = []
    for codec, module, saved in (
        ("fp16", Constants(), kept),
        ("int8", ToyModel(), {**kept, "residuals": {"layers.0": torch.zeros(160)}}),
    ):
        try:
            smlt.torch.HookState(codec).load_state_dict(saved, module)
        except smlt.errors.CheckpointError as error:
            found.append(str(error))
    return found
