"""Training by Lithops' localhost backend and by Ray: the bits of local workers, whatever happens to calls and tasks.

Both are large, so they have an environment of their own: `.ci/executors`.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commandline import (
    PACED,
    REPOSITORY,
    Running,
    all_gone,
    eventually,
    keys_of,
    rows,
    same_end,
    smlt,
    status,
    write_task,
)

from smlt.store.embedded import EmbeddedStore

ENGINES = ("lithops", "ray")
DIGITS = (REPOSITORY / "examples" / "digits.py", "--workers", 2, "--epochs", 5)
JOB = ("--workers", 2, "--epochs", 15, "--global-batch-size", 16, "--codec", "fp32")
#: The first worker to come so far is ended by its own hand.
DIES = (
    PACED + '\n        if number == 5 and one_worker(os.environ["FOLDER"]):\n            os.kill(os.getpid(), signal.SIGKILL)\n'
)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def digits(folder: Path) -> Path:
    pytest.importorskip("torch")
    done = smlt("train", *DIGITS, "--name", "digits", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "smlt-runs" / "digits"


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Path:
    assert smlt("train", write_task(folder), *JOB, "--name", "tiny", cwd=folder).returncode == 0
    return folder / "smlt-runs" / "tiny"


def test_digits_are_trained_to_the_bits_of_local_workers(engine: str, digits: Path, tmp_path: Path) -> None:
    done = smlt("train", *DIGITS, "--on", engine, "--name", "digits", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    same_end(tmp_path / "smlt-runs" / "digits", digits)
    assert all("event" in json.loads(line) for line in done.stdout.splitlines())  # the engine prints nothing
    assert (tmp_path / "smlt-runs" / "digits" / "logs" / f"{engine}.log").stat().st_size > 0


def test_workers_and_calls_that_die_are_replaced_and_a_run_that_is_interrupted_goes_on(
    engine: str, tiny: Path, store: EmbeddedStore, tmp_path: Path
) -> None:
    script, where = write_task(tmp_path, DIES), ("--store", store.url)
    more = {"FOLDER": str(tmp_path), "PACE": "0.05"}
    with Running("train", script, *JOB, "--on", engine, *where, "--name", "rough", "--json", cwd=tmp_path, **more) as run:
        run.wait_for(lambda event: event["event"] == "membership" and event["lost_ranks"] != [])  # one has killed itself
        run.wait_for(lambda event: event["event"] == "step" and event["step"] >= 15)
        next(callers(run)).kill()  # what the engine runs: its worker goes with it, and no other
        run.wait_for(lambda event: event["event"] == "membership" and event["lost_ranks"] != [])
        run.wait_for(lambda event: event["event"] == "step" and event["step"] >= 30)
        processes = run.descendants()
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 130
        assert all_gone(processes)
    folder = tmp_path / "smlt-runs" / "rough"
    assert (status(folder)["state"], status(folder)["restarts"]) == ("stopped", 2)
    assert keys_of(store.url, "rough") == []
    assert eventually(lambda: not list(workers_of("rough")))
    done = smlt("resume", "rough", *where, cwd=tmp_path, FOLDER=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    same_end(folder, tiny)
    assert [row["lost_ranks"] != [] for row in rows(folder) if row["kind"] == "membership"] == [True, True]
    assert keys_of(store.url, "rough") == []


def callers(run: Running) -> Iterator[psutil.Process]:
    """The processes in which the engine has called for workers."""
    for process in run.descendants():
        with contextlib.suppress(psutil.Error):
            if "smlt.worker.main" in process.cmdline():
                yield process.parent()


def workers_of(name: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "smlt.worker.main" in process.cmdline() and any(name in file.path for file in process.open_files()):
                yield process
