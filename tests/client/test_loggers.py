"""`--log tensorboard`, `--log mlflow`: what those who read them find there; a logger that fails, and the run that goes on."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from commandline import HOLD, Running, keys_of, rows, smlt, status, write_task

from smlt.client.loggers import check_log, scalars
from smlt.client.loggers.guarded import Guarded, InBackground
from smlt.client.runs import Run
from smlt.client.watching import Unwatched
from smlt.errors import ConfigError
from smlt.store.embedded import EmbeddedStore

JOB = ("--workers", 2, "--epochs", 10, "--global-batch-size", 16, "--codec", "fp32", "--json", "--name", "run")
LAST_STEP = 40
STEPS = list(range(1, LAST_STEP + 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "smlt-runs" / "run"


def trained(cwd: Path, *more: object, **variables: str) -> list[dict[str, Any]]:
    """The job to its end; its events."""
    done = smlt("train", write_task(cwd), *JOB, *more, cwd=cwd, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def stopped_and_resumed(cwd: Path, *more: object) -> None:
    """The job, ended without a checkpoint behind its step 29, and gone on with from its last epoch's end."""
    with Running("train", write_task(cwd, HOLD), *JOB, *more, cwd=cwd, HOLD=str(cwd)) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == 29)
        assert smlt("stop", "run", "--now", cwd=cwd).returncode == 0
        run.finish()
    (cwd / "go").touch()
    elsewhere = cwd / "elsewhere"
    elsewhere.mkdir()
    done = smlt("resume", cwd / "smlt-runs" / "run", "--json", cwd=elsewhere)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(elsewhere.iterdir()) == []


def warnings(events: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in events if event["event"] == "warning"]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if row["kind"] == "step"]


# ---- TensorBoard ----


def tensorboard_scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as TensorBoard itself reads a folder."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(path), size_guidance={accumulators.SCALARS: 0}).Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_has_every_steps_loss_and_every_epochs_metrics(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("tensorboard")
    events = trained(tmp_path, "--log", "tensorboard")
    assert warnings(events) == []
    found = tensorboard_scalars(folder / "tensorboard")
    assert [step for step, _ in found["loss"]] == STEPS
    assert [value for _, value in found["loss"]] == pytest.approx(losses(folder), rel=1e-6)
    assert [step for step, _ in found["metrics/accuracy"]] == STEPS[3::4]
    accuracies = [row["metrics"]["accuracy"] for row in rows(folder) if row["kind"] == "epoch"]
    assert [value for _, value in found["metrics/accuracy"]] == pytest.approx(accuracies, rel=1e-6)
    assert {value for _, value in found["workers"]} == {2.0}
    for name in ("samples_per_s", "seconds/compute", "seconds/communication_exposed", "seconds/data", "memory_mb"):
        assert len(found[name]) == LAST_STEP


def test_tensorboard_shows_a_resumed_run_as_one_curve_wherever_it_was_resumed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    stopped_and_resumed(tmp_path, "--log", "tensorboard=logs")
    assert len(list((tmp_path / "logs" / "run").iterdir())) == 2
    found = tensorboard_scalars(tmp_path / "logs" / "run")
    assert [step for step, _ in found["loss"]] == STEPS
    assert [value for _, value in found["loss"]] == pytest.approx(losses(tmp_path / "smlt-runs" / "run"), rel=1e-6)


def test_tensorboard_has_the_steps_of_a_run_that_is_under_way(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("tensorboard")
    with Running("train", write_task(tmp_path, HOLD), *JOB, "--log", "tensorboard", cwd=tmp_path, HOLD=str(tmp_path)) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == 29)
        deadline = time.monotonic() + 20
        while len(tensorboard_scalars(folder / "tensorboard").get("loss", ())) < 29:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (tmp_path / "go").touch()
        assert run.finish() == 0


# ---- MLflow ----


def mlflow_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """A client of MLflow's, and the runs of the experiment "smlt" in a folder."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=path.as_uri())
    return client, list(client.search_runs([client.get_experiment_by_name("smlt").experiment_id]))


def test_mlflow_has_parameters_metrics_and_how_it_ended(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    assert warnings(trained(tmp_path, "--log", "mlflow")) == []
    client, (run,) = mlflow_runs(tmp_path / "mlruns", monkeypatch)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.tags["smlt.folder"] == str(folder)
    assert (run.data.params["workers"], run.data.params["codec"]) == ("2", "fp32")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == list(zip(STEPS, losses(folder), strict=True))
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "metrics/accuracy")] == STEPS[3::4]


def test_mlflow_goes_on_in_the_run_that_a_resumed_one_has_had(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    stopped_and_resumed(tmp_path, "--log", "mlflow=mlruns")
    client, (run,) = mlflow_runs(tmp_path / "mlruns", monkeypatch)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {metric.step for metric in history} == set(STEPS)
    assert run.data.metrics["loss"] == losses(folder)[-1]


def test_mlflow_says_failed_of_a_run_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    script = write_task(tmp_path, "\n        if number == 9:\n            raise ValueError('damaged')\n")
    assert smlt("train", script, *JOB, "--log", "mlflow", cwd=tmp_path).returncode != 0
    _, (run,) = mlflow_runs(tmp_path / "mlruns", monkeypatch)
    assert run.info.status == "FAILED"


@pytest.fixture
def refusing() -> Iterator[tuple[str, list[str]]]:
    """A server that refuses every request: its URL, and the paths that were asked for."""
    asked: list[str] = []

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(403, "not you")

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_tracking_server_that_refuses_is_told_of_once_and_the_run_goes_on(
    tmp_path: Path, folder: Path, refusing: tuple[str, list[str]]
) -> None:
    pytest.importorskip("mlflow")
    url, asked = refusing
    events = trained(tmp_path, "--log", "mlflow", MLFLOW_TRACKING_URI=url)
    (text,) = warnings(events)
    assert text.startswith("--log mlflow: ")
    assert text.endswith("nothing more is logged there, the run goes on")
    assert "403" in text
    assert len(asked) == 1
    assert status(folder)["step"] == LAST_STEP
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [row["text"] for row in told if row["event"] == "warning"] == [text]


# ---- what fails ----


def test_a_logger_that_cannot_write_is_told_of_once_and_another_goes_on(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "full").write_text("no folder")
    events = trained(tmp_path, "--log", "tensorboard=full", "--log", "tensorboard")
    (text,) = warnings(events)
    assert text.startswith(f"--log tensorboard={tmp_path / 'full'}: ")
    assert len(tensorboard_scalars(folder / "tensorboard")["loss"]) == LAST_STEP
    assert status(folder)["state"] == "done"


@pytest.mark.parametrize(
    ("log", "text"),
    [
        (["wandb"], "give tensorboard[=DIR], mlflow[=URI] or none"),
        (["tensorboard="], "give tensorboard[=DIR]"),
        (["none", "mlflow"], "give tensorboard[=DIR]"),
        (["tensorboard=a", "tensorboard=./a"], "given twice"),
        (["mlflow=https://me:secret@host/"], "MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_what_cannot_be_logged_to_is_an_error_before_anything_is_made(log: list[str], text: str, tmp_path: Path) -> None:
    done = smlt("train", write_task(tmp_path), *JOB, *(part for one in log for part in ("--log", one)), cwd=tmp_path)
    assert done.returncode == ConfigError.exit_code
    assert text in done.stderr
    assert "secret" not in done.stderr
    assert not (tmp_path / "smlt-runs").exists()


def test_a_password_in_the_environments_uri_is_refused_too(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    uri = {"MLFLOW_TRACKING_URI": "http://me:secret@127.0.0.1:9"}
    done = smlt("train", write_task(tmp_path), *JOB, "--log", "mlflow", cwd=tmp_path, **uri)
    assert done.returncode == ConfigError.exit_code
    assert "MLFLOW_TRACKING_PASSWORD" in done.stderr
    assert "secret" not in done.stderr
    assert not (tmp_path / "smlt-runs").exists()


def test_a_resumed_run_logs_no_more_where_it_is_told_none(tmp_path: Path, folder: Path, store: EmbeddedStore) -> None:
    pytest.importorskip("tensorboard")
    trained(tmp_path, "--log", "tensorboard")
    done = smlt("train", "--resume", "run", "--epochs", 12, "--log", "none", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert json.loads((folder / "config.json").read_text())["log"] == []
    assert keys_of(store.url, "run") == []


def test_folders_are_absolute_and_urls_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["tensorboard", "tensorboard=tb", "mlflow=ml", "mlflow=http://host:5000", "mlflow=file:ml"]
    expected = (given[0], f"tensorboard={tmp_path}/tb", f"mlflow={tmp_path}/ml", *given[3:])
    assert check_log(given) == expected == check_log(expected)
    assert check_log(["none"]) == ()


class Slow(Unwatched):
    """Writes down what it is told, once it is let; fails at the step `fails_at`."""

    def __init__(self, fails_at: int = 0) -> None:
        self.told: list[int] = []
        self.let, self.fails_at = threading.Event(), fails_at

    def step(self, row: dict[str, Any]) -> None:
        self.let.wait(20)
        if row["step"] == self.fails_at:
            raise OSError("disk full\nand more")
        self.told.append(row["step"])


def test_a_slow_logger_keeps_nobody_waiting_and_is_told_all_in_order(tmp_path: Path) -> None:
    slow = Slow()
    logger = InBackground(slow, "slow")
    for step in STEPS:
        logger.step({"step": step})
    assert slow.told == []
    slow.let.set()
    logger.ended(Run(tmp_path, "run"), {"state": "done"})
    assert slow.told == STEPS
    assert logger.complaints() == []


@pytest.mark.parametrize("kind", [Guarded, InBackground])
def test_a_failure_is_one_complaint_in_one_line_and_nothing_more_is_told(kind: type[Guarded], tmp_path: Path) -> None:
    slow = Slow(fails_at=3)
    slow.let.set()
    logger = kind(slow, "--log it")
    for step in STEPS:
        logger.step({"step": step})
    logger.ended(Run(tmp_path, "run"), {"state": "done"})
    assert slow.told == [1, 2]
    assert logger.complaints() == ["--log it: disk full; nothing more is logged there, the run goes on"]
    assert logger.complaints() == []


def test_what_is_not_finite_stays_and_what_is_no_number_is_left_out() -> None:
    row = {"loss": math.nan, "samples_per_s": 1, "ranks": [0, 1], "compute_s": [1.0, 2.0], "rss_mb": [], "lr_factor": None}
    found = scalars.of_step(row)
    assert math.isnan(found.pop("loss"))
    assert found == {"samples_per_s": 1.0, "workers": 2.0, "seconds/compute": 2.0}
