"""The Task Scheduler with an executor of the test's own: workers that only report, in the order the test wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from commandline import keys_of, rows, status, write_task

from smlt.client.executors import Executor, Worker, account_of
from smlt.client.request import RunRequest
from smlt.client.runs import Run
from smlt.client.scheduler import TaskScheduler
from smlt.client.watching import Unwatched
from smlt.errors import FencedError, SmltError, WorkerLostError
from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore
from smlt.store.membership import Ack, Plan, Position
from smlt.store.parameter import ParameterStore, ServerInfo
from smlt.worker.config import WorkerConfig


class Recorder(Unwatched):
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        self.told.append("started")

    def step(self, row: dict[str, Any]) -> None:
        self.told.append(f"step {row['step']}")

    def epoch(self, row: dict[str, Any]) -> None:
        self.told.append(f"epoch {row['epoch']}")

    def membership(self, row: dict[str, Any]) -> None:
        self.told.append(f"{row['world_size']} workers: {'; '.join(row['reasons'])}")

    def warning(self, text: str) -> None:
        self.told.append(text)

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        self.told.append(status["state"])


class Scripted(Worker):
    """A worker that acknowledges when it is looked at, runs `report` when there is a plan, and has ended then."""

    def __init__(self, config: WorkerConfig, number: int, report: Report) -> None:
        assert config.store_url is not None
        self.config, self.number, self.report = config, number, report
        self.coordination = Coordination(ParameterStore(config.store_url, job=config.job))
        self.acknowledged = 0
        self.position: Position | None = None
        self.finishing = False
        self.held: Callable[[], bool] = lambda: False  # while true, it does not answer to a new generation
        self.code: int | None = None
        self.killed = False

    def poll(self) -> int | None:
        if self.code is not None or self.killed:
            return self.code
        generation = self.coordination.generation()
        if generation is not None and generation > self.acknowledged:
            if self.held():
                return None
            ack = Ack(self.config.worker_id, self.position, self.finishing)
            self.coordination.acknowledge(generation, ack, self.config.worker_id, [], "{}", 10)
            self.acknowledged = generation
        plan = self.coordination.plan()
        if plan is not None:
            self.code = self.report(self, plan)
        return None

    def say(self, plan: Plan, row: dict[str, Any]) -> None:
        self.coordination.report(plan.generation, self.config.worker_id, row["rank"], row, 10)

    def account(self) -> str:
        return account_of(self.code or 0)

    def invoke(self, config: WorkerConfig) -> bool:
        raise AssertionError

    def kill(self) -> None:
        self.killed = True
        self.coordination.parameters.close()


#: What a worker does with a plan: its exit code, None when it is to be looked at again.
Report = Callable[[Scripted, Plan], int | None]


class ScriptedExecutor(Executor):
    def __init__(self, report: Report) -> None:
        self.report, self.workers = report, list[Scripted]()

    def start(self, config: WorkerConfig, log_path: Path) -> Scripted:
        self.workers.append(Scripted(config, len(self.workers), self.report))
        return self.workers[-1]


def step_row(rank: int, step: int) -> dict[str, Any]:
    times = {"compute_s": 0.1, "communication_s": 0.1, "communication_total_s": 0.15, "data_s": 0.0}
    times |= {"rss_mb": 1.0, "time": 100.0 + step}
    return {"rank": rank, "step": step, "epoch": 0, "loss": 1.0 / step, "samples": 4, **times}


def end_row(rank: int, step: int) -> dict[str, Any]:
    return {"rank": rank, "step": step, "epoch": 0, "kind": "end", "state": "done"}


def scheduler(store: EmbeddedStore, folder: Path, report: Report, **more: Any) -> TaskScheduler:
    request = RunRequest(str(write_task(folder)), workers=2, epochs=1, **more)
    run = Run.create(folder / "runs", Path("tiny.py"), asdict(request), "scripted")
    return TaskScheduler(run, request, Recorder(), store_url=store.url, executor=ScriptedExecutor(report))


def workers_of(made: TaskScheduler) -> list[Scripted]:
    assert isinstance(made.executor, ScriptedExecutor)
    return made.executor.workers


def told(made: TaskScheduler) -> list[str]:
    assert isinstance(made.progress.view, Recorder)
    return made.progress.view.told


def all_of_it(worker: Scripted, plan: Plan) -> int:
    rank = plan.ranks[worker.config.worker_id]
    # One read of the streams gives all of rank 0's reports, the epoch's too, before any of rank 1's.
    for step in (1, 2):
        worker.say(plan, step_row(rank, step))
    worker.say(plan, {"rank": rank, "step": 2, "epoch": 0, "kind": "epoch", "metrics": {"accuracy": 0.5}})
    worker.say(plan, end_row(rank, 2))
    return 0


def test_a_step_is_told_when_all_have_reported_it_and_an_epoch_behind_its_last_step(
    store: EmbeddedStore, tmp_path: Path
) -> None:
    made = scheduler(store, tmp_path, all_of_it)
    assert made.run()["state"] == "done"
    assert told(made) == ["started", "step 1", "step 2", "epoch 0", "done"]
    assert [row["kind"] for row in rows(made.folder.path)] == ["step", "step", "epoch"]
    assert rows(made.folder.path)[1]["compute_s"] == [0.1, 0.1]
    assert rows(made.folder.path)[1]["communication_total_s"] == [0.15, 0.15]
    assert status(made.folder.path)["metrics"] == {"accuracy": 0.5}
    assert keys_of(store.url, "scripted") == []


def ends_early(worker: Scripted, plan: Plan) -> int | None:
    """The second to be started ends with exit code 0 behind step 1; the others go on when they are alone with its successor."""
    if worker.number == 1:
        worker.say(plan, step_row(1, 1))
        return 0
    if plan.generation == 1:
        return None
    return all_of_it(worker, plan)


def test_a_worker_that_ends_without_its_last_report_is_replaced(store: EmbeddedStore, tmp_path: Path) -> None:
    made = scheduler(store, tmp_path, ends_early)
    assert made.run()["state"] == "done"
    assert told(made)[0] == "started"
    assert "2 workers: worker 1 ended with exit code 0" in told(made)
    assert [text for text in told(made) if text.startswith(("step", "epoch"))] == ["step 1", "step 2", "epoch 0"]
    assert [worker.config.rank for worker in workers_of(made)] == [0, 1, 1]
    assert len({worker.config.worker_id for worker in workers_of(made)}) == 3
    (change,) = [row for row in rows(made.folder.path) if row["kind"] == "membership"]
    assert (change["generation"], change["world_size"], change["lost_ranks"]) == (2, 2, [1])
    assert status(made.folder.path)["restarts"] == 1
    assert keys_of(store.url, "scripted") == []


def test_a_worker_that_ends_without_its_last_report_fails_the_run_when_it_is_to_stop(
    store: EmbeddedStore, tmp_path: Path
) -> None:
    made = scheduler(store, tmp_path, ends_early, on_failure="stop")
    with pytest.raises(WorkerLostError, match="worker 1 ended with exit code 0") as caught:
        made.run()
    assert caught.value.ranks == (1,)
    assert status(made.folder.path)["state"] == "failed"
    assert all(worker.killed for worker in workers_of(made))
    assert keys_of(store.url, "scripted") == []


def test_a_worker_whose_metadata_key_has_gone_is_lost_and_killed(store: EmbeddedStore, tmp_path: Path) -> None:
    def report(worker: Scripted, plan: Plan) -> int | None:
        if worker.number == 1:
            parameters = worker.coordination.parameters
            parameters.client.unlink(parameters.key(f"worker:{worker.config.worker_id}"))  # as if it had expired
            return None
        return None if plan.generation == 1 else all_of_it(worker, plan)

    made = scheduler(store, tmp_path, report)
    assert made.run()["state"] == "done"
    assert "2 workers: worker 1 has stopped reporting: its metadata key has expired (--liveness 10)" in told(made)
    assert workers_of(made)[1].killed
    assert workers_of(made)[1].code is None


def test_a_rank_that_the_others_miss_is_replaced_and_a_fault_of_nobody_begins_anew(
    store: EmbeddedStore, tmp_path: Path
) -> None:
    def report(worker: Scripted, plan: Plan) -> int | None:
        name, rank = worker.config.worker_id, plan.ranks[worker.config.worker_id]
        if plan.generation == 1 and rank == 0:
            worker.coordination.fault(name, 1, "rank 0: WorkerLostError: waited", [1])
        if plan.generation == 2 and rank == 1:
            worker.coordination.fault(name, 2, "rank 1: CollectiveTimeout: late")
            worker.coordination.fault(name, 1, "rank 1: of a generation that is over")
        return all_of_it(worker, plan) if plan.generation == 3 else None

    made = scheduler(store, tmp_path, report)
    assert made.run()["state"] == "done"
    (change,) = [row for row in rows(made.folder.path) if row["kind"] == "membership"]
    assert change["reasons"] == [
        "worker 1 did not take part: rank 0: WorkerLostError: waited",
        "rank 1: CollectiveTimeout: late",
    ]
    assert (change["generation"], change["lost_ranks"]) == (3, [1])
    assert [worker.config.rank for worker in workers_of(made)] == [0, 1, 1]


@pytest.mark.parametrize("code", [2, 5, 6])
def test_a_worker_that_cannot_work_the_next_time_either_is_not_replaced(
    store: EmbeddedStore, tmp_path: Path, code: int
) -> None:
    made = scheduler(store, tmp_path, lambda worker, plan: code if worker.number == 1 else None)
    with pytest.raises(SmltError, match=f"worker 1 ended with exit code {code}"):
        made.run()
    assert len(workers_of(made)) == 2
    assert keys_of(store.url, "scripted") == []


def test_a_scheduler_that_another_one_has_taken_over_from_ends(store: EmbeddedStore, tmp_path: Path) -> None:
    def report(worker: Scripted, plan: Plan) -> int | None:
        parameters = worker.coordination.parameters
        parameters.client.set(parameters.key("scheduler"), "another")
        return None

    made = scheduler(store, tmp_path, report)
    with pytest.raises(FencedError, match=r"has another scheduler now \(another\): this one ends"):
        made.run()
    assert all(worker.killed for worker in workers_of(made))


def test_what_a_worker_needs_to_finish_its_step_is_kept_until_it_has(store: EmbeddedStore, tmp_path: Path) -> None:
    seen: list[int] = []

    def report(worker: Scripted, plan: Plan) -> int | None:
        rank, parameters = plan.ranks[worker.config.worker_id], worker.coordination.parameters
        aggregate = parameters.key("1.abcd:2:a:0")
        if plan.generation == 1:
            if worker.position is None:  # both come to step 1; rank 1 completes step 2 as well, rank 0 is interrupted in it
                parameters.client.set(aggregate, b"chunk", px=60_000)
                worker.say(plan, step_row(rank, 1))
                if rank == 1:
                    worker.say(plan, step_row(rank, 2))
                    worker.coordination.fault(worker.config.worker_id, 1, "rank 1: CollectiveTimeout: late")
                worker.position, worker.finishing = Position(1 + rank), rank == 0
            return None
        assert plan.finish == (0,)
        if rank == 0:
            seen.append(parameters.client.exists(aggregate))
            if len(seen) < 5:
                return None
            worker.say(plan, step_row(rank, 2))
        worker.say(plan, step_row(rank, 3))
        worker.say(plan, {**end_row(rank, 3), "state": "done"})
        return 0

    made = scheduler(store, tmp_path, report)
    assert made.run()["state"] == "done"
    assert seen == [1] * 5
    assert [text for text in told(made) if text.startswith("step")] == ["step 1", "step 2", "step 3"]
    (change,) = [row for row in rows(made.folder.path) if row["kind"] == "membership"]
    assert (change["generation"], change["step"]) == (2, 3)  # it is over when a step is complete, not when one is settled


def test_a_request_to_scale_is_taken_when_they_have_gathered(store: EmbeddedStore, tmp_path: Path) -> None:
    held: list[int] = []

    def asks_meanwhile() -> bool:
        if not held:
            made.folder.request_scale(1)
        held.append(1)
        return len(held) < 5

    def report(worker: Scripted, plan: Plan) -> int | None:
        worker.position = Position(0)
        if plan.generation == 1 and worker.number == 1:
            worker.held = asks_meanwhile
            worker.coordination.fault(worker.config.worker_id, 1, "rank 1: CollectiveTimeout: late")
        return all_of_it(worker, plan) if plan.ranks == {worker.config.worker_id: 0} else None

    made = scheduler(store, tmp_path, report, timeout_s=5)
    assert made.run()["state"] == "done"
    (change,) = [row for row in rows(made.folder.path) if row["kind"] == "membership"]
    assert (change["world_size"], change["reasons"][-1]) == (1, "1 workers instead of 2")


def test_a_request_to_shrink_calls_off_those_who_were_to_join(store: EmbeddedStore, tmp_path: Path) -> None:
    def report(worker: Scripted, plan: Plan) -> int | None:
        worker.position = Position(0)
        if plan.generation == 1 and worker.number == 0 and len(workers_of(made)) == 2:
            made.folder.request_scale(4)
        if plan.generation == 1 and worker.number == 0 and len(workers_of(made)) == 4:
            made.folder.request_scale(1)
        return all_of_it(worker, plan) if plan.ranks == {worker.config.worker_id: 0} else None

    made = scheduler(store, tmp_path, report)
    assert made.run()["state"] == "done"
    (change,) = [row for row in rows(made.folder.path) if row["kind"] == "membership"]
    assert change["reasons"] == ["1 workers instead of 2"]


def test_nobody_is_to_finish_a_step_from_a_store_that_has_lost_its_data(store: EmbeddedStore, tmp_path: Path) -> None:
    plans: list[Plan] = []

    def report(worker: Scripted, plan: Plan) -> int | None:
        rank = plan.ranks[worker.config.worker_id]
        if plan.generation == 1:
            if worker.position is None:
                worker.position, worker.finishing = Position(1 + rank), rank == 0
                if rank == 1:
                    worker.coordination.parameters.sweep()
            return None
        plans.append(plan)
        for step in (1, 2, 3):
            worker.say(plan, step_row(rank, step))
        worker.say(plan, end_row(rank, 3))
        return 0

    made = scheduler(store, tmp_path, report)
    assert made.run()["state"] == "done"
    assert (plans[0].position, plans[0].finish, plans[0].restore, plans[0].donor) == (Position(2), (), (0,), 1)
