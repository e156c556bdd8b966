"""What a person tries on the first day, and what the program must then say or do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import REPOSITORY, Running, smlt, status, write_task


def test_a_pipe_that_closes_stops_the_run_in_order_with_a_checkpoint(tmp_path: Path) -> None:
    script = write_task(tmp_path, "\n        time.sleep(0.02)\n")
    train = f"{sys.executable} -m smlt train {script} -n 2 --epochs 500 --global-batch-size 16 --name p --json"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = ["/bin/sh", "-c", f"{train} | head -n 9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    assert len(done.stdout.splitlines()) == 9
    assert "Traceback" not in done.stderr
    end = status(tmp_path / "smlt-runs" / "p")
    assert end["state"] == "stopped"
    assert end["checkpoint_step"] == end["step"] > 0


def test_a_loss_that_is_no_number_is_warned_of_and_stays_json(tmp_path: Path) -> None:
    script = write_task(tmp_path, "\n        np.multiply(self.calls, 1)\n")
    script.write_text(script.read_text().replace("return float((error**2).mean())", "return float('nan')"))
    done = smlt("train", script, "-n", 2, "--epochs", 1, "--global-batch-size", 16, "--name", "n", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NaN" not in done.stdout
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["loss"] for event in events if event["event"] == "step"] == [None] * 4
    (warning,) = [event["text"] for event in events if event["event"] == "warning"]
    assert "the loss is nan since step 1" in warning
    assert "NaN" not in (tmp_path / "smlt-runs" / "n" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("x = rng.normal", "self.data_dir / 'x.txt'\n        x = rng.normal", "give its files with --data DIR"),
        ('{"train": (x, y), "test"', '{"train": iter([]), "test"', "the Dataset, not its DataLoader"),
    ],
)
def test_common_mistakes_in_a_script_are_told_what_to_do(tmp_path: Path, old: str, new: str, told: str) -> None:
    script = write_task(tmp_path)
    script.write_text(script.read_text().replace(old, new))
    done = smlt("train", script, "-n", 2, "--global-batch-size", 16, cwd=tmp_path)
    assert done.returncode == 5
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_target_that_can_never_be_reached_is_told_before_training(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    script.write_text(script.read_text().replace('"accuracy"', '"score"'))
    arguments = ("-n", 2, "--global-batch-size", 16, "--target-accuracy", 0.5, "--name", "t")
    done = smlt("train", script, *arguments, cwd=tmp_path)
    assert done.returncode == 5
    assert 'needs "accuracy" in what evaluate() returns' in done.stderr
    assert status(tmp_path / "smlt-runs" / "t")["step"] == 0


@pytest.mark.parametrize("arguments", [("--store", "localhost:6379"), ("--store", "redis://127.0.0.1:1"), ("--data", "none")])
def test_a_mistyped_command_leaves_no_run(tmp_path: Path, arguments: tuple[str, str]) -> None:
    assert smlt("train", write_task(tmp_path), *arguments, cwd=tmp_path).returncode in (2, 3, 5)
    assert not (tmp_path / "smlt-runs").exists()


def test_a_run_that_was_ended_before_its_first_checkpoint_says_so(tmp_path: Path) -> None:
    script = write_task(tmp_path, "\n        time.sleep(30 if number == 2 else 0)\n")
    with Running("train", script, "-n", 2, "--global-batch-size", 16, "--json", "--name", "c", cwd=tmp_path) as run:
        run.wait_for(lambda event: event["event"] == "step")
        run.process.send_signal(signal.SIGINT)
        run.wait_for(lambda event: event["event"] == "stopping")
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 130
    assert "resume from the beginning, there is no checkpoint yet" in smlt("status", "c", cwd=tmp_path).stdout


def test_launched_scripts_show_their_own_traceback_alone(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("def f():\n    raise ValueError('boom')\nf()\n")
    done = smlt("launch", "-n", 1, "s.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "ValueError: boom" in done.stdout
    assert "runpy" not in done.stdout
    assert "launched.py" not in done.stdout


def test_a_launched_rank_that_leaves_is_told_to_those_who_wait(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import smlt\nsmlt.init()\nsmlt.barrier()\nif smlt.rank() == 0:\n    smlt.allreduce(1.0)\n")
    done = smlt("launch", "-n", 2, "s.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "rank 1 has left the job" in done.stdout
