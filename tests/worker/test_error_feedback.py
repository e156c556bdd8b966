"""Error feedback in training: it is used, it is kept in checkpoints, and it never stands in the way of a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from groups import Group
from training import Line, Sequential, configure, train

from smlt import Communicator
from smlt.store.object import DirectoryObjectStore

STOP_AT = 8  # in the second of three epochs


class Wide(Line):
    """Enough parameters to be compressed, in NumPy."""

    def data(self) -> dict[str, Any]:
        rng = np.random.default_rng(2)
        x = rng.standard_normal((53, 300)).astype(np.float32)
        return {"train": (x, (x @ rng.standard_normal(300)).astype(np.float32))}

    def model(self) -> Any:
        return {"w": np.zeros(300, np.float32), "b": np.zeros((), np.float32)}


class Layers(Sequential):
    """The same in PyTorch, in several buckets."""

    def model(self) -> Any:
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))
        with torch.no_grad():  # the workers are threads here and share PyTorch's generator
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape))
        return model


SETTINGS: dict[str, Any] = {"codec": "int8", "error_feedback": True, "bucket_mb": 0.001}


def parameters(trainer: Any) -> bytes:
    tensors, _ = trainer.adapter.state()
    return b"".join(tensors[name].tobytes() for name in sorted(tensors))


def interrupted(workers: Group, objects: DirectoryObjectStore, task: type[Line]) -> None:
    workers.run(lambda comm: train(comm, configure(**SETTINGS), objects, task(), stop_at=STOP_AT))


@pytest.mark.parametrize("task", [Wide, Layers])
def test_a_resumed_run_has_the_bits_of_one_that_went_through(
    group: Callable[..., Group], tmp_path: Path, task: type[Line]
) -> None:
    objects = DirectoryObjectStore(tmp_path)
    workers = group(3)
    through = [parameters(t) for t, _ in workers.run(lambda comm: train(comm, configure(**SETTINGS), None, task()))]
    interrupted(workers, objects, task)
    assert len([key for key in objects.list("run/checkpoints/") if "feedback-" in key]) >= 3
    resumed = workers.run(lambda comm: train(comm, configure(**SETTINGS), objects, task(), resume=True))
    assert [parameters(trainer) for trainer, _ in resumed] == through


def test_it_is_used_and_only_when_asked_for(group: Callable[..., Group], tmp_path: Path) -> None:
    objects = DirectoryObjectStore(tmp_path)
    workers = group(2)

    def run(comm: Communicator, **changes: Any) -> bytes:
        return parameters(train(comm, configure(**{**SETTINGS, **changes}), objects, Wide())[0])

    with_feedback, without = (set(workers.run(lambda c, on=on: run(c, error_feedback=on))) for on in (True, False))
    assert len(with_feedback) == len(without) == 1
    assert with_feedback != without
    steps = {key.split("/")[2] for key in objects.list("run/checkpoints/")}
    newest = [key for key in objects.list(f"run/checkpoints/{max(steps)}/") if "feedback-" in key]
    assert newest == [] or len(newest) == 2


@pytest.mark.parametrize("change", ["damaged", "missing", "other n", "other codec", "switched off"])
def test_where_it_cannot_be_used_the_run_goes_on_without(
    group: Callable[..., Group], tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    objects = DirectoryObjectStore(tmp_path)
    first = group(3)
    interrupted(first, objects, Wide)
    first.close()
    mine = sorted(key for key in objects.list("run/checkpoints/") if key.endswith("feedback-00001.safetensors"))[-1]
    if change == "damaged":
        objects.put(mine, objects.get(mine)[:-5])
    elif change == "missing":
        objects.delete(mine)
    changes = {"other codec": {"codec": "fp16"}, "switched off": {"error_feedback": False}}.get(change, {})
    workers = group(2) if change == "other n" else group(3)
    found = workers.run(lambda comm: train(comm, configure(**{**SETTINGS, **changes}), objects, Wide(), resume=True))
    assert len({parameters(trainer) for trainer, _ in found}) == 1
    assert found[0][0].step == 18
    warned = [record for record in caplog.records if "feedback begins anew" in record.message]
    assert len(warned) == (change in ("damaged", "missing"))


def test_trainers_that_go_on_under_other_ranks_take_over_what_those_had_cut_off(
    group: Callable[..., Group], tmp_path: Path
) -> None:
    """As warm sandboxes are invoked again: whose place one of them gets is Lambda's choice."""
    objects = DirectoryObjectStore(tmp_path)
    workers = group(3)
    through = [parameters(t) for t, _ in workers.run(lambda comm: train(comm, configure(**SETTINGS), None, Wide()))]
    paused = [t for t, _ in workers.run(lambda comm: train(comm, configure(**SETTINGS), objects, Wide(), stop_at=STOP_AT))]

    def go_on(comm: Communicator) -> bytes:
        trainer = paused[(comm.rank + 1) % 3]
        trainer.enlist(trainer.config, lambda row: "", lambda: None)
        trainer.attach(comm)
        assert trainer.run() == "done"
        return parameters(trainer)

    assert workers.run(go_on) == through
