"""`smlt logs` of a run on this machine: all files as one, in the order of time, also while they grow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commandline import Running, environment, smlt, write_task

from smlt import cli
from smlt.client.logs import follow, logs, parse_since, reports
from smlt.client.policy import tail
from smlt.client.runs import Run
from smlt.errors import ConfigError
from smlt.worker.stamped import stamp


def made_run(folder: Path, state: str = "done", **files: str) -> Run:
    run = Run.create(folder / "smlt-runs", Path("task.py"), {"workers": 2, "epochs": 9}, "run")
    run.write_status(state=state, pid=os.getpid(), started=100.0)
    for name, text in files.items():
        run.log_path(name.replace("_", "-")).write_text(text)
    return run


def lines_of(*moments: tuple[float, str]) -> str:
    return "".join(f"{stamp(at)} {text}\n" for at, text in moments)


def test_lines_of_all_workers_and_the_store_come_in_the_order_of_time(tmp_path: Path) -> None:
    day = time.strftime("%d", time.localtime(1767367800))
    clock = time.strftime("%H:%M:%S", time.localtime(1767367800))
    run = made_run(
        tmp_path,
        worker_0=lines_of((1767367799.0, "first"), (1767367801.0, "third")),
        worker_1=f"printed by C\n{lines_of((1767367800.5, 'second'))}of C again\n  \n{lines_of((1767367802, 'fourth'))}cut",
        store=f"77:M {day} Jan 2026 {clock}.250 * Ready\nno time\n77:M 99 Foo 2026 {clock}.250 * odd\n",
    )
    assert [(line.worker, line.text) for line in logs(run)] == [
        ("worker-1", "printed by C"),  # of the time when the run began
        ("worker-0", "first"),
        ("store", f"77:M {day} Jan 2026 {clock}.250 * Ready"),
        ("store", "no time"),
        ("store", f"77:M 99 Foo 2026 {clock}.250 * odd"),
        ("worker-1", "second"),
        ("worker-1", "of C again"),
        ("worker-1", "  "),
        ("worker-0", "third"),
        ("worker-1", "fourth"),
        ("worker-1", "cut"),
    ]
    assert [line.text for line in logs(run, worker=0)] == ["first", "third"]
    assert [line.text for line in logs(run, since=1767367801.5)] == ["fourth", "cut"]
    assert list(logs(run, worker=7)) == []
    assert list(reports(run)) == []


def test_bytes_that_are_no_text_and_lines_of_megabytes_are_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    run.log_path("worker-0").write_bytes(b"\xff\xfe\n" + b"x" * 3_000_000 + b"\nend\r\n")
    assert [len(line.text) for line in logs(run)] == [2, 3_000_000, 3]


def test_following_reads_new_lines_and_new_files_until_the_run_ends(tmp_path: Path) -> None:
    run = made_run(tmp_path, "running", worker_0=lines_of((1.0, "a")) + "1970-01-01T00:00:03.000Z ha")
    lines = follow(run)
    with run.hold():
        assert next(lines).text == "a"
        with run.log_path("worker-0").open("a") as file:
            file.write("lf\n")
        line = next(lines)
        assert (line.text, line.time) == ("half", 3.0)  # only when it was complete
        run.log_path("worker-1").write_text(lines_of((5.0, "new")) + "unfinished")
        assert next(lines).text == "new"
        run.write_status(state="done")
    assert [line.text for line in lines] == ["unfinished"]


def test_following_a_run_whose_process_is_gone_ends(tmp_path: Path) -> None:
    run = made_run(tmp_path, "running", worker_0="a\n")
    assert [line.text for line in follow(run)] == ["a"]


def test_since_is_an_age_or_a_time() -> None:
    assert parse_since("90s", now=1000.0) == 910.0
    assert parse_since("2h", now=10_000.0) == 2800.0
    assert parse_since("2026-01-02T15:30:00Z") == 1767367800.0
    assert parse_since("2026-01-02T15:30:00") == 1767367800.0
    assert parse_since("2026-01-02T16:30:00+01:00") == 1767367800.0
    for wrong in ("", "x", "5", "5 m", "-5m", "9999999999d"):
        with pytest.raises(ConfigError, match="--since"):
            parse_since(wrong)


def test_the_command_prefixes_lines_by_worker_and_prints_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["smlt", "logs", *arguments, "--runs-dir", str(tmp_path / "smlt-runs")])
        return cli.run(), *capsys.readouterr()

    made_run(tmp_path, worker_0=lines_of((1.5, "é [bold]x")), store="s\n")
    assert command("run") == (0, "worker-0 | é [bold]x\nstore | s\n", "")
    row = {"time": "1970-01-01T00:00:01.500Z", "worker": "worker-0", "text": "é [bold]x"}
    code, out, _ = command("run", "--json", "--worker", "0")
    assert (code, json.loads(out)) == (0, row)
    assert command("run", "--since", "1h") == (0, "", "")
    code, _, said = command("none")
    assert code == 6
    assert said.startswith("smlt: there is no run none")
    assert command("run", "--since", "soon")[0] == 2


def test_following_ends_quietly_on_ctrl_c_and_when_its_reader_goes(tmp_path: Path) -> None:
    run = made_run(tmp_path, "running", worker_0="a\n" * 20_000)
    command = [sys.executable, "-m", "smlt", "logs", "run", "--follow"]
    for signal_it in (True, False):
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline() == b"worker-0 | a\n"
            if signal_it:
                process.send_signal(signal.SIGINT)
            else:
                process.stdout.close()
            told = process.stderr.read()
            assert process.wait(20) == (130 if signal_it else 141)
            assert told == b""
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
    assert run.path.is_dir()


def test_a_run_is_followed_from_beginning_to_end(tmp_path: Path) -> None:
    script = write_task(tmp_path, '\n        print("step", number)\n        print("half", end="")\n        print(" line")\n')
    job = ("--workers", 2, "--epochs", 3, "--global-batch-size", 16, "--name", "run", "--json")
    with Running("train", script, *job, cwd=tmp_path) as training:
        training.wait_for(lambda event: event["event"] == "started")
        shown = smlt("logs", "run", "--follow", "--json", cwd=tmp_path)
        assert training.finish() == 0
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert (shown.returncode, shown.stderr) == (0, "")
    for rank in range(2):
        texts = [row["text"] for row in rows if row["worker"] == f"worker-{rank}"]
        assert [text for text in texts if text.startswith("step")] == [f"step {number}" for number in range(1, 13)]
        assert texts.count("half line") == 12
    assert {row["worker"] for row in rows} == {"worker-0", "worker-1", "store"}
    again = list(logs(Run.open(tmp_path / "smlt-runs", "run")))
    assert sorted(line.text for line in again) == sorted(row["text"] for row in rows)
    assert [line.time for line in again] == sorted(line.time for line in again)


def test_the_end_of_a_log_is_shown_without_times(tmp_path: Path) -> None:
    run = made_run(tmp_path, worker_0=lines_of(*((float(n), f"line {n}") for n in range(20))) + "of C\n")
    assert tail(run.log_path("worker-0"), 3) == "line 18\nline 19\nof C"
