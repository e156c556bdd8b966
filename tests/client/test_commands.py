"""The command line around training: help, runs, status, doctor, and what it says to wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import LIMIT_S, environment, smlt, write_task

import smlt as package
from smlt import cli
from smlt.client.runs import Run


def made_run(folder: Path, name: str, state: str, pid: int = 0, **more: object) -> Run:
    run = Run.create(folder / "smlt-runs", Path("task.py"), {"script": "task.py", "workers": 2, "epochs": 9}, name)
    run.write_status(state=state, pid=pid, started=100.0, ended=107.5, epoch=3, step=12, **more)
    return run


Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """Run `smlt` within this process, where many short commands take a tenth of the time."""
    kept = environment()
    for name in list(os.environ):
        if name not in kept or name.startswith("AWS_"):  # fixtures of a whole session may have set these
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["smlt", *arguments])
        capfd.readouterr()
        try:
            code = cli.run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return run


@pytest.mark.parametrize(
    "command",
    [
        *("train", "resume", "scale", "stop", "status", "runs", "bill", "logs", "deploy", "destroy", "policy"),
        *("launch", "doctor", "acl", "lambda-local"),
    ],
)
def test_each_command_has_help_with_examples(here: Here, command: str) -> None:
    shown = here(command, "--help")
    assert shown.returncode == 0
    assert "Examples:" in shown.stdout
    assert f"\n    smlt {command}" in shown.stdout
    assert "\b" not in shown.stdout


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert smlt("--version", cwd=tmp_path).stdout == f"smlt {package.__version__}\n"


def test_runs_lists_every_run_with_its_state(tmp_path: Path) -> None:
    assert smlt("runs", cwd=tmp_path).stdout == "no runs in smlt-runs\n"
    long = "a-name-that-is-rather-long-but-still-allowed-000"
    made_run(tmp_path, long, "done", metrics={"accuracy": 0.97})
    two = made_run(tmp_path, "two", "running", pid=os.getpid())
    made_run(tmp_path, "three", "running", pid=os.getpid())  # nobody holds it: the number is another process's by now
    (made_run(tmp_path, "four", "done").path / "status.json").unlink()
    with two.hold():
        lines = [line.split() for line in smlt("runs", cwd=tmp_path).stdout.splitlines()]
        rows = [json.loads(line) for line in smlt("runs", "--json", cwd=tmp_path).stdout.splitlines()]
    assert lines[0] == ["run", "state", "workers", "epoch", "step", "metrics"]
    assert lines[1] == [long, "done", "2", "3/9", "12", "accuracy", "0.9700"]  # not cut to a terminal's width
    assert {line[0]: line[1] for line in lines[2:]} == {"two": "running", "three": "lost", "four": "incomplete"}
    assert {row["run"]: row["state"] for row in rows} == {
        long: "done",
        "two": "running",
        "three": "lost",
        "four": "incomplete",
    }


def test_status_shows_a_run_and_how_to_go_on_with_it(tmp_path: Path) -> None:
    made_run(tmp_path, "one", "failed", error="TaskError: worker 1 failed\n\nTraceback ...", metrics={"accuracy": 0.5})
    shown = smlt("status", cwd=tmp_path).stdout  # the latest
    for part in ("run      one", "state    failed", "epoch 3 of 9, step 12", "accuracy 0.5000", "7.5 s", "worker 1 failed"):
        assert part in shown, part
    assert "Traceback" not in shown
    assert "smlt resume one" in shown
    row = json.loads(smlt("status", "smlt-runs/one", "--json", cwd=tmp_path).stdout)
    assert (row["run"], row["state"], row["config"]["workers"]) == ("one", "failed", 2)


def test_a_running_run_cannot_be_resumed(tmp_path: Path) -> None:
    run = made_run(tmp_path, "busy", "running", pid=os.getpid())
    for command in (("train", "--resume", "busy"), ("resume", "busy")):
        with run.hold():
            done = smlt(*command, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, f"smlt: run busy is still running (process {os.getpid()})\n")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("train", 2, "give a SCRIPT, or --resume RUN"),
        ("train t.py --workers 0", 2, "--workers 0 is not positive"),
        ("train t.py --epochs many", 2, "--epochs"),
        ("train t.py --workers 9 --global-batch-size 8", 2, "9 workers cannot share a global batch of 8"),
        ("train t.py --codec fp8", 2, "unknown codec 'fp8'; known: fp32, fp16"),
        ("train t.py --seed -1", 2, "--seed -1"),
        ("train t.py --bucket-mb -1", 2, "--bucket-mb -1"),
        ("train t.py --workers 8 --store-window 0.5", 2, "at least 968016 bytes (0.97 MB)"),
        ("train t.py --workers 2 --store-window -1", 2, "a store window of -1 MB"),
        ("train t.py --timeout 0", 2, "--timeout 0"),
        ("train t.py --memory 0", 2, "--memory 0"),
        ("train t.py --target-accuracy 97", 2, "not between 0 and 1"),
        ("train t.py --name a/b", 2, "run name 'a/b'"),
        ("train t.py --object-store s3://bucket", 3, "no AWS credentials: set AWS_PROFILE"),
        ("train t.py --object-store ftp://host/path", 2, "give a directory"),
        ("train t.py --on moon", 2, "--on 'moon': choose one of local, lambda"),
        ("train t.py --on lambda", 2, "no AWS region: set AWS_REGION, or give --region"),
        ("stop x", 6, "there is no run x"),
        ("train t.py --store http://host", 2, "redis://, rediss://, unix://"),
        ("train t.py --data nowhere", 5, "no such folder"),
        ("train t.py --wrong", 2, "--wrong"),
        ("train t.py --on-failure panic", 2, "--on-failure 'panic': choose one of restart, shrink, stop"),
        ("train t.py --liveness 0", 2, "--liveness 0"),
        ("train t.py --time-limit -1", 2, "--time-limit -1"),
        ("train t.py --max-restarts -1", 2, "--max-restarts -1 is negative"),
        ("train t.py --spares -1", 2, "--spares -1 is negative"),
        ("train t.py --replace-stragglers 1", 2, "--replace-stragglers 1"),
        ("train t.py --keep-checkpoints 0", 2, "--keep-checkpoints 0 is not positive"),
        ("train t.py --resume x", 2, "give no SCRIPT, --data or --name"),
        ("train --resume x", 6, "there is no run x"),
        ("resume x", 6, "there is no run x"),
        ("scale x -n 3", 6, "there is no run x"),
        ("status x", 6, "there is no run x"),
        ("status", 6, "there are no runs"),
        ("launch -n 0 t.py", 2, "--workers 0"),
        ("launch none.py", 5, "there is no script none.py"),
        ("teach", 2, "teach"),
    ],
)
def test_what_cannot_work_is_one_line_and_an_exit_code(
    here: Here, tmp_path: Path, arguments: str, code: int, told: str
) -> None:
    write_task(tmp_path, name="t.py")
    done = here(*arguments.split())
    assert done.returncode == code
    assert done.stderr.startswith("smlt: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert done.stdout == ""


def test_a_name_that_is_taken_and_a_resume_that_changes_the_sample_order_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path, name="t.py")
    made_run(tmp_path, "mine", "stopped")
    taken = smlt("train", "t.py", "--name", "mine", cwd=tmp_path)
    assert (taken.returncode, "resume it with --resume mine" in taken.stderr) == (2, True)
    other = smlt("train", "--resume", "mine", "--seed", 5, cwd=tmp_path)
    assert (other.returncode, "keeps the run's seed (0)" in other.stderr) == (2, True)


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    done = smlt("status", "x", cwd=tmp_path, SMLT_DEBUG="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_a_missing_typer_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from smlt.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 2
    assert done.stderr == "smlt: the command line needs typer: pip install 'smlt[train]'\n"
