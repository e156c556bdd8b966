"""A run that is interrupted leaves no process and no key, and goes on to the very same end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import HOLD, Running, all_gone, keys_of, parameters, rows, smlt, status, steps, write_task

from smlt.store.embedded import EmbeddedStore

JOB = ("--workers", 3, "--epochs", 40, "--global-batch-size", 16, "--codec", "fp32")
LAST_STEP = 160


def at_step(number: int) -> Callable[[dict[str, object]], bool]:
    return lambda event: event["event"] == "step" and event["step"] == number


def is_stopping(event: dict[str, object]) -> bool:
    return event["event"] == "stopping"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the job, run in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    assert smlt("train", write_task(folder, HOLD), *JOB, "--name", "whole", cwd=folder).returncode == 0
    return folder / "smlt-runs" / "whole"


def same_end(run: Path, other: Path) -> None:
    assert status(run)["state"] == "done"
    assert [number for number, _ in steps(run)] == list(range(1, LAST_STEP + 1))
    assert steps(run) == steps(other)
    assert [row["metrics"] for row in rows(run) if row["kind"] == "epoch"] == [
        row["metrics"] for row in rows(other) if row["kind"] == "epoch"
    ]
    assert parameters(run) == parameters(other)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_stops_in_order_and_resumes_to_the_same_bits(
    store: EmbeddedStore, tmp_path: Path, uninterrupted: Path, number: signal.Signals, code: int
) -> None:
    script = write_task(tmp_path, HOLD)
    where = ("--store", store.url, "--json")
    name = f"stopped-{code}"
    with Running("train", script, *JOB, *where, "--name", name, cwd=tmp_path, HOLD=str(tmp_path)) as run:
        run.wait_for(at_step(29))  # the workers wait in step 30, in the middle of an epoch
        processes = run.descendants()
        assert len(processes) == 3
        assert keys_of(store.url, name) != []
        run.process.send_signal(number)
        run.wait_for(is_stopping)
        (tmp_path / "go").touch()
        assert run.finish() == code
        assert run.events[-1]["event"] == "ended"
        assert run.errors.read_text() == ""
    assert all_gone(processes)
    assert keys_of(store.url, name) == []
    folder = tmp_path / "smlt-runs" / name
    stopped = status(folder)
    assert stopped["state"] == "stopped"
    assert 30 <= stopped["step"] < LAST_STEP
    assert max((folder / "checkpoints").iterdir()).name == f"{stopped['step']:09d}"  # not an epoch's end only

    script.unlink()  # the run has the code
    done = smlt("train", "--resume", name, *where, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    same_end(folder, uninterrupted)
    assert keys_of(store.url, name) == []


def test_a_second_ctrl_c_ends_at_once(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path, HOLD)
    where = ("--store", store.url, "--json", "--name", "twice")
    with Running("train", script, *JOB, *where, cwd=tmp_path, HOLD=str(tmp_path)) as run:
        run.wait_for(at_step(29))
        processes = run.descendants()
        run.process.send_signal(signal.SIGINT)
        run.wait_for(is_stopping)
        run.process.send_signal(signal.SIGINT)  # the workers hang in the task: none of them could stop in order
        assert run.finish() == 130
        assert "Traceback" not in run.errors.read_text()
    assert all_gone(processes)
    assert keys_of(store.url, "twice") == []
    assert status(tmp_path / "smlt-runs" / "twice")["state"] == "stopped"


def test_workers_and_store_end_with_a_killed_client_and_the_run_resumes(tmp_path: Path, uninterrupted: Path) -> None:
    script = write_task(tmp_path, HOLD)
    with Running("train", script, *JOB, "--json", "--name", "killed", cwd=tmp_path, HOLD=str(tmp_path)) as run:
        run.wait_for(at_step(29))
        processes = run.descendants()
        assert len(processes) >= 5  # three workers, the store and its guard
        run.process.kill()
        run.process.wait()
    assert all_gone(processes)
    shown = smlt("status", "killed", cwd=tmp_path).stdout
    assert "state    lost" in shown
    assert "smlt resume killed" in shown
    done = smlt("resume", "killed", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    same_end(tmp_path / "smlt-runs" / "killed", uninterrupted)


def test_a_finished_run_resumed_with_more_epochs_ends_as_if_it_had_been_asked_for_them(
    tmp_path: Path, uninterrupted: Path
) -> None:
    script = write_task(tmp_path, HOLD)
    assert smlt("train", script, *JOB, "--epochs", 5, "--name", "short", cwd=tmp_path).returncode == 0
    again = smlt("train", "--resume", "short", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert "done after 20 steps" in again.stdout
    more = smlt("train", "--resume", "short", "--epochs", 40, "--workers", 3, cwd=tmp_path)
    assert (more.returncode, more.stderr) == (0, "")
    assert "epoch 40/40" in more.stdout
    same_end(tmp_path / "smlt-runs" / "short", uninterrupted)
    assert "epoch 40 of 40" in smlt("status", cwd=tmp_path).stdout
