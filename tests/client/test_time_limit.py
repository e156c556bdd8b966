"""Workers with a time limit are invoked again and again, and the run ends in the very same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commandline import PACED, Running, all_gone, keys_of, rows, same_end, smlt, status, steps, write_task

from smlt.store.embedded import EmbeddedStore

JOB = ("--workers", 2, "--epochs", 15, "--global-batch-size", 16, "--codec", "fp32")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the job without a time limit."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert smlt("train", write_task(folder), *JOB, "--name", "run", cwd=folder).returncode == 0
    return folder / "smlt-runs" / "run"


def invocations(run: Path) -> list[dict[str, Any]]:
    """The changes of the membership that a time limit made."""
    return [row for row in rows(run) if row["kind"] == "membership" and "time limit" in row["reasons"]]


@pytest.mark.parametrize(("how", "limit_s"), [("--warm", 2), ("--cold", 2.5)])
def test_many_invocations_end_in_the_same_bits(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path, how: str, limit_s: float
) -> None:
    script = write_task(tmp_path, PACED)
    options = ("--time-limit", limit_s, how, "--store", store.url, "--json", "--name", "run")
    seen = {}
    with Running("train", script, *JOB, *options, cwd=tmp_path, PACE="0.1") as run:
        first = run.wait_for(lambda event: event["event"] == "step")
        assert first["step"] == 1
        seen = {process.pid: process for _, process in run.workers()}
        assert len(seen) == 2
        run.wait_for(lambda event: event["event"] == "membership")
        again = {process.pid: process for _, process in run.workers()}
        assert (again.keys() == seen.keys()) == (how == "--warm")  # warm, the processes are the same
        assert run.finish() == 0
        assert run.errors.read_text() == ""
    folder = tmp_path / "smlt-runs" / "run"
    same_end(folder, undisturbed)
    assert len(invocations(folder)) >= 2
    assert status(folder)["restarts"] == 0
    logs = "".join(path.read_text() for path in (folder / "logs").iterdir())
    assert "the time limit of" not in logs  # they left in time
    assert all_gone([*seen.values(), *again.values()])
    assert keys_of(store.url, "run") == []


def test_one_that_is_killed_between_two_invocations_is_replaced(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path
) -> None:
    script = write_task(tmp_path, PACED)
    options = ("--time-limit", 5, "--store", store.url, "--json", "--name", "run")
    with Running("train", script, *JOB, *options, cwd=tmp_path, PACE="0.2") as run:
        for _ in range(2):
            run.wait_for(lambda event: event["event"] == "membership" and "time limit" in event["reasons"])
            dict(run.workers())[1].kill()
            run.wait_for(lambda event: event["event"] == "membership" and 1 in event["lost_ranks"])
        assert run.finish() == 0
        assert run.errors.read_text() == ""
    folder = tmp_path / "smlt-runs" / "run"
    same_end(folder, undisturbed)
    assert status(folder)["restarts"] >= 2  # more when the machine was so busy that a limit came before its worker could train
    assert keys_of(store.url, "run") == []


def test_a_step_that_is_longer_than_the_limit_ends_with_what_to_do(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path, "\n        time.sleep(60 if number == 3 else 0)\n")
    options = ("--time-limit", 2, "--max-restarts", 1, "--store", store.url, "--name", "run")
    done = smlt("train", script, *JOB, *options, cwd=tmp_path)
    assert done.returncode == 4
    assert "the time limit of 2 s has passed" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "smlt-runs" / "run"
    assert [number for number, _ in steps(folder)] == [1, 2]
    assert keys_of(store.url, "run") == []
