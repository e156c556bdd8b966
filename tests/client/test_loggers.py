"""`--log tensorboard`, `--log mlflow`: what is logged is read back with their own readers; a logger that fails ends no run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from commandline import rows, smlt, steps, write_task

from smlt.client.loggers import check_log
from smlt.client.loggers.guarded import Guarded, InBackground
from smlt.client.watching import Unwatched
from smlt.errors import ConfigError


def trained(folder: Path, *log: str, epochs: int = 3, **more: str) -> Path:
    options = [part for one in log for part in ("--log", one)]
    done = smlt("train", write_task(folder), "--workers", 2, "--epochs", epochs, "--name", "tiny", *options, cwd=folder, **more)
    assert done.returncode == 0, done.stderr
    return folder / "smlt-runs/tiny"


def read_back(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return read


def test_tensorboard_reads_every_step_and_epoch_that_the_run_has_written_down(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = trained(tmp_path, "tensorboard")
    read = read_back(run / "tensorboard")
    assert [(one.step, pytest.approx(one.value, rel=1e-6)) for one in read.Scalars("loss")] == steps(run)
    epochs = [row for row in rows(run) if row["kind"] == "epoch"]
    assert [(one.step, pytest.approx(one.value)) for one in read.Scalars("metrics/accuracy")] == [
        (row["step"], row["metrics"]["accuracy"]) for row in epochs
    ]
    assert {"samples_per_s", "workers", "seconds/compute", "seconds/communication_exposed", "memory_mb"} <= set(
        read.Tags()["scalars"]
    )
    times = [row["time"] for row in rows(run) if row["kind"] == "step"]
    assert [one.wall_time for one in read.Scalars("loss")] == pytest.approx(times)


def test_a_resumed_run_goes_on_in_the_same_folder_and_no_step_is_there_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = trained(tmp_path, "tensorboard=boards")
    done = smlt("resume", "tiny", "--epochs", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [one.step for one in read_back(tmp_path / "boards/tiny").Scalars("loss")] == [step for step, _ in steps(run)]


def test_mlflow_has_the_runs_parameters_its_curves_and_how_it_ended(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    run = trained(tmp_path, f"mlflow={tmp_path / 'flow'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = mlflow.MlflowClient(tracking_uri=(tmp_path / "flow").as_uri())
        experiment = client.get_experiment_by_name("smlt")
        (found,) = client.search_runs([experiment.experiment_id])
        assert (found.info.run_name, found.info.status) == ("tiny", "FINISHED")
        assert (found.data.params["workers"], found.data.params["epochs"]) == ("2", "3")
        history = sorted((one.step, one.value) for one in client.get_metric_history(found.info.run_id, "loss"))
        assert history == [(step, pytest.approx(loss)) for step, loss in steps(run)]
        assert found.data.tags["smlt.folder"].endswith("smlt-runs/tiny")


def test_a_logger_that_fails_warns_once_and_the_run_goes_on_to_its_end(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "taken").write_text("a file where the logger wants a folder")
    done = smlt(
        "train",
        write_task(tmp_path),
        "--global-batch-size",
        16,
        "--epochs",
        3,
        "--name",
        "tiny",
        "--log",
        "tensorboard=taken",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert (done.stdout + done.stderr).count("nothing more is logged there, the run goes on") == 1
    assert len(steps(tmp_path / "smlt-runs/tiny")) == 12


class Breaks(Unwatched):
    """Fails at its second step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise OSError("no space left on device")
        self.steps.append(row["step"])


@pytest.mark.parametrize("kind", [Guarded, InBackground])
def test_nothing_more_is_told_to_a_listener_that_has_failed(kind: type[Guarded]) -> None:
    inner = Breaks()
    guarded = kind(inner, "--log it")
    for step in range(1, 6):
        guarded.step({"step": step})
    guarded.ended(None, {"state": "done"})  # type: ignore[arg-type]  # it does not look at the run
    assert inner.steps == [1]
    assert guarded.complaints() == ["--log it: no space left on device; nothing more is logged there, the run goes on"]
    assert guarded.complaints() == []


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_without_the_package_the_command_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from smlt.client.loggers.mlflow import MlflowLogger
    from smlt.client.loggers.tensorboard import TensorBoardLogger

    for module in [one for one in sys.modules if one.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install 'smlt\[{name}\]'"):
        {"tensorboard": TensorBoardLogger, "mlflow": MlflowLogger}[name](None)


@pytest.mark.parametrize("value", ["wandb", "tensorboard=", "mlflow=http://me:secret@host:5000", ""])
def test_a_logger_that_is_not_known_or_would_write_a_password_down_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="--log"):
        check_log([value])
    assert check_log(["none"]) == ()
