"""The Task Scheduler with an executor of the test's own: workers that only report, in the order the test wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from commandline import keys_of, rows, status, write_task

from smlt.client.runs import Run
from smlt.client.scheduler import RunRequest, TaskScheduler
from smlt.errors import WorkerLostError
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore, ServerInfo
from smlt.worker.config import WorkerConfig


class Recorder:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        self.told.append("started")

    def step(self, row: dict[str, Any]) -> None:
        self.told.append(f"step {row['step']}")

    def epoch(self, row: dict[str, Any]) -> None:
        self.told.append(f"epoch {row['epoch']}")

    def stopping(self) -> None:
        self.told.append("stopping")

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        self.told.append(status["state"])


class Scripted:
    """A worker that runs `report` when it is looked at for the first time, and has ended then."""

    def __init__(self, config: WorkerConfig, report: Callable[[ParameterStore, int], None]) -> None:
        assert config.store_url is not None
        self.rank, self.report = config.rank, report
        self.parameters = ParameterStore(config.store_url, job=config.job)
        self.looked_at = self.killed = False

    def poll(self) -> int | None:
        if not self.looked_at:
            self.looked_at = True
            self.report(self.parameters, self.rank)
            return None
        return 0

    def stop(self) -> None:
        raise AssertionError

    def kill(self) -> None:
        self.killed = True
        self.parameters.close()


class ScriptedExecutor:
    def __init__(self, report: Callable[[ParameterStore, int], None]) -> None:
        self.report, self.workers = report, list[Scripted]()

    def start(self, config: WorkerConfig, log_path: Path) -> Scripted:
        self.workers.append(Scripted(config, self.report))
        return self.workers[-1]


def step_row(rank: int, step: int) -> dict[str, Any]:
    times = {"compute_s": 0.1, "communication_s": 0.1, "communication_total_s": 0.15, "data_s": 0.0}
    times |= {"rss_mb": 1.0, "time": 100.0 + step}
    return {"rank": rank, "step": step, "epoch": 0, "loss": 1.0 / step, "samples": 4, **times}


def scheduler(store: EmbeddedStore, folder: Path, report: Callable[[ParameterStore, int], None]) -> TaskScheduler:
    request = RunRequest(str(write_task(folder)), workers=2, epochs=1)
    run = Run.create(folder / "runs", Path("tiny.py"), asdict(request), "scripted")
    return TaskScheduler(run, request, Recorder(), store_url=store.url, executor=ScriptedExecutor(report))


def test_a_step_is_told_when_all_have_reported_it_and_an_epoch_behind_its_last_step(
    store: EmbeddedStore, tmp_path: Path
) -> None:
    def report(parameters: ParameterStore, rank: int) -> None:
        # One read of the streams gives all of rank 0's reports, the epoch's too, before any of rank 1's.
        for step in (1, 2):
            parameters.report(rank, step_row(rank, step))
        parameters.report(rank, {"rank": rank, "step": 2, "epoch": 0, "kind": "epoch", "metrics": {"accuracy": 0.5}})
        parameters.report(rank, {"rank": rank, "step": 2, "epoch": 0, "kind": "end", "state": "done"})

    made = scheduler(store, tmp_path, report)
    assert made.run()["state"] == "done"
    assert isinstance(made.progress, Recorder)
    assert made.progress.told == ["started", "step 1", "step 2", "epoch 0", "done"]
    assert [row["kind"] for row in rows(made.folder.path)] == ["step", "step", "epoch"]
    assert rows(made.folder.path)[1]["compute_s"] == [0.1, 0.1]
    assert rows(made.folder.path)[1]["communication_total_s"] == [0.15, 0.15]
    assert status(made.folder.path)["metrics"] == {"accuracy": 0.5}
    assert keys_of(store.url, "scripted") == []


def test_a_worker_that_ends_without_its_last_report_fails_the_run(store: EmbeddedStore, tmp_path: Path) -> None:
    def report(parameters: ParameterStore, rank: int) -> None:
        parameters.report(rank, step_row(rank, 1))
        if rank == 0:
            parameters.report(rank, {"rank": rank, "step": 1, "epoch": 0, "kind": "end", "state": "done"})

    made = scheduler(store, tmp_path, report)
    with pytest.raises(WorkerLostError, match="worker 1 ended with exit code 0") as caught:
        made.run()
    assert caught.value.ranks == (1,)
    assert status(made.folder.path)["state"] == "failed"
    assert isinstance(made.executor, ScriptedExecutor)
    assert all(worker.killed for worker in made.executor.workers)
    assert keys_of(store.url, "scripted") == []
