"""`smlt sweep`: trials go on from their checkpoints, failures and Ctrl-C lose nothing, and jobs on one store never meet."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from commandline import PACED, Running, all_gone, keys_of, parameters, same_end, smlt, status, steps, write_task
from typer.testing import CliRunner

from smlt.cli import app
from smlt.client.runs import Run
from smlt.client.sweep.processes import metric_of
from smlt.errors import ConfigError
from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore

#: The task of `commandline`, with hyper-parameters; at a learning rate of 7 it raises.
HYPERPARAMETERS = """
    lr = 0.005
    label = "none"
"""
EACH = ("--global-batch-size", 16, "--codec", "fp32", "--liveness", 30)


def write_tunable(folder: Path, before_step: str = "") -> Path:
    script = write_task(folder, before_step + "\n        assert self.lr != 7, 'no such rate'\n")
    text = script.read_text().replace("    calls = 0\n", f"    calls = 0\n{HYPERPARAMETERS}").replace("lr=0.005", "lr=self.lr")
    script.write_text(text)
    return script


def trials(sweep: Path) -> list[dict[str, Any]]:
    """trials.jsonl without what differs from run to run."""
    rows = [json.loads(line) for line in (sweep / "trials.jsonl").read_text().splitlines()]
    kept = ("number", "hyperparameters", "state", "rung", "values", "epochs")
    return [{name: row[name] for name in kept} for row in rows]


def test_the_best_go_on_from_their_checkpoints_and_ctrl_c_and_a_failed_trial_change_nothing(
    store: EmbeddedStore, tmp_path: Path
) -> None:
    script = write_tunable(tmp_path, f"{PACED}\n        assert (self.data_dir / 'one').read_text() == 'sample'\n")
    data = tmp_path / "files"
    data.mkdir()
    (data / "one").write_text("sample")
    options = ("--grid", "lr=0.005,7,0.001", "--metric", "loss", "--halving", 2, "--epochs", 4, "--min-epochs", 2)
    shared = (*options, *EACH, "--workers-total", 2, "--store", store.url, "--data", data)
    done = smlt("sweep", script, *shared, "--name", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "smlt-runs" / "whole"
    rows = trials(whole)
    assert [(row["state"], row["rung"], row["epochs"]) for row in rows] == [
        ("done", 1, 4),
        ("failed", 0, 0),
        ("dropped", 0, 2),
    ]
    assert "trial 1 (lr=7) failed: TaskError: worker" in done.stdout
    assert "AssertionError: no such rate" in done.stdout
    best = whole / "whole-000"
    assert f"smlt resume {best} --epochs 8" in done.stdout
    assert json.loads((whole / "sweep.json").read_text())["best"]["hyperparameters"] == {"lr": 0.005}
    assert [path.parent.name for path in whole.glob("*/data")] == ["whole"]  # once, not by every trial
    alone = smlt(
        "train",
        script,
        "--set",
        "lr=0.005",
        *EACH,
        "--data",
        data,
        "--workers",
        1,
        "--epochs",
        4,
        "--name",
        "alone",
        cwd=tmp_path,
    )
    assert alone.returncode == 0, alone.stderr
    same_end(best, tmp_path / "smlt-runs" / "alone")

    cut = tmp_path / "smlt-runs" / "cut"
    with Running("sweep", script, *shared, "--name", "cut", "--json", cwd=tmp_path, PACE="0.3") as sweep:
        sweep.wait_for(lambda event: event["event"] == "epoch" and event["trial"] == 0)  # in the middle of its rung
        processes = sweep.descendants()
        sweep.process.send_signal(signal.SIGINT)
        assert sweep.finish() == 130
        ended = sweep.events[-1]
    assert (ended["event"], ended["state"]) == ("ended", "stopped")
    assert ended["commands"]["resume"] == f"smlt sweep --resume {cut}"
    assert all_gone(processes)
    assert keys_of(store.url, "cut") == []
    assert status(cut / "cut-000")["state"] == "stopped"
    assert status(cut / "cut-000")["checkpoint_step"] >= 4
    again = smlt("sweep", "--resume", "cut", "--store", store.url, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert trials(cut) == rows
    for number in (0, 2):
        same_end(cut / f"cut-{number:03d}", whole / f"whole-{number:03d}")
    assert keys_of(store.url, "cut") == keys_of(store.url, "whole") == []


def test_a_sweep_that_is_killed_leaves_no_process_and_trials_at_checkpoints(tmp_path: Path) -> None:
    script = write_tunable(tmp_path, PACED)
    options = ("--grid", "lr=0.001,0.002", "--epochs", 200, *EACH, "--workers-total", 2, "--json")
    with Running("sweep", script, *options, "--name", "one", cwd=tmp_path, PACE="0.02") as sweep:
        sweep.wait_for(lambda event: event["event"] == "epoch" and event["epoch"] == 1)
        processes = sweep.descendants()  # with the embedded store, which outlives the sweep for as long as its trials need it
        sweep.process.kill()
        sweep.process.wait()
        assert all_gone(processes)
    found = [status(path) for path in sorted((tmp_path / "smlt-runs" / "one").glob("one-00*"))]
    assert [row["state"] for row in found] == ["stopped", "stopped"]
    assert any(row["checkpoint_step"] == row["step"] > 0 for row in found)


def test_what_would_fail_in_every_trial_ends_the_sweep_with_one_line(tmp_path: Path) -> None:
    script = write_tunable(tmp_path)
    for options, says in (
        (("--grid", "rate=1,2"), "has no hyper-parameter rate (it has calls, label, lr)"),
        (("--grid", "lr=1,2", "--metric", "recall"), "evaluate() has no recall (it gives accuracy)"),
    ):
        failed = smlt("sweep", script, *options, "--epochs", 1, *EACH, "--workers-total", 1, cwd=tmp_path)
        assert failed.returncode == 2
        assert says in failed.stderr
        assert failed.stderr.count("\n") == 1, failed.stderr
    for options, says in (
        (("--grid", "lr=1,2", "--no-such-option"), "--no-such-option"),
        (("--grid", "lr=1,2", "--name", "x", "--tune"), "--tune"),
        (("--grid", "lr=1,2", "--resume", "x"), "--resume"),
    ):
        refused = CliRunner().invoke(app, ["sweep", str(script), *options])
        assert says in f"{refused.exception} {refused.output}"
    assert list((tmp_path / "smlt-runs").glob("x*")) == []


def test_loss_is_the_training_loss_of_the_last_epoch_where_evaluate_gives_none(tmp_path: Path) -> None:
    run = Run(tmp_path, "run")
    run.path.mkdir()
    found = ((0, 9, 1), (1, 2, 3), (1, 6, 1))
    rows = [{"kind": "step", "epoch": epoch, "loss": loss, "samples": samples} for epoch, loss, samples in found]
    (run.path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"kind": "epoch", "metrics": {"accuracy": None}}])
    )
    assert metric_of(run, "loss") == 3.0
    assert str(metric_of(run, "accuracy")) == "nan"
    with pytest.raises(ConfigError, match="recall"):
        metric_of(run, "recall")


def test_two_jobs_of_one_task_on_one_store_never_meet_though_one_of_them_is_killed_and_swept(
    store: EmbeddedStore, tmp_path: Path
) -> None:
    script = write_tunable(tmp_path, PACED)
    job = (script, *EACH, "--workers", 2, "--epochs", 40, "--set", "lr=0.002", "--json")
    assert smlt("train", *job, "--name", "alone", cwd=tmp_path).returncode == 0
    where = ("--store", store.url)
    at_step_8 = lambda event: event["event"] == "step" and event["step"] == 8  # noqa: E731
    with (
        Running("train", *job, *where, "--name", "twin-a", cwd=tmp_path, PACE="0.1") as kept,
        Running("train", *job, *where, "--name", "twin-b", cwd=tmp_path, PACE="0.1") as killed,
    ):
        kept.wait_for(at_step_8)
        killed.wait_for(at_step_8)
        assert keys_of(store.url, "twin-a")
        workers = [process for _, process in killed.workers()]
        killed.process.kill()
        for process in workers:
            process.kill()
        killed.process.wait()
        with closing(ParameterStore(store.url, job=status(tmp_path / "smlt-runs" / "twin-b")["job"])) as keys:
            Coordination(keys).end_job()
            assert keys.sweep() > 0
        assert keys_of(store.url, "twin-b") == []
        assert keys_of(store.url, "twin-a")
        kept.let_go()
        assert kept.finish() == 0
    runs = tmp_path / "smlt-runs"
    assert steps(runs / "twin-a") == steps(runs / "alone")
    assert parameters(runs / "twin-a") == parameters(runs / "alone")
    assert status(runs / "twin-a")["restarts"] == 0
