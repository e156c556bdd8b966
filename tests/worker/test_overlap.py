"""Gradients sent while backward computes: the same bits as without, whatever the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from groups import Group
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import configure, losses, train

from smlt import Communicator, Task
from smlt.errors import TaskError
from smlt.worker.frameworks.torch import TorchAdapter

EACH = 1e-6  # MB: every parameter is a bucket of its own


class Wide(nn.Module):
    """Branches that may be computed, and so come back in backward, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.branches = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.last = nn.Linear(6, 1)
        self.order = [0, 1, 2, 3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        parts: dict[int, torch.Tensor] = {}
        for number in self.order:  # the order of computing, not of adding
            parts[number] = torch.tanh(self.branches[number](x))
        return self.last(torch.stack([parts[number] for number in range(4)]).sum(0)).squeeze(1)


class Base(Task):
    """Trains a Wide model on 53 samples; drawn without the process's generator, which all workers of a test share."""

    rank = 0

    def data(self) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(53, 4, generator=draw)
        return {"train": (x, x.sin().sum(1))}

    def net(self) -> nn.Module:
        return Wide()

    def model(self) -> Any:
        model, draw = self.net(), torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)
        return model

    def loss(self, model: Any, batch: Any) -> Any:
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    def optimizer(self, model: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)


class OtherOrder(Base):
    """Each rank computes the branches in an order of its own, another one at each step."""

    def loss(self, model: Any, batch: Any) -> Any:
        model.order = (
            np.random.default_rng([self.rank, len(batch[0]), int(batch[0].sum() * 1e4) % 1000]).permutation(4).tolist()
        )
        return super().loss(model, batch)


class Tied(Base):
    """One weight used three times."""

    def net(self) -> nn.Module:
        model = Wide()
        model.branches[1].weight = model.branches[0].weight
        model.branches[3] = model.branches[0]
        return model


class Frozen(Base):
    def net(self) -> nn.Module:
        model = Wide()
        model.branches[2].requires_grad_(False)
        model.last.bias.requires_grad_(False)
        return model


class Sometimes(Base):
    """Which branches take part hangs on the rank and the batch; the last layer's bias never does."""

    def loss(self, model: Any, batch: Any) -> Any:
        used = int(batch[0].sum() * 1e4) % 4
        x = torch.tanh(model.first(batch[0]))
        for number in range(used):
            x = torch.tanh(model.branches[number](x))
        return ((x @ model.last.weight[0] - batch[1]) ** 2).mean()


class Penalty(Base):
    """A gradient penalty: backward through a gradient."""

    def loss(self, model: Any, batch: Any) -> Any:
        x = batch[0].clone().requires_grad_()
        loss = ((model(x) - batch[1]) ** 2).mean()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        weights = torch.autograd.grad(loss, model.last.weight, create_graph=True)[0]
        return loss + slope.pow(2).sum() + 0.1 * weights.pow(2).sum()


class Clearing(Base):
    """Lets go of the gradients' memory, as training loops do."""

    def loss(self, model: Any, batch: Any) -> Any:
        model.zero_grad(set_to_none=True)
        return super().loss(model, batch)


# Two threads that ask for the generator's state can wait for each other for ever, when a garbage collection comes in between:
# its lock is held while the interpreter's is given away. Workers are processes; only here are they threads.
NO_STATE = {"preserve_rng_state": False}


class InPieces(Base):
    """Reentrant checkpoints: gradients come once for each piece in which a parameter is used."""

    def loss(self, model: Any, batch: Any) -> Any:
        x = torch.tanh(model.first(batch[0]))
        for number in (0, 1, 0, 2, 3):
            x = checkpoint(lambda x, n=number: torch.tanh(model.branches[n](x)), x, use_reentrant=True, **NO_STATE)
        return ((model.last(x).squeeze(1) - batch[1]) ** 2).mean()


class Recomputed(InPieces):
    def loss(self, model: Any, batch: Any) -> Any:
        return ((checkpoint(model, batch[0], use_reentrant=False, **NO_STATE) - batch[1]) ** 2).mean()


class Mixed(Base):
    """Parameters of several dtypes."""

    def net(self) -> nn.Module:
        model = Wide()
        model.branches[1].double()
        model.branches[3].double()
        forward = [branch.forward for branch in model.branches]
        for number in (1, 3):
            model.branches[number].forward = lambda x, f=forward[number]: f(x.double()).float()  # type: ignore[method-assign]
        return model


def run(group: Group, task: type[Base], bucket_mb: float, codec: str = "fp32") -> tuple[list[float], list[bytes]]:
    """The losses, and each worker's model."""

    def work(comm: Communicator) -> tuple[list[float], bytes]:
        mine = task()
        mine.rank = comm.rank
        trainer, rows = train(comm, configure(epochs=2, bucket_mb=bucket_mb, codec=codec), None, mine)
        state = trainer.adapter.model.state_dict()  # type: ignore[attr-defined]
        return losses(rows), b"".join(tensor.numpy().tobytes() for tensor in state.values())

    done = group.run(work)
    assert len({tuple(found) for found, _ in done}) == 1
    return done[0][0], [state for _, state in done]


@pytest.mark.parametrize(
    "task",
    [Base, OtherOrder, Tied, Frozen, Sometimes, Penalty, Clearing, InPieces, Recomputed, Mixed],
    ids=lambda t: t.__name__,
)
@pytest.mark.parametrize("n", [2, 3])
def test_every_bucket_size_gives_the_same_bits_as_one_all_reduce(group: Callable[..., Group], task: type[Base], n: int) -> None:
    workers = group(n)
    expected, states = run(workers, task, 0)
    assert len(expected) == 12
    assert len(set(states)) == 1
    for bucket_mb in (EACH, 150e-6):
        assert run(workers, task, bucket_mb) == (expected, states)


def test_compressed_gradients_give_the_same_curve_within_the_codecs_error(group: Callable[..., Group]) -> None:
    class Large(Base):
        def net(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 1), nn.Flatten(0))

        def optimizer(self, model: Any) -> Any:
            return torch.optim.SGD(model.parameters(), lr=1e-3)

    workers = group(3)
    expected, _ = run(workers, Large, 0, "fp16")
    found, states = run(workers, Large, EACH, "fp16")
    assert len(set(states)) == 1
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_workers_without_a_sample_send_the_same_buckets(group: Callable[..., Group]) -> None:
    workers = group(5)  # 5 share a last batch of 3
    assert run(workers, Base, EACH) == run(workers, Base, 0)


def adapter(task: Task, bucket_mb: float = EACH) -> TorchAdapter:
    return TorchAdapter(task, task.model(), max(1, int(bucket_mb * 2**20)))


def test_buckets_leave_while_backward_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Base()
    made, events = adapter(task), list[str]()
    made.model.first.bias.register_hook(lambda _: events.append("first layer"))  # type: ignore[union-attr]
    batch = task.data()["train"]
    for _ in range(2):
        events.clear()
        made.compute(batch, 1.0, lambda bucket: events.append(f"{bucket.numel()} sent"))
    at = events.index("first layer")
    assert events[:at] == ["1 sent", "6 sent", *["6 sent", "36 sent"] * 4]
    assert events[at + 1 :] == ["6 sent"]
    (last,) = made.gradient.values()
    assert last.numel() == 24


def test_a_gradient_that_never_comes_does_not_hold_up_the_others() -> None:
    task = Sometimes()
    made, sent = adapter(task), list[int]()
    for used in (2, 1, 1):
        batch = torch.full((1, 4), (used + 0.5) / 4e4), torch.zeros(1)
        sent.clear()
        before: list[int] = []
        made.model.first.bias.register_hook(lambda _, before=before: before.append(len(sent)))  # type: ignore[union-attr]
        made.compute(batch, 1.0, lambda bucket: sent.append(bucket.numel()))
        assert len(sent) == 11
    assert before == [10]


def test_the_memory_that_is_sent_holds_what_the_task_s_gradients_hold() -> None:
    task, sent = Clearing(), list[torch.Tensor]()
    made = adapter(task)
    for _ in range(2):
        sent.clear()
        made.compute(task.data()["train"], 1.0, lambda bucket: sent.append(bucket.clone()))
    model = task.model()
    Base().loss(model, task.data()["train"]).backward()
    expected = [parameter.grad.flatten() for parameter in list(model.parameters())[::-1]]
    found = [*sent, *made.gradient.values()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_error_in_sending_surfaces_as_itself_and_nothing_is_sent_after_it() -> None:
    class Odd(Exception):
        pass

    task, sent = Base(), list[int]()
    made = adapter(task)

    def send(bucket: torch.Tensor) -> None:
        sent.append(bucket.numel())
        if len(sent) == 13:
            raise Odd("thirteen")

    made.compute(task.data()["train"], 1.0, send)
    with pytest.raises(Odd, match="thirteen"):
        made.compute(task.data()["train"], 1.0, send)
    assert len(sent) == 13


def test_sparse_gradients_are_refused_by_name() -> None:
    class Words(Base):
        def net(self) -> nn.Module:
            return nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Flatten(), nn.Linear(3, 1))

        def loss(self, model: Any, batch: Any) -> Any:
            return model(batch).mean()

    for bucket_mb in (EACH, 4.0):
        with pytest.raises(TaskError, match=r"0\.weight gets a sparse gradient"):
            adapter(Words(), bucket_mb).compute(torch.arange(5), 1.0, lambda bucket: None)


def test_unfreezing_behind_the_workers_back_is_refused_by_name() -> None:
    task = Frozen()
    made = adapter(task)
    made.compute(task.data()["train"], 1.0, lambda bucket: None)
    made.model.last.bias.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(TaskError, match=r"last\.bias was frozen when training began"):
        made.compute(task.data()["train"], 1.0, lambda bucket: None)


def test_a_gradient_that_changes_after_it_was_sent_is_an_error() -> None:
    class Later(InPieces):
        whole = True

        def loss(self, model: Any, batch: Any) -> Any:
            return Base.loss(self, model, batch) if self.whole else super().loss(model, batch)

    task = Later()
    made = adapter(task)
    for _ in range(2):
        made.compute(task.data()["train"], 1.0, lambda bucket: None)
    task.whole = False
    with pytest.raises(TaskError, match="changed after it was sent"):
        made.compute(task.data()["train"], 1.0, lambda bucket: None)
