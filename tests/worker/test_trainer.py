"""Training: the curve does not depend on the number of workers, nor on where a run was stopped and resumed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from groups import Group
from training import Line, Noisy, Sequential, configure, losses, train

from smlt import Communicator, Task
from smlt.errors import CheckpointError, CollectiveError, TaskError
from smlt.store.object import DirectoryObjectStore
from smlt.worker import checkpoint
from smlt.worker.trainer import Trainer


def test_the_curve_is_the_same_for_any_number_of_workers(group: Callable[..., Group], store: Any) -> None:
    with Communicator() as comm:
        _, rows = train(comm, configure(), None)
    expected = losses(rows)
    assert len(expected) == 18
    assert np.mean(expected[-6:]) < 0.3 * np.mean(expected[:6])
    for n in (2, 5, 7):  # 7 workers share a last batch of 3 samples
        workers = Group(store.url, f"curve-{n}", n)
        for _, rows in workers.run(lambda comm: train(comm, configure(), None)):
            np.testing.assert_allclose(losses(rows), expected, rtol=1e-5)
            mse = [row["metrics"]["mse"] for row in rows if row.get("kind") == "epoch"]
            assert len(mse) == 3
        workers.close()


# A process has one generator of each kind: dropout and noise are the same only with one worker in it.
@pytest.mark.parametrize(("task", "n"), [(Line, 2), (Noisy, 1), (Sequential, 1)])
@pytest.mark.parametrize("stop_at", [4, 5, 6])  # in the middle of an epoch, at its last step, behind it
def test_a_stopped_and_resumed_run_ends_in_the_same_bits(
    group: Callable[..., Group], tmp_path: Path, task: type[Task], n: int, stop_at: int
) -> None:
    def bits(folder: Path) -> bytes:
        tensors, _ = checkpoint.load_latest(DirectoryObjectStore(folder), "run/checkpoints") or ({}, {})
        return b"".join(tensors[name].tobytes() for name in sorted(tensors))

    workers = group(n)
    whole = workers.run(lambda comm: train(comm, configure(), DirectoryObjectStore(tmp_path / "whole"), task()))
    first = workers.run(lambda comm: train(comm, configure(), DirectoryObjectStore(tmp_path / "cut"), task(), stop_at=stop_at))
    # Both stop behind the same step: rank 0 asked during step `stop_at`, all hear it in the next.
    assert [trainer.state for trainer, _ in first] == ["stopped"] * n
    assert [trainer.step for trainer, _ in first] == [stop_at + 1] * n
    second = workers.run(lambda comm: train(comm, configure(), DirectoryObjectStore(tmp_path / "cut"), task(), resume=True))
    assert losses(first[0][1]) + losses(second[0][1]) == losses(whole[0][1])
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole") != b""


class Normalized(Sequential):
    """With running means, and buffers that nothing changes."""

    def model(self) -> Any:
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
        model.register_buffer("third", torch.tensor([1 / 3, -torch.inf, 1e-30]))
        model.register_buffer("brief", torch.tensor([1 / 3], dtype=torch.bfloat16))
        model.register_buffer("mask", torch.tensor([True, False]))
        return model

    def loss(self, model: Any, batch: Any) -> Any:
        if len(batch[0]) == 1:  # nothing to normalize
            return ((batch[0].sum() - batch[1]) ** 2).mean() * 0 + sum(p.sum() * 0 for p in model.parameters())
        return super().loss(model, batch)


@pytest.mark.parametrize("stop_at", [0, 4])  # to the end; stopped within an epoch
def test_state_that_gradients_do_not_reach_is_the_same_on_every_worker(
    group: Callable[..., Group], tmp_path: Path, stop_at: int
) -> None:
    import torch

    objects = DirectoryObjectStore(tmp_path)
    done = group(5).run(lambda comm: train(comm, configure(), objects, Normalized(), stop_at=stop_at)[0])
    assert done[0].state == ("stopped" if stop_at else "done")
    states = [trainer.adapter.model.state_dict() for trainer in done]  # type: ignore[attr-defined]
    saved, _ = checkpoint.load_latest(objects, "run/checkpoints") or ({}, {})
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, state[name]) for state in states), name
        np.testing.assert_array_equal(saved[f"model.{name}"], tensor.float() if name == "brief" else tensor)
    fresh = Normalized().model().state_dict()
    for name in ("third", "brief", "mask"):
        assert torch.equal(states[0][name], fresh[name])
    assert states[0]["1.running_mean"].abs().max() > 0
    assert states[0]["1.num_batches_tracked"] >= 5


def test_running_means_become_the_mean_of_the_workers(group: Callable[..., Group]) -> None:
    import torch

    def share(comm: Communicator) -> Any:
        trainer, _ = train(comm, configure(epochs=1), None, Normalized())
        norm = trainer.adapter.model[1]  # type: ignore[attr-defined]
        with torch.no_grad():
            norm.running_mean.fill_(comm.rank)
            norm.num_batches_tracked.fill_(7 * comm.rank)
        trainer._share_buffers()
        return norm.running_mean.tolist(), norm.num_batches_tracked.item()

    assert group(4).run(share) == [([1.5] * 8, 21)] * 4


@pytest.mark.parametrize("to_none", [True, False])
def test_a_task_may_clear_its_gradients(group: Callable[..., Group], to_none: bool) -> None:
    class Plain(Sequential):
        def model(self) -> Any:
            import torch

            model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0))
            for parameter in model.parameters():  # not drawn: the workers are threads
                torch.nn.init.constant_(parameter, 0.1)
            return model

    class Clearing(Plain):
        def loss(self, model: Any, batch: Any) -> Any:
            model.zero_grad(set_to_none=to_none)
            return super().loss(model, batch)

        def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
            model.zero_grad(set_to_none=to_none)
            return super().evaluate(model, batch)

    workers = group(4)  # the last batch of an epoch has 3 samples: one worker has none
    expected = workers.run(lambda comm: losses(train(comm, configure(), None, Plain())[1]))
    assert workers.run(lambda comm: losses(train(comm, configure(), None, Clearing())[1])) == expected


def test_training_ends_at_the_target(tmp_path: Path) -> None:
    class Sure(Line):
        def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
            return {"accuracy": 0.9}

    with Communicator() as comm:
        trainer, rows = train(comm, configure(target_accuracy=0.8), None, Sure())
        assert (trainer.state, trainer.epoch, len(losses(rows))) == ("done", 1, 6)
        with pytest.raises(TaskError, match='needs "accuracy"'):
            train(comm, configure(target_accuracy=0.8), None)


def test_a_resumed_run_must_be_the_same_run(tmp_path: Path) -> None:
    objects = DirectoryObjectStore(tmp_path)
    with Communicator() as comm:
        train(comm, configure(epochs=1), objects)
        with pytest.raises(CheckpointError, match="made with seed 0, this run has 1"):
            train(comm, configure(seed=1), objects, resume=True)
        with pytest.raises(CheckpointError, match="does not fit the model"):
            train(comm, configure(), objects, Sequential(), resume=True)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("data", lambda self: [1, 2], '"train" is missing'),
        ("model", lambda self: 3, r"model\(\) gave a builtins\.int"),
        ("loss", lambda self, model, batch: 1.0, r"returns \(loss, gradients by name\)"),
        ("loss", lambda self, model, batch: (1.0, {"w": 0}), r"gave gradients \['w'\] for a model of \['b', 'w'\]"),
        ("evaluate", lambda self, model, batch: 3, r"evaluate\(\) gave a int"),
    ],
)
def test_parts_that_give_the_wrong_thing_are_named(part: str, value: Any, message: str) -> None:
    with Communicator() as comm, pytest.raises(TaskError, match=message):
        train(comm, configure(), None, type("Odd", (Line,), {part: value})())


def test_nobody_reports_its_end_before_the_checkpoint_of_the_epoch_is_written(
    group: Callable[..., Group], tmp_path: Path
) -> None:
    written: list[bool] = []

    class Slow(DirectoryObjectStore):
        def put(self, key: str, content: bytes) -> None:
            if key.endswith("000000006/MANIFEST.json"):
                time.sleep(0.3)
            super().put(key, content)

    def run(comm: Communicator) -> None:
        def report(row: dict[str, Any]) -> str:
            if row.get("kind") == "end":
                written.append((tmp_path / "run" / "checkpoints" / "000000006" / "MANIFEST.json").exists())
            return "stop" if row["step"] == 5 else ""

        trainer = Trainer(configure(rank=comm.rank, world_size=2), Line(), Slow(tmp_path), report)
        trainer.attach(comm)
        trainer.begin(False)
        assert trainer.run() == "stopped"
        assert trainer.step == 6

    group(2).run(run)
    assert written == [True, True]


def test_workers_that_find_different_checkpoints_do_not_begin(group: Callable[..., Group], tmp_path: Path) -> None:
    group(1).run(lambda comm: train(comm, configure(), DirectoryObjectStore(tmp_path / "0"), Line(), stop_at=7))
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    newest = max((tmp_path / "1" / "run" / "checkpoints").iterdir())
    (newest / "MANIFEST.json").unlink()  # as if its read had failed there: the one before is found

    def begin(comm: Communicator) -> None:
        train(comm, configure(), DirectoryObjectStore(tmp_path / str(comm.rank)), Line(), resume=True)

    for outcome in group(2).attempt(begin):
        assert isinstance(outcome.error, CollectiveError)
        assert "begin at different steps: [8, 6]" in str(outcome.error)
