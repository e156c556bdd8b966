"""Run folders."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from smlt.client.runs import Run, list_runs
from smlt.errors import CheckpointError, ConfigError, StoreError


def test_names_tell_time_and_script_and_are_unique(tmp_path: Path) -> None:
    runs = [Run.create(tmp_path, Path("my digits.v2.py"), {}) for _ in range(5)]
    assert len({run.name for run in runs}) == 5
    for run in runs:
        assert re.fullmatch(r"\d{8}-\d{6}-my-digits-v2(-\d)?", run.name)
        assert (run.path / "logs").is_dir()


def test_a_name_that_is_taken_or_no_name_is_refused(tmp_path: Path) -> None:
    Run.create(tmp_path, Path("a.py"), {}, "mine")
    for name, told in (("mine", "already"), ("../up", "letters"), ("", "letters"), ("x" * 49, "48")):
        with pytest.raises(ConfigError, match=told):
            Run.create(tmp_path, Path("a.py"), {}, name)


def test_a_place_where_no_folder_can_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot make the run folder"):
        Run.create(tmp_path / "file", Path("a.py"), {})


def test_configuration_and_status_come_back_and_nothing_half_written_is_seen(tmp_path: Path) -> None:
    run = Run.create(tmp_path, Path("a.py"), {"epochs": 3}, "one")
    run.write_status(state="running", pid=os.getpid(), step=1)
    run.write_status(step=2)
    again = Run.open(tmp_path, "one")
    assert again.config == {"epochs": 3}
    with run.hold():
        assert again.status == {"state": "running", "pid": os.getpid(), "step": 2}
    assert Run.open(Path("elsewhere"), str(run.path)).path == run.path  # by its folder
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "logs", "scheduler.lock", "status.json"]


def test_a_run_is_scheduled_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = Run.create(tmp_path, Path("a.py"), {}, "one")
    run.write_status(state="running", pid=7)
    with run.hold(), pytest.raises(ConfigError, match=r"one is still running \(process 7\)"), run.hold():
        pass
    with run.hold():  # it can be taken again
        assert run.status["state"] == "running"


def test_a_running_run_whose_process_is_gone_is_lost(tmp_path: Path) -> None:
    run = Run.create(tmp_path, Path("a.py"), {}, "one")
    run.write_status(state="running", pid=os.getpid())  # a number that another process has by now
    assert run.status["state"] == "lost"
    with run.hold():
        assert run.status["state"] == "running"
    assert run.status["state"] == "lost"
    run.write_status(state="done")
    assert run.status["state"] == "done"


def test_open_names_what_is_missing_and_the_latest_runs(tmp_path: Path) -> None:
    run = Run.create(tmp_path, Path("a.py"), {}, "one")
    with pytest.raises(CheckpointError, match=r"run one is incomplete: .*status\.json is missing"):
        Run.open(tmp_path, "one")
    run.write_status(state="done")
    with pytest.raises(CheckpointError, match=r"no run two in .*the latest: one"):
        Run.open(tmp_path, "two")
    for text in ("{", "[]", ""):
        (run.path / "status.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"status\.json"):
            _ = run.status


def test_metrics_leave_out_a_line_cut_short_and_steps_to_be_done_again(tmp_path: Path) -> None:
    run = Run.create(tmp_path, Path("a.py"), {}, "one")
    assert list(run.metrics()) == []
    with (run.path / "metrics.jsonl").open("w") as file:
        for step in range(1, 6):
            file.write(json.dumps({"step": step}) + "\n")
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    run.truncate_metrics(3)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_runs_are_listed_oldest_first_and_other_folders_left_out(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    for number, name in enumerate(("b", "a", "c")):
        path = Run.create(tmp_path, Path("a.py"), {}, name).path / "config.json"
        os.utime(path, (number, number))
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    assert [run.name for run in list_runs(tmp_path)] == ["b", "a", "c"]
