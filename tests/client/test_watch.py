"""`smlt watch`: a run as another terminal sees it, to its end, without disturbing it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commandline import HOLD, LIMIT_S, Running, environment, eventually, rows, same_end, smlt, status, write_task
from functions import FUNCTION, cloud

from smlt.client.following import Tail
from smlt.client.overview import POINTS_MAX, Curve, Overview
from smlt.client.runs import Run

JOB = ("--workers", 2, "--epochs", 10, "--global-batch-size", 16, "--codec", "fp32", "--json", "--name", "run")
HELD_STEP, LAST_STEP = 29, 40


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the job's run, in one piece."""
    folder = tmp_path_factory.mktemp("finished")
    assert smlt("train", write_task(folder, HOLD), *JOB, cwd=folder).returncode == 0
    return folder


@contextmanager
def held(folder: Path, *more: object, pace_s: float = 0) -> Iterator[Running]:
    """The job in `folder`, waiting in its step 30 for a file "go"; from then on a step takes `pace_s`."""
    settings = {"HOLD": str(folder), "PACE": str(pace_s)}
    with Running("train", write_task(folder, HOLD), *JOB, *more, cwd=folder, **settings) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == HELD_STEP)
        yield run


@contextmanager
def watching(folder: Path, *arguments: object, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """`smlt watch` in a process of its own; what it prints is in a pipe unless `more` says otherwise."""
    command = [sys.executable, "-m", "smlt", "watch", *map(str, arguments)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    process = subprocess.Popen(
        command, cwd=folder, env=environment(TERM="xterm", COLUMNS="100", LINES="40"), text=True, **streams
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def once(folder: Path, *arguments: object) -> dict[str, Any]:
    done = smlt("watch", *arguments, "--once", "--json", cwd=folder)
    value: dict[str, Any] = {"exit_code": done.returncode, **json.loads(done.stdout)}
    return value


def test_a_run_that_another_terminal_has_started_is_watched_to_its_end(tmp_path: Path, finished: Path) -> None:
    with held(tmp_path) as run, watching(tmp_path, "run", "--every", "0.05") as watch:
        assert watch.stdout is not None
        assert f"step {HELD_STEP}, loss" in watch.stdout.readline()
        (tmp_path / "go").touch()
        lines = watch.stdout.read().splitlines()
        assert (watch.wait(LIMIT_S), run.finish()) == (0, 0)
    assert "done" in lines
    assert lines[-1].startswith(f"run: done after {LAST_STEP} steps: accuracy")
    same_end(tmp_path / "smlt-runs" / "run", finished / "smlt-runs" / "run")  # it was not disturbed


def test_one_look_at_a_run_under_way_has_its_workers_and_how_far_they_are(tmp_path: Path) -> None:
    with held(tmp_path) as run:
        seen = once(tmp_path)
        text = smlt("watch", "--once", cwd=tmp_path).stdout
        (tmp_path / "go").touch()
        assert run.finish() == 0
    assert (seen["exit_code"], seen["run"], seen["state"], seen["step"]) == (0, "run", "running", HELD_STEP)
    assert (seen["epochs_done"], seen["epochs"]) == (7, 10)
    assert seen["part_done"] == pytest.approx((7 + 1 / 4) / 10)
    assert seen["left_s"] > 0
    assert seen["loss"] == next(event["loss"] for event in run.events if event.get("step") == HELD_STEP)
    assert [(one["rank"], one["state"], one["restarts"]) for one in seen["workers"]] == [(0, "training", 0), (1, "training", 0)]
    assert seen["cost_usd"] is None  # nothing is paid here
    for word in ("running", "on this machine", "72%", "epoch 8/10", "loss", "accuracy", "samples/s", "rank", "training"):
        assert word in text
    assert "\x1b" not in text


def test_events_as_json_are_those_from_now_on_and_the_end_is_the_last(tmp_path: Path) -> None:
    with held(tmp_path) as run, watching(tmp_path, "--json", "--every", "0.05") as watch:
        assert watch.stdout is not None
        first = json.loads(watch.stdout.readline())
        (tmp_path / "go").touch()
        events = [json.loads(line) for line in watch.stdout]
        assert (watch.wait(LIMIT_S), run.finish()) == (0, 0)
    assert (first["event"], first["run"], first["config"]["epochs"]) == ("watching", "run", 10)
    assert [one["step"] for one in events if one["event"] == "step"] == list(range(HELD_STEP + 1, LAST_STEP + 1))
    assert [one["epoch"] for one in events if one["event"] == "epoch"] == [7, 8, 9]
    assert sorted(one["rank"] for one in events if one["event"] == "worker_ended") == [0, 1]
    assert [one["state"] for one in events if one["event"] == "ended"] == ["done"]
    assert events[-1]["event"] == "ended"


def test_a_run_that_has_ended_is_shown_at_once(finished: Path) -> None:
    done = smlt("watch", cwd=finished)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith(f"run: done after {LAST_STEP} steps")
    seen = once(finished, finished / "smlt-runs" / "run")
    assert (seen["exit_code"], seen["state"], seen["part_done"], seen["workers"]) == (0, "done", 1.0, [])


def test_a_run_that_fails_is_seen_to_and_the_exit_code_says_so(tmp_path: Path) -> None:
    broken = HOLD + "        if number == 31:\n            raise ValueError('the data are damaged')\n"
    script = write_task(tmp_path, broken)
    with Running("train", script, *JOB, cwd=tmp_path, HOLD=str(tmp_path)) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == HELD_STEP)
        with watching(tmp_path, "--every", "0.05") as watch:
            assert watch.stdout is not None
            assert "running" in watch.stdout.readline()
            (tmp_path / "go").touch()
            said = watch.stdout.read()
            assert watch.wait(LIMIT_S) == 11
        assert run.finish() != 0
    assert "failed" in said
    assert "the data are damaged" in said.splitlines()[-1]
    assert once(tmp_path)["exit_code"] == 11


def test_a_run_that_is_stopped_and_one_whose_process_is_gone_have_exit_codes_of_their_own(tmp_path: Path) -> None:
    with held(tmp_path) as run:
        run.process.send_signal(signal.SIGINT)
        run.wait_for(lambda event: event["event"] == "stopping")
        (tmp_path / "go").touch()
        assert run.finish() == 130
    assert once(tmp_path)["exit_code"] == smlt("watch", cwd=tmp_path).returncode == 10
    (tmp_path / "go").unlink()
    with held(tmp_path, "--name", "gone") as run:
        run.process.kill()
        run.process.wait()
        seen = once(tmp_path, "gone")
        (tmp_path / "go").touch()
    assert (seen["exit_code"], seen["state"], seen["workers"]) == (12, "lost", [])
    assert "its process is gone" in smlt("watch", "gone", "--once", cwd=tmp_path).stdout


def test_ctrl_c_ends_the_watching_and_leaves_the_run_alone(tmp_path: Path) -> None:
    with held(tmp_path) as run:
        with watching(tmp_path) as watch:
            assert watch.stdout is not None
            watch.stdout.readline()
            watch.send_signal(signal.SIGINT)
            assert watch.wait(LIMIT_S) == 130
            assert watch.stderr is not None
            assert watch.stderr.read() == ""
        assert once(tmp_path)["state"] == "running"
        (tmp_path / "go").touch()
        assert run.finish() == 0


def test_who_reads_no_more_ends_the_watching_without_a_traceback(tmp_path: Path) -> None:
    with held(tmp_path) as run:
        with watching(tmp_path, "--json", "--every", "0.05") as watch:
            assert watch.stdout is not None
            watch.stdout.readline()
            watch.stdout.close()
            (tmp_path / "go").touch()
            assert watch.wait(LIMIT_S) == 141
            assert watch.stderr is not None
            assert watch.stderr.read() == ""
        assert run.finish() == 0


def test_on_a_terminal_the_frame_is_redrawn_in_place_and_the_cursor_comes_back(tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    shown = ""

    def read_until(word: str) -> bool:
        nonlocal shown
        try:
            shown += os.read(screen, 65536).decode(errors="replace")
        except OSError:  # the other side has closed
            return True
        return word in shown

    try:
        with held(tmp_path) as run, watching(tmp_path, "--every", "0.05", stdout=terminal) as watch:
            os.close(terminal)
            assert eventually(lambda: read_until("72%"))
            (tmp_path / "go").touch()
            assert eventually(lambda: read_until("\0"), LIMIT_S)
            assert (watch.wait(LIMIT_S), run.finish()) == (0, 0)
    finally:
        os.close(screen)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # hidden, shown again
    assert "\x1b[1A" in shown  # a line up: in place
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown[shown.rindex("\x1b[1A") :])
    assert "100%" in last
    assert f"step {LAST_STEP}" in last


def test_a_run_on_lambda_is_watched_as_one_here_with_what_it_has_cost_so_far(tmp_path: Path) -> None:
    script = write_task(tmp_path, "\n        time.sleep(0.1)\n")
    where = ("--workers", 2, "--epochs", 10, "--global-batch-size", 16, "--memory", 1024, "--name", "run")
    with cloud(script, seed=3) as deployed, deployed.running(script, *where, cwd=tmp_path) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == 12)
        seen = once(tmp_path)
        text = smlt("watch", "--once", cwd=tmp_path).stdout
        assert run.finish() == 0
        after = once(tmp_path)
    assert (seen["state"], len(seen["workers"])) == ("running", 2)
    assert seen["step"] >= 12
    age_s = sum(one["age_s"] for one in seen["workers"])
    assert seen["cost_usd"] == pytest.approx(age_s * 0.0000166667 + 2 * 0.2e-6, rel=0.1)  # 1 GB each; the time is x86's price
    assert f"Lambda, function {FUNCTION}" in text
    assert "USD so far" in text
    assert (after["state"], after["cost_usd"]) == ("done", status(tmp_path / "smlt-runs" / "run")["cost_usd"])


def test_what_cannot_be_watched_is_said_in_a_line(finished: Path, tmp_path: Path) -> None:
    for where, arguments, text in (
        (tmp_path, (), "there are no runs in smlt-runs"),
        (finished, ("nowhere",), "there is no run nowhere"),
        (finished, ("--every", "0"), "--every 0 is not between"),
    ):
        done = smlt("watch", *arguments, cwd=where)
        assert done.returncode not in (0, 10, 11, 12)
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1


# ---- the parts ----


def test_a_lost_worker_and_a_resumed_run_are_told_and_no_step_is_told_twice(tmp_path: Path) -> None:
    with held(tmp_path, pace_s=1) as run:
        overview = Overview(Run.open(tmp_path / "smlt-runs", "run"))
        overview.refresh()
        dict(run.workers())[1].kill()
        assert eventually(lambda: bool(overview.refresh()) and any("killed" in text for _, text in overview.events))
        (tmp_path / "go").touch()
        run.wait_for(lambda event: event["event"] == "step" and event["step"] > HELD_STEP)
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 130
    overview.refresh()
    assert overview.state == "stopped"
    assert overview.lives.restarts() == {1: 1}
    before = overview.step
    assert smlt("resume", "run", cwd=tmp_path).returncode == 0
    again = [row["step"] for event, row in overview.refresh() if event == "step"]
    overview.close()
    assert again == list(range(before + 1, LAST_STEP + 1))
    assert any("resumed with 2 workers" in text for _, text in overview.events)
    assert status(tmp_path / "smlt-runs" / "run")["state"] == "done"


def test_half_a_line_waits_for_its_other_half_and_a_file_in_anothers_place_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    tail = Tail(path)
    assert list(tail.lines()) == []
    with path.open("wb", buffering=0) as file:
        file.write(b"one\ntw")
        assert list(tail.lines()) == [b"one\n"]
        file.write(b"o\n")
        assert list(tail.lines()) == [b"two\n"]
    (tmp_path / "new").write_bytes(b"one\nthree\n")
    (tmp_path / "new").rename(path)
    assert list(tail.lines()) == [b"one\n", b"three\n"]
    assert tail.replaced == 1
    tail.close()


def test_a_curve_of_any_length_keeps_few_points_and_its_shape() -> None:
    curve = Curve()
    for value in range(100_000):
        curve.add(float(value))
    curve.add(float("nan"))
    assert POINTS_MAX <= len(curve.points) < 2 * POINTS_MAX
    assert curve.points == sorted(curve.points)
    assert curve.points[-1] > 99_000


def test_the_history_of_a_long_run_is_read_in_one_pass(tmp_path: Path, finished: Path) -> None:
    folder, short = tmp_path / "long", finished / "smlt-runs" / "run"
    folder.mkdir()
    for name in ("config.json", "status.json", "events.jsonl"):
        (folder / name).write_bytes((short / name).read_bytes())
    row = next(row for row in rows(short) if row["kind"] == "step")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps({**row, "step": step, "loss": None if step == 7 else 1 / step, "time": time.time()}) + "\n")
        file.write('{"kind": "step", "st')  # its writer is at it
    overview = Overview(Run.open(tmp_path, "long"))
    overview.refresh()
    overview.close()
    assert overview.step == 20_000
    assert overview.loss.last == 1 / 20_000
    assert len(overview.recent) == 50
