"""`smlt watch`: a run of another terminal, looked at from its folder: live, in lines, as events, once; and never disturbed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from commandline import HOLD, PACED, Running, environment, eventually, smlt, status, write_task

FAILING = """
        if number == 6:
            raise ValueError("the sixth batch is bad")
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Running]:
    """A run under way that stands at its step 30 until the file hold/go is there."""
    (tmp_path / "hold").mkdir()
    script = write_task(tmp_path, HOLD)
    arguments = ("train", script, "--workers", 2, "--global-batch-size", 16, "--epochs", 10, "--name", "held", "--json")
    with Running(*arguments, cwd=tmp_path, HOLD=str(tmp_path / "hold")) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] >= 20)
        yield run


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is done and one that has failed."""
    folder = tmp_path_factory.mktemp("ended")
    assert smlt("train", write_task(folder), "--workers", 2, "--epochs", 3, "--name", "good", cwd=folder).returncode == 0
    bad = write_task(folder, FAILING, name="bad.py")
    assert (
        smlt("train", bad, "--workers", 2, "--global-batch-size", 16, "--epochs", 3, "--name", "bad", cwd=folder).returncode
        != 0
    )
    return folder


def watching(*arguments: object, cwd: Path, **streams: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "smlt", "watch", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environment(TERM="xterm", COLUMNS="100", LINES="40"), **streams)


def test_a_run_of_another_terminal_is_told_line_by_line_without_control_codes_until_it_ends(
    held: Running, tmp_path: Path
) -> None:
    with watching("held", "--every", 0.05, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        first = watch.stdout.readline().decode()
        assert first.startswith("held running: epoch ")
        (tmp_path / "hold/go").touch()
        rest, errors = watch.communicate(timeout=60)
    assert held.finish() == 0
    assert (watch.returncode, errors) == (0, b"")
    lines = rest.decode().splitlines()
    assert lines[-1].startswith("held: done after 40 steps")
    assert any("epoch 10/10" in line for line in lines)
    assert b"\x1b" not in rest
    assert b"\r" not in rest


def test_events_come_as_json_lines_the_first_and_the_last_say_where_it_stands(held: Running, tmp_path: Path) -> None:
    with watching("held", "--json", "--every", 0.05, cwd=tmp_path, stdout=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        events = [json.loads(watch.stdout.readline())]
        (tmp_path / "hold/go").touch()
        events += [json.loads(line) for line in watch.communicate(timeout=60)[0].splitlines()]
    assert held.finish() == 0
    assert (events[0]["event"], events[0]["status"]["state"]) == ("watching", "running")
    assert (events[-1]["event"], events[-1]["state"]) == ("ended", "done")
    seen = [event["step"] for event in events if event["event"] == "step"]
    assert seen == list(range(seen[0], 41))  # each once, in order


def test_one_frame_shows_the_workers_by_rank_and_ends_while_the_run_goes_on(held: Running, tmp_path: Path) -> None:
    done = smlt("watch", "held", "--once", cwd=tmp_path, COLUMNS="100")
    assert (done.returncode, done.stderr) == (0, "")
    assert "held  running" in done.stdout
    assert "training" in done.stdout
    assert "\x1b" not in done.stdout
    row = json.loads(smlt("watch", "held", "--once", "--json", cwd=tmp_path).stdout)
    assert [(worker["rank"], worker["state"], worker["restarts"]) for worker in row["workers"]] == [
        (0, "training", 0),
        (1, "training", 0),
    ]
    assert (row["state"], row["epochs"]) == ("running", 10)
    assert row["step"] >= 20
    assert held.process.poll() is None


def test_ctrl_c_ends_the_watching_in_a_terminal_and_not_the_run(held: Running, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with watching("held", "--every", 0.05, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs) as watch:
        os.close(theirs)
        shown = b""
        while b"samples/s" not in shown:
            shown += os.read(ours, 65536)
        watch.send_signal(signal.SIGINT)
        with suppress(OSError):  # Linux: the other end is closed
            while more := os.read(ours, 65536):
                shown += more
        watch.wait(30)
    os.close(ours)
    assert b"\x1b[?25l" in shown  # redrawn in place, the cursor hidden ...
    assert b"\x1b[?25h" in shown  # ... and shown again at the end
    assert b"Traceback" not in shown
    assert held.process.poll() is None
    assert status(tmp_path / "smlt-runs/held")["state"] == "running"
    (tmp_path / "hold/go").touch()
    assert held.finish() == 0


def test_a_worker_that_is_killed_is_seen_as_lost_and_its_rank_as_started_again(tmp_path: Path) -> None:
    script = write_task(tmp_path, PACED)
    arguments = ("train", script, "--workers", 2, "--global-batch-size", 16, "--epochs", 20, "--name", "hurt", "--json")
    with Running(*arguments, cwd=tmp_path, PACE="0.05") as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] >= 3)
        dict(run.workers())[1].kill()
        run.wait_for(lambda event: event["event"] == "membership" and event["lost_ranks"])

        def again() -> bool:
            workers = json.loads(smlt("watch", "hurt", "--once", "--json", cwd=tmp_path).stdout)["workers"]
            return (1, "training", 1) in [(one["rank"], one["state"], one["restarts"]) for one in workers]

        assert eventually(again)
        assert "worker 1 was killed by signal 9" in smlt("watch", "--once", cwd=tmp_path, COLUMNS="120").stdout
        run.let_go()
        assert run.finish() == 0


def test_a_run_that_is_done_is_shown_at_once_and_the_exit_code_says_so(ended: Path) -> None:
    for options in ((), ("--once",), ("--json",)):
        done = smlt("watch", "good", *options, cwd=ended)
        assert (done.returncode, done.stderr) == (0, "")
        assert "done" in done.stdout


def test_a_run_that_has_failed_says_why_and_the_exit_code_is_11(ended: Path) -> None:
    for options in ((), ("--once",), ("--json",)):
        done = smlt("watch", "bad", *options, cwd=ended)
        assert done.returncode == 11
        assert "the sixth batch is bad" in done.stdout


def test_what_cannot_be_watched_is_refused_in_a_line(ended: Path) -> None:
    for arguments, words in ((("nowhere",), "there is no run nowhere"), (("good", "--every", 0), "--every 0 is not between")):
        done = smlt("watch", *arguments, cwd=ended)
        assert done.returncode not in (0, 1, 11)
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
