"""`smlt train` with gradients that are sent while backward computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import keys_of, parameters, rows, smlt, status, steps

from smlt.store.embedded import EmbeddedStore

pytest.importorskip("torch")
from safetensors.numpy import load

TASK = '''
import os
import signal
from pathlib import Path

import torch
from torch import nn

import smlt


class Deep(smlt.Task):
    """Five layers of 4 kB each; 4 steps an epoch with a global batch of 16."""

    calls = 0

    def data(self):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
        return {"train": (x, x.sin().sum(1)), "test": (x, x.sin().sum(1))}

    def model(self):
        layers = [layer for _ in range(5) for layer in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(32, 1), nn.Flatten(0))
        model[3].weight.register_hook(self.in_backward)
        return model

    def in_backward(self, gradient):
        self.calls += 1

    def loss(self, model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def evaluate(self, model, batch):
        return {"mse": self.loss(model, batch).item()}


def one_worker(folder):
    """True in the first worker that asks."""
    try:
        os.close(os.open(Path(folder) / "taken", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
'''


def write(folder: Path, then: str = "") -> Path:
    """The task, which does `then` in its sixth backward."""
    script = folder / "deep.py"
    line = f"        if self.calls == 6 and one_worker({str(folder)!r}):\n            {then}\n" if then else ""
    script.write_text(TASK.replace("self.calls += 1\n", f"self.calls += 1\n{line}"))
    return script


#: Processes that import torch are what these tests take: two workers, few runs.
OPTIONS = ("-n", 2, "--epochs", 3, "--global-batch-size", 16, "--codec", "fp32")
SMALL = ("--bucket-mb", 0.004)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the job with a bucket for each layer."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = smlt("train", write(folder), *OPTIONS, *SMALL, "--name", "run", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "smlt-runs" / "run"


def test_the_size_of_buckets_changes_no_bit_of_the_result(undisturbed: Path, tmp_path: Path) -> None:
    script, found = write(tmp_path), []
    for bucket_mb in (0, 0.004, 4):
        run = tmp_path / "smlt-runs" / f"bucket-{bucket_mb}" if bucket_mb != 0.004 else undisturbed
        if run != undisturbed:
            done = smlt("train", script, *OPTIONS, "--bucket-mb", bucket_mb, "--name", run.name, cwd=tmp_path)
            assert (done.returncode, done.stderr) == (0, "")
        found.append((steps(run), parameters(run), status(run)["metrics"]))
        for row in (row for row in rows(run) if row["kind"] == "step"):
            pairs = list(zip(row["communication_s"], row["communication_total_s"], strict=True))
            assert all(0 < waited <= total for waited, total in pairs)
            # The first backward of a worker only watches.
            assert all((waited < total) == (bucket_mb == 0.004) for waited, total in pairs) or row["step"] == 1
    assert found[0] == found[1] == found[2]


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("then", "more", "code", "told"),
    [
        ('raise ValueError("b" + "oom")', (), 5, "failed at step 5: ValueError: boom"),
        (KILLED, ("--on-failure", "stop"), 4, "was killed by signal 9"),
    ],
)
def test_a_worker_that_fails_within_backward_ends_the_run(
    store: EmbeddedStore, tmp_path: Path, then: str, more: tuple[str, ...], code: int, told: str
) -> None:
    script = write(tmp_path, then)
    done = smlt("train", script, *OPTIONS, *SMALL, *more, "--store", store.url, "--name", "fails", cwd=tmp_path)
    assert done.returncode == code
    assert told in done.stderr
    assert done.stderr.count("Traceback") == (code == 5)
    assert keys_of(store.url, "fails") == []


def test_a_worker_that_is_killed_within_backward_is_replaced_without_a_trace_in_the_bits(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path
) -> None:
    options = (*OPTIONS, *SMALL, "--store", store.url, "--name", "killed")
    done = smlt("train", write(tmp_path, KILLED), *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    killed = tmp_path / "smlt-runs" / "killed"
    assert (status(undisturbed)["restarts"], status(killed)["restarts"]) == (0, 1)
    assert [number for number, _ in steps(killed)] == list(range(1, 13))
    assert steps(killed) == steps(undisturbed)
    assert trained(killed) == trained(undisturbed)
    assert keys_of(store.url, "killed") == []


def trained(run: Path) -> dict[str, bytes]:
    """The last checkpoint without the running means: those of the worker that died saw samples that nobody sees again."""
    tensors = load(parameters(run))
    return {name: array.tobytes() for name, array in tensors.items() if "running_" not in name}
