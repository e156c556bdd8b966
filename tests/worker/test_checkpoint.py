"""Checkpoints: whole or not at all, checked, and the one before when the newest is broken."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3server import Bucket

from smlt.errors import CheckpointError, FencedError, StoreError
from smlt.store.object import DirectoryObjectStore
from smlt.worker import checkpoint
from smlt.worker.frameworks.torch import TorchAdapter
from smlt.worker.task import Task

pytest_plugins = ["s3fixtures"]


@pytest.fixture
def objects(tmp_path: Path) -> DirectoryObjectStore:
    return DirectoryObjectStore(tmp_path)


def ignore(bucket: Any) -> None:
    """Takes no bucket: one worker keeps its gradients."""


def save(objects: DirectoryObjectStore, step: int) -> None:
    checkpoint.save(objects, "c", step, {"w": np.full(3, step, np.float32), "s": np.array(step)}, {"step": step})


def test_what_is_saved_is_loaded(objects: DirectoryObjectStore) -> None:
    assert checkpoint.load_latest(objects, "c") is None
    save(objects, 7)
    tensors, state = checkpoint.load_latest(objects, "c") or ({}, {})
    np.testing.assert_array_equal(tensors["w"], np.full(3, 7, np.float32))
    assert tensors["s"].shape == ()
    assert state == {"step": 7}


def test_an_array_in_any_memory_order_comes_back_as_it_was(objects: DirectoryObjectStore) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {"fortran": np.asfortranarray(whole), "transposed": whole.T, "strided": whole[:, ::2], "one": np.array(3.0)}
    checkpoint.save(objects, "c", 1, tensors, {})
    loaded, _ = checkpoint.load_latest(objects, "c") or ({}, {})
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_only_the_last_three_are_kept(objects: DirectoryObjectStore, tmp_path: Path) -> None:
    for step in range(1, 6):
        save(objects, step)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["000000003", "000000004", "000000005"]


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_as_many_are_kept_as_are_asked_for(objects: DirectoryObjectStore, tmp_path: Path, kept: int) -> None:
    for step in range(1, 8):
        checkpoint.save(objects, "c", step, {"w": np.zeros(3, np.float32)}, {"step": step}, kept=kept)
        names = sorted(path.name for path in (tmp_path / "c").iterdir())
        assert names == [f"{number:09d}" for number in range(max(1, step - kept + 1), step + 1)]
    assert checkpoint.latest_step(objects, "c") == 7


def test_the_newest_that_is_whole_is_found_however_many_before_it_are_corrupt(
    objects: DirectoryObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(1, 6):
        checkpoint.save(objects, "c", step, {"w": np.zeros(3, np.float32)}, {"step": step}, kept=5)
    for step in (3, 4, 5):
        (tmp_path / "c" / f"{step:09d}" / "tensors.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        found = checkpoint.load_latest(objects, "c")
    assert found is not None
    assert found[1] == {"step": 2}
    for step in (3, 4, 5):
        assert f"c/{step:09d}/tensors.safetensors is corrupt" in caplog.text
    assert checkpoint.latest_step(objects, "c") == 5  # the newest that was written, whole or not


def test_who_may_no_longer_write_leaves_no_checkpoint_and_deletes_none(objects: DirectoryObjectStore) -> None:
    def refuse() -> None:
        raise FencedError("generation 2 has begun")

    for step in (1, 2, 3):
        save(objects, step)
    with pytest.raises(FencedError):
        checkpoint.save(objects, "c", 4, {"w": np.zeros(3, np.float32)}, {"step": 4}, kept=1, confirm=refuse)
    assert checkpoint.latest_step(objects, "c") == 3
    assert (checkpoint.load_latest(objects, "c") or ({}, {}))[1] == {"step": 3}
    assert len([key for key in objects.list("c/") if key.endswith("MANIFEST.json")]) == 3


def test_a_snapshot_is_taken_over_once_and_deleted_without_a_trace(objects: DirectoryObjectStore) -> None:
    save(objects, 1)
    before = objects.list("")
    checkpoint.put(objects, "snapshots/000000002", {"w": np.arange(3, dtype=np.float32)}, {"step": 9})
    tensors, state = checkpoint.load(objects, "snapshots/000000002")
    np.testing.assert_array_equal(tensors["w"], [0, 1, 2])
    assert state == {"step": 9}
    assert (checkpoint.load_latest(objects, "c") or ({}, {}))[1] == {"step": 1}  # a snapshot is no checkpoint
    checkpoint.delete(objects, "snapshots/000000002")
    assert objects.list("") == before
    checkpoint.delete(objects, "snapshots/000000002")  # a donor that did not hear of its success
    with pytest.raises(CheckpointError, match=r"snapshots/000000002/MANIFEST\.json is missing"):
        checkpoint.load(objects, "snapshots/000000002")


def test_what_is_half_deleted_is_no_checkpoint(objects: DirectoryObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(objects, 1)
    save(objects, 2)
    deleted, really = list[str](), DirectoryObjectStore.delete

    def one_only(self: DirectoryObjectStore, *keys: str) -> None:
        for key in sorted(keys, reverse=True):  # in whatever order
            if deleted:
                raise StoreError("it has died here")
            deleted.append(key)
            really(self, key)

    monkeypatch.setattr(DirectoryObjectStore, "delete", one_only)
    with pytest.raises(StoreError):
        checkpoint.delete(objects, "c/000000002")
    assert (checkpoint.load_latest(objects, "c") or ({}, {}))[1] == {"step": 1}


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_used(
    objects: DirectoryObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    save(objects, 1)
    save(objects, 2)
    path = tmp_path / "c" / "000000002" / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + b"\0" if how == "changed" else content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        found = checkpoint.load_latest(objects, "c")
    assert found is not None
    assert found[1] == {"step": 1}
    assert f"c/000000002/{name}" in caplog.text
    with pytest.raises(CheckpointError, match=f"c/000000002/{name}"):
        checkpoint.load(objects, "c/000000002")


def test_one_without_a_manifest_was_never_finished(objects: DirectoryObjectStore, tmp_path: Path) -> None:
    save(objects, 1)
    save(objects, 2)
    (tmp_path / "c" / "000000002" / "MANIFEST.json").unlink()
    found = checkpoint.load_latest(objects, "c")
    assert found is not None
    assert found[1] == {"step": 1}


def test_what_was_never_finished_is_deleted_when_a_later_one_is_complete(objects: DirectoryObjectStore) -> None:
    save(objects, 2)
    objects.put("c/000000003/tensors.safetensors", b"its worker was killed")
    objects.put("c/000000004-w9/state.json", b"this one, alone, too")
    objects.put("c/000000005/feedback-00001.safetensors", b"under way")
    objects.put("c/000000005-w8/state.json", b"under way")
    save(objects, 4)
    folders = {key.split("/")[1] for key in objects.list("c/")}
    assert folders == {"000000002", "000000004", "000000004-w9", "000000005", "000000005-w8"}
    save(objects, 5)
    assert {key.split("/")[1] for key in objects.list("c/")} == {"000000002", "000000004", "000000005", "000000005-w8"}


def test_a_checkpoint_in_s3_is_whole_or_none_and_is_deleted_in_two_requests(bucket: Bucket) -> None:
    objects = bucket.store()
    large = {"w": np.random.default_rng(0).normal(size=(5, 20_000))}  # of several parts
    for step in range(1, 5):
        objects.requests.clear()
        checkpoint.save(objects, "c", step, large, {"step": step})
    assert objects.requests["list"] == 1
    assert objects.requests["delete"] == 2  # the manifest, then all else
    assert {key.split("/")[1] for key in objects.list("c/")} == {"000000002", "000000003", "000000004"}
    objects.delete("c/000000004/MANIFEST.json")
    tensors, state = checkpoint.load_latest(objects, "c") or ({}, {})
    assert state == {"step": 3}
    np.testing.assert_array_equal(tensors["w"], large["w"])
    assert objects.unfinished("") == []


def test_none_that_is_whole_is_an_error(objects: DirectoryObjectStore, tmp_path: Path) -> None:
    save(objects, 1)
    (tmp_path / "c" / "000000001" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint below c can be used.*state\.json is corrupt"):
        checkpoint.load_latest(objects, "c")


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "tensor lr"])
def test_a_torch_model_and_optimizer_go_on_exactly(objects: DirectoryObjectStore, optimizer: str) -> None:
    import torch
    from torch import nn

    class Small(Task):
        def optimizer(self, model: Any) -> Any:
            if optimizer == "tensor lr":
                return torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
            options: dict[str, Any] = {"momentum": 0.9} if optimizer == "SGD" else {}
            return getattr(torch.optim, optimizer)(model.parameters(), lr=0.01, **options)

        def loss(self, model: Any, batch: Any) -> Any:
            return model(batch).pow(2).mean()

    def make() -> TorchAdapter:
        return TorchAdapter(Small(), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).to(torch.float32)))

    torch.manual_seed(0)
    one, two, x = make(), make(), torch.randn(16, 3)
    for _ in range(3):
        one.compute(x, 1.0, ignore)
        one.apply()
    for group in one.optimizer.param_groups:
        group["lr"] *= 0.5  # as a schedule would
    tensors, rest = one.state()
    checkpoint.save(objects, "t", 3, tensors, rest)
    loaded = checkpoint.load_latest(objects, "t")
    assert loaded is not None
    two.load_state(*loaded)
    for adapter in (one, two):
        adapter.compute(x, 1.0, ignore)
        adapter.apply()
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_who_may_no_longer_write_does_not_spoil_the_checkpoint_of_another(objects: DirectoryObjectStore) -> None:
    def fenced() -> None:
        raise FencedError("generation 2 has begun")

    save(objects, 7)
    with pytest.raises(FencedError):
        checkpoint.save(objects, "c", 7, {"w": np.zeros(3, np.float32)}, {"step": 7, "mine": True}, confirm=fenced)
    assert checkpoint.load(objects, "c/000000007")[1] == {"step": 7}


def test_several_may_save_alone_at_one_moment(objects: DirectoryObjectStore) -> None:
    tensors = {"w": np.zeros(3, np.float32)}
    calls: list[str] = []

    def another_comes() -> None:
        calls.append("confirmed")
        if len(calls) == 2:  # between the files of the first and its manifest
            checkpoint.save(objects, "c", 7, tensors, {"step": 7, "rank": 1}, alone="w1")

    checkpoint.save(objects, "c", 7, tensors, {"step": 7, "rank": 0}, confirm=another_comes, alone="w0")
    assert len(calls) == 2
    assert checkpoint.latest_step(objects, "c") == 7
    assert [checkpoint.load(objects, f"c/000000007-w{rank}")[1]["rank"] for rank in (0, 1)] == [0, 1]
