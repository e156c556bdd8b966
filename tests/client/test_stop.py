"""`smlt stop` ends a run from outside, with or without its scheduler, and leaves nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread, Timer

import pytest
from commandline import HOLD, PACED, Running, all_gone, keys_of, smlt, status, write_task

from smlt.client.runs import Run
from smlt.client.stopping import stop_run
from smlt.store.embedded import EmbeddedStore

JOB = ("--workers", 2, "--epochs", 400, "--global-batch-size", 16, "--codec", "fp32", "--json")


def at_step(number: int) -> Callable[[dict[str, object]], bool]:
    return lambda event: event["event"] == "step" and event["step"] == number


@pytest.mark.parametrize("embedded", [True, False])
def test_a_run_is_stopped_at_a_checkpoint_from_another_terminal(store: EmbeddedStore, tmp_path: Path, embedded: bool) -> None:
    where = () if embedded else ("--store", store.url)
    # Paced for the pipe: nobody reads the run's events until `smlt stop` has ended, and what is full stops the scheduler.
    with Running("train", write_task(tmp_path, PACED), *JOB, *where, "--name", "one", cwd=tmp_path, PACE="0.1") as run:
        run.wait_for(at_step(6))
        processes = run.descendants()
        done = smlt("stop", "one", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        run.finish()
    found = status(tmp_path / "smlt-runs" / "one")
    assert found["state"] == "stopped"
    assert found["checkpoint_step"] == found["step"] >= 6
    assert done.stdout == f"run one is stopped, with a checkpoint of step {found['step']}\n"
    assert all_gone(processes)
    assert keys_of(store.url, "one") == []


def test_now_does_not_wait_for_a_step(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path, HOLD)
    with Running("train", script, *JOB, "--store", store.url, "--name", "one", cwd=tmp_path, HOLD=str(tmp_path)) as run:
        run.wait_for(at_step(29))
        processes = run.descendants()
        assert smlt("stop", "one", "--now", cwd=tmp_path).returncode == 0
        run.finish()
    assert status(tmp_path / "smlt-runs" / "one")["state"] == "stopped"
    assert all_gone(processes)
    assert keys_of(store.url, "one") == []


def test_workers_without_a_scheduler_are_stopped_through_the_store(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path, HOLD)
    with Running("train", script, *JOB, "--store", store.url, "--name", "one", cwd=tmp_path, HOLD=str(tmp_path)) as run:
        run.wait_for(at_step(29))  # the workers wait in step 30
        processes = run.descendants()
        run.process.kill()
        run.process.wait()
        Timer(2.0, (tmp_path / "go").touch).start()
        done = smlt("stop", "one", "--store", store.url, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == "run one had no scheduler any more: its 2 workers were stopped, its keys are deleted\n"
    assert all_gone(processes)
    assert keys_of(store.url, "one") == []
    assert status(tmp_path / "smlt-runs" / "one")["state"] == "stopped"


def test_a_run_that_has_ended_is_left_alone(store: EmbeddedStore, tmp_path: Path) -> None:
    job = ("--workers", 1, "--epochs", 1, "--global-batch-size", 16)
    assert smlt("train", write_task(tmp_path), *job, "--store", store.url, "--name", "one", cwd=tmp_path).returncode == 0
    done = smlt("stop", "one", "--store", store.url, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "run one is done: nothing of it runs\n")
    assert status(tmp_path / "smlt-runs" / "one")["state"] == "done"


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = smlt("stop", "none", cwd=tmp_path)
    assert done.returncode == 6
    assert done.stderr.startswith("smlt: there is no run none in ")


def test_a_run_that_still_makes_its_bill_is_waited_for(tmp_path: Path) -> None:
    """`smlt stop RUN && smlt resume RUN`: a run is stopped when another process may go on with it."""
    run = Run.create(tmp_path, Path("script.py"), {}, "one")
    ended = Event()

    def schedule(process: subprocess.Popen[bytes]) -> None:
        with run.hold():
            run.write_status(state="running", pid=process.pid)
            held.set()
            process.wait()
            run.write_status(state="stopped")
            ended.wait(0.5)
            ended.set()

    held, process = Event(), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    scheduler = Thread(target=schedule, args=(process,))
    scheduler.start()
    assert held.wait(10)
    try:
        stop_run(run, lambda: None)
        assert ended.is_set()
    finally:
        process.kill()
        scheduler.join()
