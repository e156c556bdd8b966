"""`smlt train --deadline`, `--tune` and what goes with them, as a person uses them on one machine."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from commandline import PACED, Running, keys_of, rows, smlt, status, write_task

from smlt.client.optimizer.observations import read_observations
from smlt.store.embedded import EmbeddedStore

JOB = ("--epochs", 40, "--global-batch-size", 16, "--name", "run")


def decisions(run: Path) -> list[dict[str, object]]:
    path = run / "decisions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_with_a_deadline_chooses_its_workers_and_says_what_it_expects(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path, PACED)
    goal = ("--deadline", "5m", "--max-workers", 3, "--store", store.url, "--json")
    done = smlt("train", script, *JOB, *goal, cwd=tmp_path, PACE="0.1")
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "smlt-runs" / "run"
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 161))
    told = [event for event in events if event["event"] == "decision"]
    assert told
    for row in told:
        assert row["forecast"]["seconds_low"] <= row["forecast"]["seconds"] <= row["forecast"]["seconds_high"]
        assert 1 <= row["chosen"]["workers"] <= 3
    assert len(decisions(folder)) == len(told)
    assert read_observations(folder)
    assert json.loads((folder / "workload.json").read_text())["workload"]["samples"] == 64
    assert keys_of(store.url, "run") == []


def test_a_run_goes_on_with_its_deadline_and_with_what_it_has_observed(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path, PACED)
    goal = ("--deadline", "10m", "--max-workers", 2, "--store", store.url, "--json")
    folder = tmp_path / "smlt-runs" / "run"
    with Running("train", script, *JOB, *goal, cwd=tmp_path, PACE="0.1") as run:
        run.wait_for(lambda event: event["event"] == "decision")
        assert "forecast it will take" in smlt("status", "run", cwd=tmp_path).stdout
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 130
    began = status(folder)["deadline_from"]
    observed = read_observations(folder)
    done = smlt("resume", "run", "--store", store.url, "--json", cwd=tmp_path, PACE="0.1")
    assert (done.returncode, done.stderr) == (0, "")
    assert status(folder)["deadline_from"] == began
    assert read_observations(folder)[: len(observed)] == observed
    assert [row["step"] for row in rows(folder) if row["kind"] == "step"] == list(range(1, 161))


def test_scale_does_not_interfere_with_a_run_that_chooses_its_workers(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path, PACED)
    goal = ("--tune", "--max-workers", 2, "--store", store.url, "--json")
    with Running("train", script, *JOB, *goal, cwd=tmp_path, PACE="0.1") as run:
        run.wait_for(lambda event: event["event"] == "step")
        assert smlt("scale", "run", "--workers", 3, cwd=tmp_path).returncode == 0
        warned = run.wait_for(lambda event: event["event"] == "warning")
        assert "chooses its workers itself" in warned["text"]
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 130


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--deadline", "soon"), "no duration"),
        (("--deadline", "0s"), "above zero"),
        (("--budget", "five"), "no sum of money"),
        (("--budget", "5.00"), "on this machine a run costs nothing"),
        (("--deadline", "1h", "--on-miss", "panic"), "not 'panic'"),
        (("--deadline", "1h", "--max-workers", "65"), "65 workers cannot share"),
        (("--learn-from", "other"), "--deadline, --budget or --tune"),
        (("--tune", "--learn-from", "other"), "no run other"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = smlt("train", write_task(tmp_path), "--global-batch-size", 64, *options, cwd=tmp_path)
    assert done.returncode in (2, 6)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "smlt-runs").exists()


def test_a_task_that_fails_while_it_is_profiled_is_told_as_such(tmp_path: Path) -> None:
    script = write_task(tmp_path, "\n        raise ValueError('a bad step')\n")
    done = smlt("train", script, *JOB, "--tune", cwd=tmp_path)
    assert done.returncode == 5
    assert "a bad step" in done.stderr
    assert "Traceback (most recent" not in done.stderr.splitlines()[0]
    assert not (tmp_path / "smlt-runs").exists()
