"""What a worker does in the tests of DistributedDataParallel: the same program, whatever the backend.

Each function runs on both ranks with the default group formed, and returns tensors and numbers to be compared.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from smlt.errors import ConfigError


class ToyModel(nn.Module):
    """The two layers of PyTorch's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.net1 = nn.Linear(10, 10)
        self.relu = nn.ReLU()
        self.net2 = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net2(self.relu(self.net1(x)))


class Branches(nn.Module):
    """One of two layers has a turn: the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor, second: bool) -> torch.Tensor:
        return self.last((self.second if second else self.first)(x))


class Checked(nn.Module):
    """A convolution with batch norm, whose buffers DDP broadcasts, and a layer of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 5).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.conv(x)).relu().mean((2, 3)).double())


def samples(n: int = 96) -> TensorDataset:
    torch.manual_seed(7)
    return TensorDataset(torch.randn(n, 10), torch.randn(n, 5))


def batches(epochs: int = 2) -> list[list[torch.Tensor]]:
    """This rank's, from a DistributedSampler."""
    data = samples()
    sampler = DistributedSampler(data)
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += list(DataLoader(data, batch_size=8, sampler=sampler))
    return found


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(dist.get_rank())  # DDP takes rank 0's
    return kind()


def outcome(model: nn.Module, losses: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"model": state, "losses": [loss if isinstance(loss, float) else loss.item() for loss in losses or []], **more}


def train(model: nn.Module, steps: list[list[torch.Tensor]], optimizer: optim.Optimizer | None = None) -> list[float]:
    optimizer = optimizer or optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for x, y in steps:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tutorial() -> dict[str, Any]:
    model = DistributedDataParallel(seeded(ToyModel))
    return outcome(model, train(model, batches()))


def bucket_views() -> dict[str, Any]:
    model = DistributedDataParallel(seeded(ToyModel), gradient_as_bucket_view=True, bucket_cap_mb=0.0002)
    return outcome(model, train(model, batches()))


def static_graph() -> dict[str, Any]:
    model = DistributedDataParallel(seeded(ToyModel), static_graph=True)
    return outcome(model, train(model, batches()))


def unused_parameters() -> dict[str, Any]:
    """In some steps the ranks take different branches, in others the same one, so that a layer has no gradient at all."""
    model = DistributedDataParallel(seeded(Branches), find_unused_parameters=True)
    optimizer, losses = optim.SGD(model.parameters(), lr=0.05), []
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x, second=bool(step % 3 == 0 or (step + dist.get_rank()) % 2)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return outcome(model, losses)


def gradient_accumulation() -> dict[str, Any]:
    model = DistributedDataParallel(seeded(ToyModel))
    optimizer, losses = optim.SGD(model.parameters(), lr=0.05), []
    steps = batches()
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        optimizer.zero_grad()
        with model.no_sync():
            losses.append(nn.functional.mse_loss(model(first[0]), first[1]))
            losses[-1].backward()
        losses.append(nn.functional.mse_loss(model(second[0]), second[1]))
        losses[-1].backward()
        optimizer.step()
    return outcome(model, losses)


def uneven_inputs() -> dict[str, Any]:
    """Rank 1 has three batches fewer."""
    model = DistributedDataParallel(seeded(ToyModel))
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    steps = batches()[: 9 - 3 * dist.get_rank()]
    with Join([model]):
        losses = train(model, steps, optimizer)
    return outcome(model, losses)


def mixed_model() -> dict[str, Any]:
    model = DistributedDataParallel(seeded(Checked))
    torch.manual_seed(100 + dist.get_rank())
    steps = [(torch.randn(4, 1, 8, 8), torch.randn(4, 5, dtype=torch.float64)) for _ in range(4)]
    return outcome(model, train(model, [list(step) for step in steps]))


def zero_redundancy() -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(seeded(ToyModel))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optim.Adam, lr=0.01)
    losses = train(model, batches(), optimizer)
    optimizer.consolidate_state_dict(to=0)
    state = optimizer.state_dict()["state"] if dist.get_rank() == 0 else {}
    return outcome(model, losses, optimizer={str(index): part["exp_avg"] for index, part in state.items()})


def local_sgd() -> dict[str, Any]:
    """Parameters averaged every fourth step instead of gradients."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    model, losses = seeded(ToyModel), []
    optimizer, averager = optim.SGD(model.parameters(), lr=0.05), PeriodicModelAverager(period=4)
    for x, y in batches():
        losses += train(model, [[x, y]], optimizer)
        averager.average_parameters(model.parameters())
    return outcome(model, losses)


def fsdp() -> dict[str, Any]:
    """FullyShardedDataParallel, the class, on CPU."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    torch.manual_seed(0)
    model = FullyShardedDataParallel(ToyModel(), device_id=torch.device("cpu"))
    losses = train(model, batches())
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        return outcome(model, losses)


def fully_shard() -> dict[str, Any]:
    """FSDP2: `fully_shard` over a mesh of CPUs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = ToyModel()
    for part in (model.net1, model.net2, model):
        shard(part, mesh=mesh)
    losses = train(model, batches())
    full = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    return {"model": full, "losses": losses}


def distributed_checkpoint(folder: str) -> dict[str, Any]:
    """torch.distributed.checkpoint, there and back."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = DistributedDataParallel(seeded(ToyModel))
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    train(model, batches(1), optimizer)
    saved, saved_optimizer = get_state_dict(model, optimizer)
    path = str(Path(folder) / dist.get_backend())
    checkpoint.save({"model": saved, "optimizer": saved_optimizer}, checkpoint_id=path)
    before = copy.deepcopy(saved)

    other = DistributedDataParallel(seeded(ToyModel))
    other_optimizer = optim.Adam(other.parameters(), lr=0.01)
    train(other, batches(1)[:1], other_optimizer)
    empty, empty_optimizer = get_state_dict(other, other_optimizer)
    checkpoint.load({"model": empty, "optimizer": empty_optimizer}, checkpoint_id=path)
    set_state_dict(other, other_optimizer, model_state_dict=empty, optim_state_dict=empty_optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.module.state_dict().items())
    return outcome(other, train(other, batches(1), other_optimizer))


def torch_fp16_hook() -> dict[str, Any]:
    """PyTorch's own hook, which casts before it sums."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model = DistributedDataParallel(seeded(ToyModel))
    model.register_comm_hook(None, fp16_compress_hook)
    return outcome(model, train(model, batches()))


def power_sgd() -> dict[str, Any]:
    """PyTorch's PowerSGD hook."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    model = DistributedDataParallel(seeded(ToyModel))
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return outcome(model, train(model, batches()))


def sync_batch_norm() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)))
    model = DistributedDataParallel(model)
    return outcome(model, train(model, batches(1)))


def tensor_parallel() -> dict[str, Any]:
    """The two layers cut over the workers by torch.distributed.tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = parallelize_module(ToyModel(), mesh, {"net1": ColwiseParallel(), "net2": RowwiseParallel()})
    data = samples()
    losses = train(model, list(DataLoader(data, batch_size=8)), optim.SGD(model.parameters(), lr=0.05))
    return {"model": {name: parameter.full_tensor() for name, parameter in model.named_parameters()}, "losses": losses}


def debugged() -> dict[str, Any]:
    """With what TORCH_DISTRIBUTED_DEBUG=DETAIL switches on."""
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        return tutorial()
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


def sparse_gradients() -> str:
    model = DistributedDataParallel(nn.Embedding(10, 3, sparse=True))
    try:
        model(torch.tensor([1, 2])).sum().backward()
    except ConfigError as error:
        return str(error)
    return ""
