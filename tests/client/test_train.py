"""`smlt train`: whole jobs by command line, with real workers and a real store."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import LIMIT_S, REPOSITORY, environment, keys_of, parameters, rows, smlt, status, steps, write_task

from smlt.store.embedded import EmbeddedStore


def test_four_workers_train_the_digits_and_leave_a_run_folder_and_no_key(store: EmbeddedStore, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    script = REPOSITORY / "examples" / "digits.py"
    done = smlt("train", script, "--workers", 4, "--epochs", 25, "--store", store.tcp_url, "--name", "digits", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout  # piped: no escape codes
    assert done.stdout.splitlines()[0].startswith("run digits: 4 workers")
    assert sum(line.startswith("epoch ") for line in done.stdout.splitlines()) >= 25

    run = tmp_path / "smlt-runs" / "digits"
    end = status(run)
    assert (end["state"], end["epoch"], end["step"]) == ("done", 25, 25 * 23)
    assert end["metrics"]["accuracy"] >= 0.97
    assert [number for number, _ in steps(run)] == list(range(1, 25 * 23 + 1))
    assert all(len(row["compute_s"]) == len(row["communication_s"]) == 4 for row in rows(run) if row["kind"] == "step")
    epochs = [row for row in rows(run) if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs] == list(range(25))
    assert rows(run)[23] == epochs[0]  # behind the last step of its epoch, whichever worker reports first
    assert {path.name for path in (run / "logs").iterdir()} == {f"worker-{rank}.log" for rank in range(4)}
    assert (run / "code" / "digits.py").read_bytes() == script.read_bytes()
    assert len(list((run / "checkpoints").iterdir())) == 3
    assert keys_of(store.url, "digits") == []


def test_json_output_is_json_lines_and_nothing_else_and_holds_no_password(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path, '\n        print("from the task", number)\n')
    done = smlt(
        *("train", script, "--workers", 3, "--epochs", 2, "--global-batch-size", 16, "--name", "lines", "--json"),
        cwd=tmp_path,
        SMLT_STORE=store.tcp_url,
    )
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["started", *["step"] * 4, "epoch", *["step"] * 4, "epoch", "ended"]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 9))
    assert events[-1]["state"] == "done"
    assert "from the task 8" in (tmp_path / "smlt-runs/lines/logs/worker-0.log").read_text()
    password = store.tcp_url.split(":")[2].partition("@")[0]
    for path in (tmp_path / "smlt-runs").rglob("*"):
        assert path.is_dir() or password.encode() not in path.read_bytes(), path
    assert password not in done.stdout
    assert keys_of(store.url, "lines") == []


def test_two_runs_of_the_same_job_end_with_the_same_bits(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    for name in ("first", "second"):  # no --store: the embedded one
        done = smlt("train", script, "-n", 3, "--epochs", 3, "--global-batch-size", 16, "--name", name, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    first, second = (tmp_path / "smlt-runs" / name for name in ("first", "second"))
    assert steps(first) == steps(second)
    assert parameters(first) == parameters(second)
    assert (first / "logs" / "store.log").is_file()


def test_training_ends_at_the_target_accuracy(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    done = smlt(
        *("train", script, "--workers", 1, "--epochs", 200, "--global-batch-size", 16, "--target-accuracy", 0.9),
        *("--name", "target"),
        cwd=tmp_path,
    )
    assert done.returncode == 0
    end = status(tmp_path / "smlt-runs" / "target")
    assert end["state"] == "done"
    assert end["epoch"] < 200
    assert end["metrics"]["accuracy"] >= 0.9


def test_data_and_modules_beside_the_script_reach_the_workers(tmp_path: Path) -> None:
    code = tmp_path / "code"
    (code / "parts").mkdir(parents=True)
    (code / "sizes.py").write_text("from parts.scale import SCALE\n")
    (code / "parts" / "scale.py").write_text("SCALE = 7\n")
    script = write_task(
        code, '\n        import sizes\n        print("scale", sizes.SCALE, (self.data_dir / "a/b.txt").read_text())\n'
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("content")
    done = smlt(
        *("train", script, "--workers", 2, "--epochs", 1, "--global-batch-size", 16, "--data", ".", "--name", "parts"),
        *("--object-store", tmp_path / "objects"),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "scale 7 content" in (tmp_path / "smlt-runs/parts/logs/worker-1.log").read_text()
    stored = {path.name for path in (tmp_path / "objects" / "parts").iterdir()}
    assert stored == {"code", "data", "checkpoints"}  # the object store that was asked for, not the run folder
    assert not (tmp_path / "objects" / "parts" / "data" / "smlt-runs").exists()


def test_a_terminal_shows_a_live_view_of_every_worker(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "smlt", "train", str(script), "-n", "2", "--epochs", "3", "--global-batch-size", "16"],
        cwd=tmp_path,
        env=environment(TERM="xterm", COLUMNS="100"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # Linux says so when the other side has closed
                break
            if not piece:
                break
            shown += piece
        os.close(master)
        assert process.wait(LIMIT_S) == 0
    text = shown.decode()
    assert "\x1b[" in text
    for part in ("epoch 3/3", "step 12", "communication ms", "accuracy", "done after 12 steps"):
        assert part in text, part
