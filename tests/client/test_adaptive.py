"""`smlt train` with a batch schedule: real processes that are lost, stopped, resumed and scaled around its changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import PACED, REPOSITORY, TASK, Running, all_gone, keys_of, rows, same_end, smlt, status, steps, write_task

from smlt.store.embedded import EmbeddedStore

#: Of 64 samples: 3 epochs of 4 steps, 3 of 2, 2 of 8.
SCHEDULED = ("--epochs", 8, "--batch-schedule", "0:16,3:32,6:8", "--lr-rule", "linear", "--codec", "fp32")
#: Chooses 16, 32 and 8 by itself.
CALLBACK = TASK.replace(
    "    def evaluate(",
    """    def global_batch_size(self, epoch, metrics):
        accuracy = metrics.get("accuracy", 0.0)
        return 32 if 0.1 < accuracy < 0.13 else 8 if accuracy >= 0.13 else 16

    def evaluate(""",
)


def job(kind: str, folder: Path, before_step: str = "\n        pass\n") -> tuple[object, ...]:
    """The script and the options of the job, its batch chosen by schedule or by callback."""
    script = write_task(folder, before_step)
    if kind == "schedule":
        return (script, *SCHEDULED)
    script.write_text(CALLBACK.replace("\n        pass\n", before_step))
    return (script, "--epochs", 8, "--global-batch-size", 16, "--lr-rule", "sqrt", "--codec", "fp32")


@pytest.fixture(scope="module", params=["schedule", "callback"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    """The run folder of the job by three workers when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = smlt("train", *job(kind, folder), "-n", 3, "--name", "run", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    run = folder / "smlt-runs" / "run"
    batches = [row["global_batch_size"] for row in rows(run) if row["kind"] == "step"]
    assert set(batches) == {16, 32, 8}
    if kind == "schedule":
        assert batches == [16] * 12 + [32] * 6 + [8] * 16
    assert "global batch 32 instead of 16, learning rate x" in done.stdout
    return run


def first_change(run: Path) -> int:
    """The last step of the batch that the run began with."""
    return max(row["step"] for row in rows(run) if row["kind"] == "step" and row["lr_factor"] == 1.0 and row["epoch"] < 4)


def test_the_curve_of_a_schedule_does_not_hang_on_the_number_of_workers(tmp_path: Path, undisturbed: Path, kind: str) -> None:
    n = 1 if kind == "schedule" else 2
    assert smlt("train", *job(kind, tmp_path), "-n", n, "--name", "run", cwd=tmp_path).returncode == 0
    run = tmp_path / "smlt-runs" / "run"
    assert [number for number, _ in steps(run)] == [number for number, _ in steps(undisturbed)]
    assert [loss for _, loss in steps(run)] == pytest.approx([loss for _, loss in steps(undisturbed)], rel=1e-5)


@pytest.mark.parametrize("offset", [-1, 0])
def test_a_worker_lost_around_a_change_is_replaced_to_the_same_bits(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path, kind: str, offset: int
) -> None:
    options = ("-n", 3, "--store", store.url, "--json", "--name", "run")
    change = first_change(undisturbed)
    with Running("train", *job(kind, tmp_path, PACED), *options, cwd=tmp_path, PACE="0.1") as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] >= change + offset)
        processes = run.descendants()
        dict(run.workers())[1].kill()
        run.wait_for(lambda event: event["event"] == "membership")
        dict(run.workers())[0].kill()
        run.wait_for(lambda event: event["event"] == "membership")
        run.let_go()
        assert run.finish() == 0
        assert run.errors.read_text() == ""
    same_end(tmp_path / "smlt-runs" / "run", undisturbed)
    assert all_gone(processes)
    assert keys_of(store.url, "run") == []


def test_a_run_stopped_with_its_scheduler_resumes_to_the_same_bits(tmp_path: Path, undisturbed: Path, kind: str) -> None:
    folder = tmp_path / "smlt-runs" / "run"
    change = first_change(undisturbed)
    with Running("train", *job(kind, tmp_path, PACED), "-n", 3, "--json", "--name", "run", cwd=tmp_path, PACE="0.05") as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] > change)
        processes = run.descendants()
        run.process.kill()
        run.process.wait()
        assert all_gone(processes)
    done = smlt("resume", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    same_end(folder, undisturbed)


def test_invoked_again_and_again_a_run_with_a_schedule_ends_in_the_same_bits(
    tmp_path: Path, undisturbed: Path, kind: str
) -> None:
    options = ("-n", 3, "--time-limit", 3.5, "--cold", "--name", "run")
    done = smlt("train", *job(kind, tmp_path, PACED), *options, cwd=tmp_path, PACE="0.2")
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "smlt-runs" / "run"
    same_end(folder, undisturbed)
    assert [row for row in rows(folder) if row["kind"] == "membership"] != []


def test_scaled_while_its_batch_changes_a_run_keeps_its_curve(tmp_path: Path, undisturbed: Path, kind: str) -> None:
    folder, slow = tmp_path / "smlt-runs" / "run", tmp_path / "slow"
    slow.touch()
    paced = f"\n        time.sleep(0.4 if Path({str(slow)!r}).exists() else 0.0)\n"
    with Running("train", *job(kind, tmp_path, paced), "-n", 3, "--json", "--name", "run", cwd=tmp_path) as run:
        for size, at_step in ((5, 3), (2, first_change(undisturbed) + 1)):
            run.wait_for(lambda event, at_step=at_step: event["event"] == "step" and event["step"] >= at_step)
            assert smlt("scale", "run", "-n", size, cwd=tmp_path).returncode == 0
            run.wait_for(lambda event, size=size: event["event"] == "membership" and event["world_size"] == size)
        slow.unlink()
        assert run.finish() == 0
        assert run.errors.read_text() == ""
    curve = steps(folder)
    assert [number for number, _ in curve] == [number for number, _ in steps(undisturbed)]
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in steps(undisturbed)], rel=1e-5)


# ---- what is refused, what is told ----


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--batch-schedule", "0:16,4"), "'4' is not EPOCH:SAMPLES, such as 5:128"),
        (("--batch-schedule", "0:16,5:32", "--global-batch-size", 64), "--batch-schedule begins with 16"),
        (("--batch-schedule", "0:64,5:8", "-n", 9), "9 workers cannot share a global batch of 8"),
        (("--lr-rule", "cubic"), "choose one of none, linear, sqrt"),
        (("--patience", 0), "--patience 0 is not positive"),
        (("--patience", 3, "--stop-mode", "most"), "choose one of max, min"),
    ],
)
def test_a_schedule_that_cannot_work_is_one_line_and_leaves_no_run(
    tmp_path: Path, options: tuple[object, ...], told: str
) -> None:
    done = smlt("train", write_task(tmp_path), *options, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert told in done.stderr
    assert not (tmp_path / "smlt-runs").exists()


def test_a_run_keeps_its_schedule_and_may_grow_once_small_batches_are_behind_it(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    options = ("--batch-schedule", "1:32", "--global-batch-size", 2, "--epochs", 1, "-n", 2, "--name", "run")
    assert smlt("train", script, *options, cwd=tmp_path).returncode == 0
    folder = tmp_path / "smlt-runs" / "run"
    assert json.loads((folder / "config.json").read_text())["batch_schedule"] == "0:2,1:32"
    for more in (("--batch-schedule", "2:32"), ("--lr-rule", "linear")):
        done = smlt("train", "--resume", "run", *more, "--epochs", 2, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"--resume keeps the run's {more[0][2:].replace('-', '_')}" in done.stderr
    done = smlt("resume", "run", "--epochs", 2, "-n", 4, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [len(row["ranks"]) for row in rows(folder) if row["kind"] == "step"] == [2] * 32 + [4] * 2


def test_a_callback_that_raises_ends_the_run_with_its_traceback_once(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path)
    script.write_text(CALLBACK.replace('metrics.get("accuracy", 0.0)', 'metrics["accuracy"]'))
    done = smlt("train", script, "-n", 3, "--global-batch-size", 16, "--store", store.url, "--name", "c", cwd=tmp_path)
    assert done.returncode == 5
    assert done.stderr.count("Traceback") == 1
    assert "in global_batch_size" in done.stderr
    assert "global_batch_size(epoch=0, metrics={'global_batch_size': 16}) raised KeyError: 'accuracy'" in done.stderr
    assert keys_of(store.url, "c") == []


def test_a_run_that_gets_no_better_ends_and_is_done_when_resumed(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    script.write_text(script.read_text().replace("lr=0.005", "lr=0.0"))
    options = ("-n", 2, "--global-batch-size", 16, "--epochs", 50, "--patience", 3, "--name", "p")
    assert smlt("train", script, *options, cwd=tmp_path).returncode == 0
    folder = tmp_path / "smlt-runs" / "p"
    assert (status(folder)["state"], status(folder)["epoch"], status(folder)["step"]) == ("done", 4, 16)
    done = smlt("resume", "p", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (status(folder)["state"], status(folder)["step"]) == ("done", 16)
    done = smlt("train", "--resume", "p", "--patience", 5, cwd=tmp_path)  # more patience: it goes on, and remembers
    assert (done.returncode, done.stderr) == (0, "")
    assert (status(folder)["state"], status(folder)["epoch"]) == ("done", 6)


def test_the_example_lets_its_batch_grow(tmp_path: Path) -> None:
    example = REPOSITORY / "examples" / "digits_adaptive.py"
    done = smlt("train", example, "-n", 2, "--epochs", 5, "--lr-rule", "sqrt", "--name", "e", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "global batch 128 instead of 64, learning rate x 1.414 since the beginning" in done.stdout
