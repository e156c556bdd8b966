"""What comes at the worst moment: in the middle of a change, at the very end, or while the store does not answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import PACED, TASK, Running, all_gone, eventually, keys_of, rows, same_end, smlt, status, steps, write_task
from test_scheduler import Scripted, all_of_it, scheduler, told, workers_of

from smlt.client import starts
from smlt.errors import StoreUnavailable
from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore
from smlt.store.membership import Plan
from smlt.store.object import DirectoryObjectStore
from smlt.store.parameter import ParameterStore
from smlt.worker import checkpoint

JOB = ("--workers", 3, "--epochs", 10, "--global-batch-size", 16, "--codec", "fp32", "--json", "--name", "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the job when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert smlt("train", write_task(folder), *JOB, cwd=folder).returncode == 0
    return folder / "smlt-runs" / "run"


class Going(Running):
    """A run that is ended when it hangs."""

    def __init__(self, store: EmbeddedStore, cwd: Path, script: Path, *more: object, pace: float = 0.05) -> None:
        super().__init__("train", script, *JOB, *more, "--store", store.url, cwd=cwd, PACE=str(pace))
        self.folder, self.store = cwd / "smlt-runs" / "run", store
        self.watchdog = threading.Timer(30, self.process.kill)
        self.watchdog.start()

    def close(self) -> None:
        self.watchdog.cancel()
        super().close()

    def at_step(self, number: int) -> None:
        self.wait_for(lambda event: event["event"] == "step" and event["step"] >= number)

    def changes(self) -> list[dict[str, Any]]:
        return [row for row in rows(self.folder) if row["kind"] == "membership"]


@contextmanager
def coordination_of(run: Going) -> Iterator[Coordination]:
    parameters = ParameterStore(run.store.url, job=status(run.folder)["job"])
    yield Coordination(parameters)
    parameters.close()


# ---- the store does not answer once ----


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, when: Callable[..., bool] = lambda *_: True) -> list[str]:
    """Let one call of a method of Coordination fail as if the store were away; returns what has failed."""
    real, failed = getattr(Coordination, name), list[str]()

    def method(self: Coordination, *arguments: Any) -> Any:
        if not failed and when(*arguments):
            failed.append(name)
            raise StoreUnavailable("away for a moment")
        return real(self, *arguments)

    monkeypatch.setattr(Coordination, name, method)
    return failed


def impatient(report: Callable[[Scripted, Plan], int | None], limit_s: float = 8.0) -> Callable[[Scripted, Plan], int | None]:
    """The same, for at most so long."""
    deadline = time.monotonic() + limit_s

    def limited(worker: Scripted, plan: Plan) -> int | None:
        assert time.monotonic() < deadline, "nothing happens any more"
        return report(worker, plan)

    return limited


def test_a_worker_that_ends_while_the_store_is_away_is_replaced(
    store: EmbeddedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = fail_once(monkeypatch, "failure")

    def report(worker: Scripted, plan: Plan) -> int | None:
        return 3 if worker.number == 1 else all_of_it(worker, plan) if plan.generation > 1 else None

    made = scheduler(store, tmp_path, impatient(report))
    assert made.run()["state"] == "done"
    assert failed
    assert "2 workers: worker 1 ended with exit code 3" in told(made)


def test_what_workers_say_is_heard_though_the_store_is_away(
    store: EmbeddedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = fail_once(monkeypatch, "failure")

    def report(worker: Scripted, plan: Plan) -> int | None:
        if plan.generation > 1:
            return all_of_it(worker, plan)
        if worker.number == 1 and not failed:
            worker.coordination.fault(worker.config.worker_id, 1, "rank 1: CollectiveTimeout: late")
        return None

    made = scheduler(store, tmp_path, impatient(report))
    assert made.run()["state"] == "done"
    assert "2 workers: rank 1: CollectiveTimeout: late" in told(made)


# ---- waiting ----


def test_a_worker_may_take_longer_to_come_than_others_when_the_timeout_says_so(
    store: EmbeddedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "START_S", 0.2)
    made = scheduler(store, tmp_path, all_of_it, timeout_s=20)
    since = time.monotonic()
    executor: Any = made.executor
    start = executor.start

    def slowly(*arguments: Any) -> Scripted:
        worker: Scripted = start(*arguments)
        worker.held = lambda: time.monotonic() - since < 1
        return worker

    executor.start = slowly
    assert made.run()["state"] == "done"
    assert len(workers_of(made)) == 2


def test_one_that_hangs_while_another_is_replaced_is_replaced_too(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path
) -> None:
    hang = f"""
        time.sleep(0.05)
        if number == 6 and one_worker({str(tmp_path)!r}):
            (Path({str(tmp_path)!r}) / "hangs").write_text(str(os.getpid()))
            while True:
                time.sleep(1)  # the heartbeat goes on
"""
    with Going(store, tmp_path, write_task(tmp_path, hang), "--timeout", 3) as run:
        run.at_step(5)
        assert eventually(lambda: (tmp_path / "hangs").exists() and (tmp_path / "hangs").read_text() != "")
        hanging = int((tmp_path / "hangs").read_text())
        next(process for _, process in run.workers() if process.pid != hanging).kill()
        assert run.finish() == 0
    same_end(run.folder, undisturbed)
    assert len(run.changes()[0]["lost_ranks"]) == 2


def test_a_store_that_has_gone_back_to_an_older_generation_is_told_a_newer_one(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path
) -> None:
    with Going(store, tmp_path, write_task(tmp_path, PACED)) as run:
        run.at_step(4)
        run.workers()[1][1].kill()
        run.wait_for(lambda event: event["event"] == "membership")
        with coordination_of(run) as coordination:  # as a replica does that lacks the last writes, or a restored snapshot
            parameters = coordination.parameters
            parameters.client.decr(parameters.key("generation"))
        assert run.finish() == 0
    same_end(run.folder, undisturbed)


def test_metadata_keys_that_expire_because_the_clock_of_the_store_jumps_are_no_lost_workers(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path
) -> None:
    with Going(store, tmp_path, write_task(tmp_path, PACED), "--liveness", 4, pace=0.1) as run:
        run.at_step(6)
        with coordination_of(run) as coordination:
            parameters, deadline = coordination.parameters, time.monotonic() + 0.7
            keys = [parameters.key(f"worker:{name}") for name in (coordination.plan() or Plan(0, {}, None, None)).ranks]
            assert len(keys) == 3
            while time.monotonic() < deadline:
                parameters.client.delete(*keys)
        assert run.finish() == 0
    same_end(run.folder, undisturbed)
    assert run.changes() == []


def test_a_cold_worker_whose_time_limit_comes_before_it_can_train_ends_the_run(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path)
    text = script.read_text()
    start = "    def data(self):\n"
    assert start in text
    script.write_text(text.replace(start, f"{start}        time.sleep(1.8)\n"))
    with Going(store, tmp_path, script, "--time-limit", 2, "--cold", "--max-restarts", 2) as run:
        assert run.finish() == 4
    assert "its time limit comes before it can train" in run.errors.read_text()
    assert "--time-limit" in run.errors.read_text()
    assert keys_of(store.url, "run") == []


# ---- Ctrl-C, and a scheduler that dies, while they gather ----


@contextmanager
def frozen(run: Going) -> Iterator[None]:
    """Kill a worker, and wait until the others gather. Until the end one of them does not: with a spare it would be over."""
    with coordination_of(run) as coordination:
        held, killed = (process for _, process in run.workers()[:2])
        held.suspend()
        killed.kill()
        assert eventually(lambda: coordination.plan() is None)
        # A spare may gather too, and another change may follow.
        assert eventually(lambda: len(coordination.acks(coordination.generation() or 0)) >= 2)
    yield
    held.resume()


def test_ctrl_c_while_they_gather_leaves_a_checkpoint(store: EmbeddedStore, tmp_path: Path) -> None:
    with Going(store, tmp_path, write_task(tmp_path, PACED), pace=0.1) as run:
        run.at_step(6)
        with frozen(run):
            run.process.send_signal(signal.SIGINT)
        assert run.finish() == 130
    assert status(run.folder)["state"] == "stopped"
    assert status(run.folder)["checkpoint_step"] >= 6
    assert status(run.folder)["checkpoint_step"] == status(run.folder)["step"]


@pytest.mark.parametrize("spares", [(), ("--spares", 1)])
def test_a_scheduler_that_dies_while_they_gather_leaves_a_whole_checkpoint(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path, spares: tuple[object, ...]
) -> None:
    with Going(store, tmp_path, write_task(tmp_path, PACED), *spares, pace=0.1) as run:
        run.at_step(6)
        processes = run.descendants()
        with frozen(run):
            run.process.kill()
            run.process.wait()
        assert all_gone(processes)
    objects = DirectoryObjectStore(run.folder.parent)
    newest = max(path.parent.name for path in (run.folder / "checkpoints").glob("*/MANIFEST.json"))
    found = checkpoint.load(objects, f"run/checkpoints/{newest}")
    assert found[1]["step"] >= 6
    assert smlt("resume", "run", "--store", store.url, "--json", cwd=tmp_path).returncode == 0
    same_end(run.folder, undisturbed)


def test_a_spare_whose_scheduler_dies_leaves_the_others_their_checkpoint(store: EmbeddedStore, tmp_path: Path) -> None:
    with Going(store, tmp_path, write_task(tmp_path, PACED), "--spares", 1, pace=0.2) as run:
        run.at_step(6)
        with coordination_of(run) as coordination:
            assert eventually(lambda: len(coordination.acks(coordination.generation() or 0)) == 4)
        processes = run.descendants()
        run.process.kill()
        run.process.wait()
        assert all_gone(processes)
    newest = checkpoint.latest_step(DirectoryObjectStore(run.folder.parent), "run/checkpoints") or 0
    assert newest >= [number for number, _ in steps(run.folder)][-1]
    assert keys_of(store.url, "run") == []


# ---- what is written down ----


def test_a_step_that_only_one_had_reported_is_written_down_when_all_are_lost(store: EmbeddedStore, tmp_path: Path) -> None:
    """Without a test set nobody waits for the others at the end of an epoch: a checkpoint may be ahead of their reports."""
    script = write_task(
        tmp_path,
        f"""
        rank, dead = os.readlink("/proc/self/fd/1")[-5], Path({str(tmp_path)!r}) / "dead"
        if rank == "0" and number == 5 and not dead.exists():
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    text = script.read_text().replace('"train": (x, y), "test": (x, y)', '"train": (x, y)')
    script.write_text(
        text.replace(
            "        return SGD(",
            f"""        rank, dead = os.readlink("/proc/self/fd/1")[-5], Path({str(tmp_path)!r}) / "dead"

        class Dying(SGD):
            steps = 0

            def step(self, gradients):
                super().step(gradients)
                self.steps += 1
                if rank != "0" and self.steps == 4 and not dead.exists():
                    while not dead.exists():
                        time.sleep(0.001)
                    os.kill(os.getpid(), signal.SIGKILL)

        return Dying(""",
        )
    )
    assert text != TASK
    with Going(store, tmp_path, script) as run:
        assert run.finish() == 0
    assert len(run.changes()) == 1
    assert [number for number, _ in steps(run.folder)] == list(range(1, 41))


def test_going_back_to_a_checkpoint_is_over_with_the_first_step(store: EmbeddedStore, tmp_path: Path) -> None:
    with Going(store, tmp_path, write_task(tmp_path, PACED)) as run:
        run.at_step(15)
        for _, process in run.workers():
            process.kill()
        change = run.wait_for(lambda event: event["event"] == "membership")
        assert change["step"] == 13
        assert run.finish() == 0


# ---- what is left behind ----


def test_what_a_lost_worker_has_started_goes_with_it(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(
        tmp_path,
        f"""
        if number == 6 and one_worker({str(tmp_path)!r}):
            import subprocess
            child = subprocess.Popen(["sleep", "600"])
            (Path({str(tmp_path)!r}) / "child").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    with Going(store, tmp_path, script) as run:
        assert run.finish() == 0
    child = (
        psutil.Process(int((tmp_path / "child").read_text()))
        if psutil.pid_exists(int((tmp_path / "child").read_text()))
        else None
    )
    try:
        assert child is None or all_gone([child])
    finally:
        if child is not None and child.is_running():
            os.kill(child.pid, signal.SIGKILL)


def test_a_request_to_scale_is_for_the_run_that_was_under_way(store: EmbeddedStore, tmp_path: Path) -> None:
    made = scheduler(store, tmp_path, impatient(all_of_it))
    made.folder.request_scale(1)  # it had come too late for the start of the run before
    assert made.run()["state"] == "done"
    assert {len(row["ranks"]) for row in rows(made.folder.path) if row["kind"] == "step"} == {2}
    assert not (made.folder.path / "scale.json").exists()


def test_a_request_to_scale_at_the_end_of_the_job_is_too_late(store: EmbeddedStore, tmp_path: Path) -> None:
    def report(worker: Scripted, plan: Plan) -> int | None:
        if worker.number == 1 and 0 not in [w.number for w in workers_of(made) if w.code == 0]:
            return None
        if worker.number == 1 and len(asked) < 4:
            asked.append(True)
            if len(asked) == 2:  # by now it is known that the other one has ended
                made.folder.request_scale(1)
            return None
        return all_of_it(worker, plan)

    asked: list[bool] = []
    made = scheduler(store, tmp_path, impatient(report))
    assert made.run()["state"] == "done"
    assert asked
    assert len(workers_of(made)) == 2
