"""Functions change in number and in memory while a run goes on, and a budget ends it. AWS is `smlt.emulator`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import pytest
from commandline import rows, smlt, status, write_task
from functions import FUNCTION, Cloud, cloud, on_lambda
from steered import EPOCHS, Recorder, Scripted, nearly_same_end, steering

from smlt.client.invocations import read_invocations
from smlt.client.lambda_runs import place
from smlt.client.optimizer.space import Choice
from smlt.client.request import RunRequest
from smlt.client.runs import Run
from smlt.client.scheduler import TaskScheduler

#: A step takes so long: for a test to have time to disturb it. With the file "slowly" beside the script there is more of it.
SLOW = "\n        time.sleep(0.5 if Path({folder!r}, 'slowly').exists() else 0.12)\n"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    return write_task(folder, SLOW.format(folder=str(folder)))


@pytest.fixture(scope="module")
def deployed(script: Path) -> Iterator[Cloud]:
    with cloud(script, "--memory", 1769) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same job by two local workers throughout."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = ("--workers", 2, "--epochs", EPOCHS, "--global-batch-size", 16, "--codec", "fp32", "--name", "run")
    assert smlt("train", script, *job, cwd=folder).returncode == 0
    return folder / "smlt-runs" / "run"


def test_functions_get_another_memory_and_more_of_them_take_part(
    deployed: Cloud, script: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in deployed.environment.items():
        monkeypatch.setenv(name, value)
    asked = RunRequest(
        str(script), workers=2, epochs=EPOCHS, global_batch_size=16, codec="fp32", tune=True, on="lambda", function=FUNCTION
    )
    request, _ = place(asked, None)
    run = Run.create(tmp_path / "runs", script, asdict(request), "run")
    controller = Scripted(("switch", Choice(3, 3008)), ("switch", Choice(4, 3008)), ("switch", Choice(2, 1769)))
    slowly = script.with_name("slowly")
    slowly.touch()
    controller.last_decided = lambda: slowly.unlink(missing_ok=True)
    wheel = steering(run, controller, Choice(2, 1769), on_lambda=True)
    made = TaskScheduler(run, request, Recorder(), steering=wheel)
    assert made.run()["state"] == "done"
    nearly_same_end(run.path, undisturbed)
    # Where a memory is slow to be had, a round goes by as it is.
    assert [choice for choice, _ in groupby(one.choice for one in controller.observed)] == [
        Choice(2, 1769),
        Choice(3, 3008),
        Choice(4, 3008),
        Choice(2, 1769),
    ]
    workers = [row for row in read_invocations(run.path) if row.outcome != "probe"]
    assert Counter(row.memory_mb for row in workers) == {1769: 4, 3008: 4}
    assert (run.config["workers"], run.config["memory_mb"]) == (2, 1769)
    changes = [row["reasons"] for row in rows(run.path) if row["kind"] == "membership"]
    assert changes == [
        ["3 x 3008 MB instead of 2 x 1769 MB"],
        ["4 workers instead of 3"],
        ["2 x 1769 MB instead of 4 x 3008 MB"],
    ]


def test_a_run_chooses_its_functions_keeps_its_deadline_and_says_what_it_expects(
    deployed: Cloud, script: Path, tmp_path: Path
) -> None:
    job = ("--epochs", EPOCHS, "--global-batch-size", 16, "--name", "deadline", "--json")
    done = deployed.train(script, *job, "--deadline", "3m", "--max-workers", 4, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    started = next(event for event in events if event["event"] == "started")
    assert 1 <= started["config"]["workers"] <= 4
    assert 128 <= started["config"]["memory_mb"] <= 10_240
    assert events[-1]["state"] == "done"


def test_a_budget_that_cannot_be_kept_stops_the_run_with_a_checkpoint(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    goal = ("--budget", "0.0005", "--on-miss", "stop", "--store-node", "c6gn.xlarge")
    run = ("--epochs", 400, "--global-batch-size", 16, "--max-workers", 2, "--name", "budget")
    done = deployed.train(script, *run, *goal, cwd=tmp_path)
    assert done.returncode == 8
    assert "budget" in done.stderr
    found = status(tmp_path / "smlt-runs" / "budget")
    assert found["state"] == "stopped"
    assert found["checkpoint_step"] == found["step"] > 0
    assert found["spent_usd"] < 0.001


def test_a_sweep_trains_its_trials_by_functions_and_counts_what_they_cost(
    deployed: Cloud, script: Path, tmp_path: Path
) -> None:
    what = ("--grid", "seed=1,2", "--metric", "loss", "--epochs", 1, "--global-batch-size", 16, "--name", "swept")
    limits = ("--workers-total", 2, "--budget", "1")
    done = smlt("sweep", script, *what, *limits, *on_lambda(), cwd=tmp_path, **deployed.environment)
    assert (done.returncode, done.stderr) == (0, "")
    sweep = tmp_path / "smlt-runs" / "swept"
    trials = [json.loads(line) for line in (sweep / "trials.jsonl").read_text().splitlines()]
    assert [trial["state"] for trial in trials] == ["done", "done"]
    assert [trial["usd"] for trial in trials] == [status(sweep / f"swept-00{number}")["cost_usd"] for number in (0, 1)]
    assert json.loads((sweep / "sweep.json").read_text())["spent_usd"] == sum(trial["usd"] for trial in trials) > 0
