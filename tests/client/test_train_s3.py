"""`smlt train` with its code, data and checkpoints in S3 (moto), beside the same run with a directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commandline import rows, smlt, status, steps
from s3server import Bucket

from smlt.worker.stamped import split_stamp

pytest_plugins = ["s3fixtures"]

TASK = """
import os

import numpy as np

import smlt
from smlt.worker import files
from smlt.worker.frameworks.numpy import SGD

if os.environ.get("TIGHT"):
    files.room = lambda folder: 1000


class Line(smlt.Task):
    def data(self):
        print("data is", type(self.data_files).__name__, flush=True)
        train = smlt.open_shards(self.data_files, "train/*.npz", columns=("x", "y"))
        test = smlt.open_shards(self.data_files, "test.safetensors", columns=("x", "y"))
        return {"train": train, "test": test}

    def model(self):
        return {"w": np.zeros(20, "f4")}

    def loss(self, model, batch):
        x, y = batch
        error = x @ model["w"] - y
        return float((error**2).mean()), {"w": 2 * x.T @ error / len(y)}

    def optimizer(self, model):
        return SGD(model, lr=0.01, momentum=0.5)

    def evaluate(self, model, batch):
        x, y = batch
        return {"accuracy": float((np.abs(x @ model["w"] - y) < 0.3).mean())}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import safetensors.numpy

    (tmp_path / "line.py").write_text(TASK)
    (tmp_path / "data/train").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for number in range(4):
        x = rng.normal(size=(60, 20)).astype("f4")
        np.savez(tmp_path / f"data/train/{number}.npz", x=x, y=x @ np.arange(20, dtype="f4"))
    safetensors.numpy.save_file({"x": x, "y": x @ np.arange(20, dtype="f4")}, tmp_path / "data/test.safetensors")
    return tmp_path


OPTIONS = ("-n", "2", "--global-batch-size", "32", "--data", "data", "--runs-dir", "runs")


def seen_by_workers(run: Path) -> set[str]:
    text = "".join(path.read_text() for path in run.rglob("*.log"))
    lines = [split_stamp(line)[1] for line in text.splitlines()]
    return {line.removeprefix("data is ") for line in lines if line.startswith("data is ")}


def test_a_run_in_s3_is_as_in_a_directory_whether_it_fetches_or_streams(folder: Path, bucket: Bucket) -> None:
    def run(*arguments: str, **environment: str) -> None:
        done = smlt(*arguments, cwd=folder, **environment)
        assert done.returncode == 0, done.stderr

    run("train", "line.py", *OPTIONS, "--epochs", "4", "--name", "plain")
    run("train", "line.py", *OPTIONS, "--epochs", "2", "--name", "far", "--object-store", bucket.url)
    objects, plain, far = bucket.store(), folder / "runs/plain", folder / "runs/far"
    assert seen_by_workers(far) == {"LocalFiles"}
    (folder / "line.py").unlink()  # to go on, its copy in the bucket will do
    objects.delete("far/data/MANIFEST.json", "far/data/train/2.npz")  # as an interrupted upload leaves it
    run("resume", "far", "--epochs", "4", "--runs-dir", "runs", TIGHT="1")
    assert seen_by_workers(far) == {"LocalFiles", "StreamedFiles"}

    assert status(far)["state"] == "done"
    assert len(steps(far)) == 4 * 8
    assert steps(far) == steps(plain)
    metrics = [[row["metrics"] for row in rows(one) if row["kind"] == "epoch"] for one in (far, plain)]
    assert metrics[0] == metrics[1]
    newest = max(key for key in objects.list("far/checkpoints/") if key.endswith("tensors.safetensors"))
    assert objects.get(newest) == (plain / newest.removeprefix("far/")).read_bytes()
    assert objects.get("far/data/train/2.npz") == (folder / "data/train/2.npz").read_bytes()
    assert objects.list("far/snapshots/") == []
    assert not [path for path in (far / "code", far / "data", far / "checkpoints") if path.exists()]
    assert steps(plain)[-1][1] < steps(plain)[0][1]


def test_a_bucket_that_is_not_there_ends_it_before_anything_is_made(folder: Path, bucket: Bucket) -> None:
    done = smlt(
        "train", "line.py", "--object-store", "s3://no-such-bucket-at-all/x", "--data", "data", "--runs-dir", "runs", cwd=folder
    )
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "there is no such bucket" in done.stderr
    assert not (folder / "runs").exists()
