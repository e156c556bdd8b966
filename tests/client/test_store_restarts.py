"""A store that dies, comes back empty or forgets everything costs time, and not a bit of the result."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from commandline import (
    HOLD,
    PACED,
    Running,
    all_gone,
    eventually,
    keys_of,
    rows,
    same_end,
    smlt,
    status,
    steps,
    write_task,
)

from smlt.store.embedded import EmbeddedStore

JOB = ("--workers", 3, "--epochs", 10, "--global-batch-size", 16, "--codec", "fp32", "--json", "--name", "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the job with a store that stays."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert smlt("train", write_task(folder), *JOB, cwd=folder).returncode == 0
    return folder / "smlt-runs" / "run"


@pytest.fixture
def own() -> Iterator[EmbeddedStore]:
    """An external store, as far as the run knows."""
    with EmbeddedStore() as server:
        yield server


def at_step(run: Running, number: int) -> None:
    run.wait_for(lambda event: event["event"] == "step" and event["step"] >= number)


def goes_on(run: Running) -> dict[str, Any]:
    return run.wait_for(lambda event: event["event"] == "membership")


def die(server: EmbeddedStore) -> None:
    os.kill(server.pid, signal.SIGKILL)
    assert eventually(lambda: not server.alive)


def server_of(run: Running) -> psutil.Process:
    """The embedded store's server, which its guard watches."""
    guards = [process for process in run.descendants() if "smlt-store-guard" in process.cmdline()]
    found = [process for guard in guards for process in guard.children() if "server" in process.name()]
    (server,) = found
    return server


def test_an_embedded_store_that_is_killed_is_started_again_as_often_as_it_takes(tmp_path: Path, undisturbed: Path) -> None:
    script = write_task(tmp_path, PACED)
    seen: list[psutil.Process] = []
    with Running("train", script, *JOB, cwd=tmp_path, PACE="0.1") as run:
        for number in (3, 15, 27):
            at_step(run, number)
            seen += run.descendants()
            server_of(run).kill()
            run.wait_for(lambda event: event["event"] == "warning")
            assert goes_on(run)["reasons"][0].startswith(("the store has lost its data", "rank"))
        seen += run.descendants()
        run.let_go()
        assert run.finish() == 0
        assert run.errors.read_text() == ""
    folder = tmp_path / "smlt-runs" / "run"
    same_end(folder, undisturbed)
    assert status(folder)["restarts"] == 0
    warnings = [event["text"] for event in run.events if event["event"] == "warning"]
    assert warnings == ["the embedded store has died and is started again"] * 3
    assert all_gone(seen)


def forgets(server: EmbeddedStore) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


def comes_back_empty(server: EmbeddedStore) -> None:
    die(server)
    server.restart()


@pytest.mark.parametrize("disturb", [forgets, comes_back_empty])
def test_an_external_store_may_lose_its_data_in_mid_run(
    own: EmbeddedStore, tmp_path: Path, undisturbed: Path, disturb: Callable[[EmbeddedStore], None]
) -> None:
    script = write_task(tmp_path, PACED)
    with Running("train", script, *JOB, "--store", own.url, cwd=tmp_path, PACE="0.1") as run:
        processes = run.descendants()
        for number in (2, 13, 22):
            at_step(run, number)
            disturb(own)
            goes_on(run)
        run.let_go()
        assert run.finish() == 0
        assert run.errors.read_text() == ""
    folder = tmp_path / "smlt-runs" / "run"
    same_end(folder, undisturbed)
    assert status(folder)["restarts"] == 0
    assert any("the store has lost its data" in str(row["reasons"]) for row in rows(folder) if row["kind"] == "membership")
    assert keys_of(own.url, "run") == []
    assert all_gone(processes)


def test_a_worker_may_die_while_the_store_is_away(own: EmbeddedStore, tmp_path: Path, undisturbed: Path) -> None:
    script = write_task(tmp_path, PACED)
    with Running("train", script, *JOB, "--store", own.url, cwd=tmp_path, PACE="0.02") as run:
        at_step(run, 9)
        processes = run.descendants()
        die(own)
        dict(run.workers())[2].kill()
        own.restart()
        assert 2 in goes_on(run)["lost_ranks"]
        assert run.finish() == 0
        assert run.errors.read_text() == ""
    same_end(tmp_path / "smlt-runs" / "run", undisturbed)
    assert keys_of(own.url, "run") == []
    assert all_gone(processes)


def test_a_request_to_stop_outlives_a_store_that_lost_it(own: EmbeddedStore, tmp_path: Path, undisturbed: Path) -> None:
    script = write_task(tmp_path, HOLD)
    with Running("train", script, *JOB, "--store", own.url, cwd=tmp_path, HOLD=str(tmp_path)) as run:
        at_step(run, 29)
        run.process.send_signal(signal.SIGINT)
        run.wait_for(lambda event: event["event"] == "stopping")
        comes_back_empty(own)
        (tmp_path / "go").touch()
        assert run.finish() == 130
    folder = tmp_path / "smlt-runs" / "run"
    assert status(folder)["state"] == "stopped"
    assert status(folder)["checkpoint_step"] == status(folder)["step"] < 40
    assert keys_of(own.url, "run") == []
    assert smlt("resume", "run", "--store", own.url, cwd=tmp_path).returncode == 0
    same_end(folder, undisturbed)


def test_a_store_that_never_comes_back_ends_the_run_and_every_worker(own: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path, PACED)
    with Running("train", script, *JOB, "--store", own.url, "--timeout", 2, cwd=tmp_path, PACE="0.02") as run:
        at_step(run, 6)
        processes = run.descendants()
        die(own)
        assert run.finish() == 3
        told = run.errors.read_text()
    assert told.startswith("smlt: the store at ")
    assert told.count("\n") == 1
    assert told.endswith("gave up after 2 s\n")
    assert all_gone(processes)
    end = status(tmp_path / "smlt-runs" / "run")
    assert end["state"] == "failed"
    assert [number for number, _ in steps(tmp_path / "smlt-runs" / "run")][-1] == end["step"]


def test_a_run_that_its_store_has_ended_resumes_to_the_same_bits(own: EmbeddedStore, tmp_path: Path, undisturbed: Path) -> None:
    script = write_task(tmp_path, PACED)
    with Running("train", script, *JOB, "--store", own.url, "--timeout", 1, cwd=tmp_path, PACE="0.02") as run:
        at_step(run, 10)
        die(own)
        assert run.finish() == 3
    own.restart()
    done = smlt("resume", "run", "--store", own.url, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    same_end(tmp_path / "smlt-runs" / "run", undisturbed)
