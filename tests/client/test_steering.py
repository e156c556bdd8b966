"""A run changes workers and memory while it trains, with real worker processes and decisions that the test has written down."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from commandline import PACED, keys_of, rows, same_end, smlt, status, write_task
from steered import EPOCHS, Recorder, Scripted, decisions_of, nearly_same_end, steering

from smlt.client.executors.local import LocalExecutor, LocalWorker
from smlt.client.optimizer.observations import read_observations
from smlt.client.optimizer.space import Choice
from smlt.client.request import RunRequest
from smlt.client.runs import Run
from smlt.client.scheduler import TaskScheduler
from smlt.errors import DeployError, GoalMissed
from smlt.store.embedded import EmbeddedStore
from smlt.worker.config import WorkerConfig


class Noting(LocalExecutor):
    """Notes with which memory workers are started; 666 MB cannot be had, nor, where so wanted, more workers."""

    def __init__(self, *, none_beside: bool = False) -> None:
        super().__init__()
        self.memory_mb, self.started, self.none_beside = 1000, list[int](), none_beside

    def start(self, config: WorkerConfig, log_path: Path) -> LocalWorker:
        self.started.append(self.memory_mb)
        return self.start_in(config, log_path, ["false"] if config.spare and self.none_beside else ())

    def make_ready(self, memory_mb: int) -> bool:
        if memory_mb == 666:
            raise DeployError("no such memory")
        return True

    def use(self, memory_mb: int) -> None:
        self.memory_mb = memory_mb


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same job with two workers throughout."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = ("--workers", 2, "--epochs", EPOCHS, "--global-batch-size", 16, "--codec", "fp32", "--name", "run")
    assert smlt("train", write_task(folder), *job, cwd=folder).returncode == 0
    return folder / "smlt-runs" / "run"


@pytest.fixture
def made(store: EmbeddedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a run under a scripted controller: the scheduler, its controller."""
    monkeypatch.setenv("PACE", "0.05")

    def make(*decisions: tuple[str, Choice], **more: Any) -> tuple[TaskScheduler, Scripted]:
        script = write_task(tmp_path, PACED)
        request = RunRequest(
            str(script), workers=2, epochs=EPOCHS, global_batch_size=16, codec="fp32", on_miss="best-effort", tune=True, **more
        )
        run = Run.create(tmp_path / "runs", script, asdict(request), "run")
        controller = Scripted(*decisions)
        scheduler = TaskScheduler(
            run,
            request,
            Recorder(),
            store_url=store.url,
            executor=Noting(),
            steering=steering(run, controller, Choice(2, 1000)),
        )
        return scheduler, controller

    return make


def test_workers_come_and_go_at_the_end_of_rounds_and_each_round_is_observed_under_its_choice(
    made: Any, store: EmbeddedStore, undisturbed: Path
) -> None:
    scheduler, controller = made(("switch", Choice(3, 1000)), ("switch", Choice(1, 1000)), ("keep", Choice(1, 1000)))
    assert scheduler.run()["state"] == "done"
    folder = scheduler.folder.path
    nearly_same_end(folder, undisturbed)
    choices = [observation.choice for observation in controller.observed]
    assert choices[:3] == [Choice(2, 1000), Choice(3, 1000), Choice(1, 1000)]
    assert set(choices[3:]) == {Choice(1, 1000)}
    assert read_observations(folder) == controller.observed
    assert [row["action"] for row in decisions_of(scheduler.folder)][:3] == ["switch", "switch", "keep"]
    worlds = [row["world_size"] for row in rows(folder) if row["kind"] == "membership"]
    assert worlds == [3, 1]
    assert scheduler.folder.config["workers"] == 1  # resumed, it goes on so
    assert all(0.04 < observation.step_s < 5 for observation in controller.observed)
    spent = [standing.spent_usd for standing in controller.standings]
    assert spent == sorted(spent)
    assert spent[0] > 0
    assert keys_of(store.url, "run") == []


def test_another_memory_is_taken_by_all_workers_at_one_step_with_a_checkpoint(
    made: Any, store: EmbeddedStore, undisturbed: Path
) -> None:
    scheduler, controller = made(("switch", Choice(3, 2000)), ("switch", Choice(2, 500)), warm=False)
    assert scheduler.run()["state"] == "done"
    folder = scheduler.folder.path
    nearly_same_end(folder, undisturbed)
    assert scheduler.executor.started == [1000, 1000, 2000, 2000, 2000, 500, 500]
    assert [o.choice for o in controller.observed][:3] == [Choice(2, 1000), Choice(3, 2000), Choice(2, 500)]
    changes = [row for row in rows(folder) if row["kind"] == "membership"]
    assert [row["reasons"] for row in changes] == [
        ["3 x 2000 MB instead of 2 x 1000 MB"],
        ["2 x 500 MB instead of 3 x 2000 MB"],
    ]
    assert status(folder)["restarts"] == 0
    assert keys_of(store.url, "run") == []


def test_workers_that_do_not_come_up_are_not_wanted_again(made: Any, undisturbed: Path) -> None:
    scheduler, controller = made(("switch", Choice(3, 1000)))
    scheduler.executor = Noting(none_beside=True)
    assert scheduler.run()["state"] == "done"
    assert any("additional workers do not come up: 2 go on" in text for text in scheduler.progress.view.warnings)
    assert controller.limits == [2]
    assert {one.choice for one in controller.observed} == {Choice(2, 1000)}
    same_end(scheduler.folder.path, undisturbed)


def test_a_memory_that_cannot_be_had_changes_nothing(made: Any, undisturbed: Path) -> None:
    scheduler, controller = made(("switch", Choice(2, 666)))
    assert scheduler.run()["state"] == "done"
    assert scheduler.progress.view.warnings == ["2 x 666 MB cannot be had, 2 x 1000 MB go on: no such memory"]
    assert {o.choice for o in controller.observed} == {Choice(2, 1000)}
    same_end(scheduler.folder.path, undisturbed)


def test_a_goal_that_cannot_be_kept_stops_the_run_at_a_checkpoint_with_its_reason(made: Any, store: EmbeddedStore) -> None:
    scheduler, _ = made(("stop", Choice(2, 1000)))
    with pytest.raises(GoalMissed, match="the test says stop"):
        scheduler.run()
    found = status(scheduler.folder.path)
    assert found["state"] == "stopped"
    assert "the test says stop" in found["error"]
    assert found["checkpoint_step"] == found["step"] > 5
    assert keys_of(store.url, "run") == []


def test_a_budget_that_ends_while_workers_are_changed_ends_the_run_then(made: Any, store: EmbeddedStore) -> None:
    scheduler, controller = made(("switch", Choice(3, 1000)))
    controller.ends_in_a_change = True
    with pytest.raises(GoalMissed):
        scheduler.run()
    found = status(scheduler.folder.path)
    assert found["state"] == "stopped"
    assert found["checkpoint_step"] == found["step"]
    assert {one.choice for one in controller.observed} == {Choice(2, 1000)}
    assert keys_of(store.url, "run") == []
