"""A run whose scheduler is gone stops at a checkpoint and is resumed; one that is under way changes its size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import (
    LIMIT_S,
    PACED,
    Running,
    all_gone,
    environment,
    eventually,
    keys_of,
    rows,
    same_end,
    smlt,
    status,
    steps,
    write_task,
)

from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore
from smlt.worker.config import WorkerConfig

JOB = ("--workers", 3, "--epochs", 20, "--global-batch-size", 16, "--codec", "fp32", "--json", "--name", "run")
LAST_STEP = 80


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the job in one piece."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert smlt("train", write_task(folder), *JOB, cwd=folder).returncode == 0
    return folder / "smlt-runs" / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "smlt-runs" / "run"


def at_step(run: Running, number: int) -> None:
    run.wait_for(lambda event: event["event"] == "step" and event["step"] >= number)


def newest(folder: Path) -> int:
    return max(int(path.name) for path in (folder / "checkpoints").iterdir() if (path / "MANIFEST.json").exists())


def store_of(store: EmbeddedStore | None) -> tuple[str, ...]:
    return () if store is None else ("--store", store.url)


@pytest.fixture(params=["embedded", "external"])
def where(request: pytest.FixtureRequest, store: EmbeddedStore) -> EmbeddedStore | None:
    return store if request.param == "external" else None


def test_workers_without_a_scheduler_stop_at_a_checkpoint_and_the_run_resumes_to_the_same_bits(
    tmp_path: Path, folder: Path, undisturbed: Path, where: EmbeddedStore | None
) -> None:
    script = write_task(tmp_path, PACED)
    processes: list[psutil.Process] = []
    last = 0
    with Running("train", script, *JOB, *store_of(where), cwd=tmp_path, PACE="0.05") as run:
        at_step(run, 6)
        processes += run.descendants()
        run.process.kill()
        run.process.wait()
        assert all_gone(processes)
        last = newest(folder)
    assert last >= 6
    if where is not None:
        assert keys_of(where.url, "run") == []
    # They stopped behind the step they were in, not at the epoch's end before it, and together.
    state = json.loads((folder / "checkpoints" / f"{last:09d}" / "state.json").read_text())
    assert state["step"] == last
    assert {row["step"] for row in state["recent"] if "loss" in row} == set(range(1, last + 1))
    shown = smlt("status", "run", cwd=tmp_path).stdout
    assert "state    lost" in shown
    assert f"from step {last}" in shown
    done = smlt("resume", "run", *store_of(where), "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first = next(json.loads(line) for line in done.stdout.splitlines() if json.loads(line)["event"] == "step")
    assert first["step"] <= last + 1
    same_end(folder, undisturbed)
    if where is not None:
        assert keys_of(where.url, "run") == []


def test_a_run_is_resumed_while_its_workers_are_still_there(
    store: EmbeddedStore, tmp_path: Path, folder: Path, undisturbed: Path
) -> None:
    """They are given time to stop; who does not is fenced, and changes nothing any more."""
    script = write_task(tmp_path, PACED)
    with Running("train", script, *JOB, "--store", store.url, cwd=tmp_path, PACE="0.3") as run:
        at_step(run, 5)
        processes = run.descendants()
        run.process.kill()
        run.process.wait()
        done = smlt("resume", "run", "--store", store.url, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all_gone(processes)
    same_end(folder, undisturbed)
    assert keys_of(store.url, "run") == []


def test_a_resumed_run_may_have_other_workers_and_more_epochs(tmp_path: Path, folder: Path, undisturbed: Path) -> None:
    script = write_task(tmp_path)
    assert smlt("train", script, *JOB, "--epochs", 7, cwd=tmp_path).returncode == 0
    done = smlt("resume", "run", "--workers", 2, "--epochs", 20, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [number for number, _ in steps(folder)] == list(range(1, LAST_STEP + 1))
    assert [loss for _, loss in steps(folder)] == pytest.approx([loss for _, loss in steps(undisturbed)], rel=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert (config["workers"], config["epochs"], config["seed"]) == (2, 20, 0)


# ---- smlt scale ----


def test_a_run_under_way_grows_and_shrinks(store: EmbeddedStore, tmp_path: Path, folder: Path, undisturbed: Path) -> None:
    script = write_task(tmp_path, PACED)
    with Running("train", script, *JOB, "--store", store.url, cwd=tmp_path, PACE="0.2") as run:
        at_step(run, 3)
        seen = run.descendants()
        for size in (5, 2):
            assert smlt("scale", "run", "--workers", size, cwd=tmp_path).returncode == 0
            change = run.wait_for(lambda event, size=size: event["event"] == "membership" and event["world_size"] == size)
            assert change["lost_ranks"] == []
            seen += run.descendants()
        assert eventually(lambda: len(run.workers()) == 2)  # who is not needed has left
        run.let_go()
        assert run.finish() == 0
        assert run.errors.read_text() == ""
    assert all_gone(seen)
    assert keys_of(store.url, "run") == []
    assert status(folder)["restarts"] == 0
    assert json.loads((folder / "config.json").read_text())["workers"] == 2  # resumed, it would go on with as many
    assert [number for number, _ in steps(folder)] == list(range(1, LAST_STEP + 1))
    assert [loss for _, loss in steps(folder)] == pytest.approx([loss for _, loss in steps(undisturbed)], rel=1e-5)
    sizes = [len(row["ranks"]) for row in rows(folder) if row["kind"] == "step"]
    assert (sizes[0], max(sizes), sizes[-1]) == (3, 5, 2)  # of a step that a change interrupted, not all may have told
    reasons = [row["reasons"] for row in rows(folder) if row["kind"] == "membership"]
    assert reasons == [["5 workers instead of 3"], ["2 workers instead of 5"]]


def test_a_scale_that_cannot_work_is_one_line(tmp_path: Path, folder: Path) -> None:
    assert smlt("train", write_task(tmp_path), *JOB, "--epochs", 1, cwd=tmp_path).returncode == 0
    for arguments, told in (
        (("run", "-n", 2), "run run is not under way (it is done): smlt resume run --workers 2"),
        (("run", "-n", 0), "--workers 0 is not positive"),
        (("run", "-n", 17), "17 workers cannot share a global batch of 16"),
    ):
        done = smlt("scale", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert told in done.stderr
    assert not (folder / "scale.json").exists()


# ---- a duplicate ----


def test_a_duplicate_of_a_worker_is_refused_and_changes_nothing(
    store: EmbeddedStore, tmp_path: Path, folder: Path, undisturbed: Path
) -> None:
    """An at-least-once invocation: the same configuration line, given to a second process."""
    script = write_task(tmp_path, PACED)
    with Running("train", script, *JOB, "--store", store.url, cwd=tmp_path, PACE="0.2") as run:
        at_step(run, 3)
        job = status(folder)["job"]
        coordination = Coordination(ParameterStore(store.url, job=job))
        plan = coordination.plan()
        assert plan is not None
        for worker_id, rank in plan.ranks.items():
            duplicate = invoked(WorkerConfig.from_json(configuration(store, folder, job, worker_id, rank)))
            assert duplicate.returncode == 4
            assert f"worker {worker_id} of job {job} is another process already: this duplicate ends" in duplicate.stderr
            assert "Traceback" not in duplicate.stderr
        assert coordination.plan() == plan
        run.let_go()
        assert run.finish() == 0
        assert run.errors.read_text() == ""
    same_end(folder, undisturbed)
    assert [row for row in rows(folder) if row["kind"] == "membership"] == []
    assert keys_of(store.url, "run") == []


def configuration(store: EmbeddedStore, folder: Path, job: str, worker_id: str, rank: int) -> str:
    values: dict[str, Any] = {"run": "run", "job": job, "rank": rank, "world_size": 3, "script": "tiny.py", "codec": "fp32"}
    values |= {"object_store_url": str(folder.parent), "epochs": 20, "global_batch_size": 16}
    return json.dumps({**values, "worker_id": worker_id, "store_url": store.url})


def invoked(config: WorkerConfig) -> subprocess.CompletedProcess[str]:
    """A worker process that is started by hand, as the executor starts it."""
    with subprocess.Popen(
        [sys.executable, "-m", "smlt.worker.main"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(config.to_json() + "\n")
        process.stdin.flush()  # and stays open: it is the life line
        code = process.wait(LIMIT_S)
        return subprocess.CompletedProcess([], code, process.stdout.read(), process.stderr.read())
