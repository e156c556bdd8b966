"""Workers that are lost, whenever and however, are replaced, and the run ends in the very same bits."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import (
    PACED,
    TASK,
    Running,
    all_gone,
    eventually,
    keys_of,
    rows,
    same_end,
    smlt,
    status,
    steps,
    write_task,
)

from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore
from smlt.store.membership import Plan
from smlt.store.parameter import ParameterStore

JOB = ("--workers", 3, "--epochs", 10, "--global-batch-size", 16, "--codec", "fp32")
LAST_STEP = 40


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the job when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert smlt("train", write_task(folder), *JOB, "--name", "run", cwd=folder).returncode == 0
    run = folder / "smlt-runs" / "run"
    assert [number for number, _ in steps(run)] == list(range(1, LAST_STEP + 1))
    return run


class Disturbed(Running):
    """A run of the job, to be disturbed."""

    def __init__(self, store: EmbeddedStore, folder: Path, script: Path, *more: object, pace: float = 0.05) -> None:
        super().__init__(
            *("train", script, *JOB, *more, "--store", store.url, "--json", "--name", "run"), cwd=folder, PACE=str(pace)
        )
        self.folder = folder / "smlt-runs" / "run"
        self.store, self.seen = store, dict[int, psutil.Process]()

    def at_step(self, number: int) -> None:
        """Wait until this step is done."""
        self.wait_for(lambda event: event["event"] == "step" and event["step"] >= number)
        self.note()

    def goes_on(self) -> dict[str, Any]:
        """Wait until the membership has changed, and training goes on."""
        found = self.wait_for(lambda event: event["event"] == "membership")
        self.note()
        return found

    def note(self) -> None:
        self.seen |= {process.pid: process for _, process in self.workers()}

    def kill(self, *ranks: int, how: signal.Signals = signal.SIGKILL) -> None:
        workers = dict(self.workers())
        for rank in ranks:
            workers[rank].send_signal(how)

    def coordination(self) -> Coordination:
        return Coordination(ParameterStore(self.store.url, job=status(self.folder)["job"]))

    @property
    def changes(self) -> list[dict[str, Any]]:
        return [row for row in rows(self.folder) if row["kind"] == "membership"]


@contextmanager
def disturbed(
    store: EmbeddedStore, folder: Path, *more: object, script: str = PACED, pace: float = 0.05
) -> Iterator[Disturbed]:
    """A run; behind the block it must come to its end in order, and leave no process and no key."""
    with Disturbed(store, folder, write_task(folder, script), *more, pace=pace) as run:
        yield run
        run.let_go()
        code = run.finish()
        assert (code, run.errors.read_text()) == (0, "")
    assert all_gone(list(run.seen.values()))
    assert keys_of(store.url, "run") == []
    assert not (run.folder / "snapshots").exists()


@pytest.mark.parametrize("seed", range(2))
def test_each_rank_may_be_killed_in_turn_at_any_step(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path, seed: int
) -> None:
    draw = random.Random(seed)
    with disturbed(store, tmp_path) as run:
        step = 0
        for rank in draw.sample(range(3), 3):
            step += draw.randint(1, 8)
            run.at_step(step)
            run.kill(rank)
            change = run.goes_on()
            assert (change["world_size"], change["lost_ranks"]) == (3, [rank])
            assert change["reasons"] == [f"worker {rank} was killed by signal 9"]
            step = change["step"]
    same_end(run.folder, undisturbed)
    assert status(run.folder)["restarts"] == 3


def test_two_may_be_killed_at_once(store: EmbeddedStore, tmp_path: Path, undisturbed: Path) -> None:
    with disturbed(store, tmp_path) as run:
        run.at_step(9)
        run.kill(0, 2)
        run.goes_on()
    same_end(run.folder, undisturbed)
    assert status(run.folder)["restarts"] == 2


def test_when_all_are_killed_training_goes_back_to_the_checkpoint(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path
) -> None:
    with disturbed(store, tmp_path) as run:
        run.at_step(14)
        run.kill(0, 1, 2)
        run.goes_on()
    same_end(run.folder, undisturbed)
    done = [event["step"] for event in run.events if event["event"] == "step"]
    again = done[next(place for place in range(1, len(done)) if done[place] <= done[place - 1])]
    assert again % 4 == 1  # behind the end of an epoch
    assert again >= 13


def test_one_that_hangs_is_noticed_and_replaced(store: EmbeddedStore, tmp_path: Path, undisturbed: Path) -> None:
    with disturbed(store, tmp_path, "--liveness", 1) as run:
        run.at_step(6)
        hanging = dict(run.workers())[1]
        run.kill(1, how=signal.SIGSTOP)
        change = run.goes_on()
        assert change["reasons"] == ["worker 1 has stopped reporting: its metadata key has expired (--liveness 1)"]
        assert all_gone([hanging])
    same_end(run.folder, undisturbed)


def test_another_may_be_killed_while_they_gather(store: EmbeddedStore, tmp_path: Path, undisturbed: Path) -> None:
    with disturbed(store, tmp_path) as run:
        run.at_step(9)
        coordination = run.coordination()
        for first, second in ((0, 1), (2, 0)):
            generation = coordination.generation()
            assert generation is not None
            run.kill(first)
            assert eventually(lambda g=generation: (coordination.generation() or 0) > g and coordination.plan() is None)
            run.kill(second)
            assert run.goes_on()["lost_ranks"] == [first, second]
    same_end(run.folder, undisturbed)
    assert status(run.folder)["restarts"] == 4


#: The task with a place to die in its evaluation too: {n} is the epoch, counted from 1.
IN_EVALUATION = """
    def evaluate(self, model, batch):
        self.evaluations = getattr(self, "evaluations", 0) + 1
        if self.evaluations == {n} and one_worker({folder!r}):
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch
"""


@pytest.mark.parametrize(
    ("when", "number"),
    [("step", 1), ("step", 4), ("step", 5), ("step", LAST_STEP), ("evaluation", 3), ("evaluation", 10)],
)
def test_the_first_to_come_to_a_place_may_die_there(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path, when: str, number: int
) -> None:
    """Before its first step, at both sides of an epoch's end, in the last step, within an evaluation and the last one."""
    die = f"\n        if number == {number} and one_worker({str(tmp_path)!r}):\n"
    die += "            os.kill(os.getpid(), signal.SIGKILL)\n"
    script = write_task(tmp_path, die if when == "step" else "\n        pass\n")
    if when == "evaluation":
        plain = "\n    def evaluate(self, model, batch):\n        x, y = batch\n"
        assert plain in TASK
        script.write_text(script.read_text().replace(plain, IN_EVALUATION.format(n=number, folder=str(tmp_path))))
    with Disturbed(store, tmp_path, script) as run:
        run.note()
        code = run.finish()
        assert (code, run.errors.read_text()) == (0, "")
    same_end(run.folder, undisturbed)
    assert [row["reasons"][0][8:] for row in run.changes] == [" was killed by signal 9"]
    assert keys_of(store.url, "run") == []
    assert all_gone(list(run.seen.values()))


def test_a_job_that_shrinks_goes_on_with_those_who_are_left(store: EmbeddedStore, tmp_path: Path, undisturbed: Path) -> None:
    with disturbed(store, tmp_path, "--on-failure", "shrink") as run:
        run.at_step(6)
        run.kill(0)
        assert run.goes_on()["world_size"] == 2
        run.kill(run.workers()[0][0])
        assert run.goes_on()["world_size"] == 1
    assert [number for number, _ in steps(run.folder)] == list(range(1, LAST_STEP + 1))
    assert [loss for _, loss in steps(run.folder)] == pytest.approx([loss for _, loss in steps(undisturbed)], rel=1e-5)
    assert status(run.folder)["restarts"] == 0
    assert [len(row["ranks"]) for row in rows(run.folder) if row["kind"] == "step"][-1] == 1


def test_a_worker_that_dies_at_the_same_step_for_ever_ends_the_run_with_its_log(store: EmbeddedStore, tmp_path: Path) -> None:
    folder = str(tmp_path)
    # The first to come to its step 6 dies there; so does, in its first step, whoever takes its place.
    script = write_task(
        tmp_path,
        f"""
        if number == 6 and one_worker({folder!r}) or number == 1 and (Path({folder!r}) / "taken").exists():
            print("in step", number, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    with Disturbed(store, tmp_path, script, "--max-restarts", 2) as run:
        run.note()
        assert run.finish() == 4
        told = run.errors.read_text()
    assert "was killed by signal 9 (3 failures in a row without a step between); its log:" in told
    assert "in step 1" in told
    assert "Traceback" not in told
    assert status(run.folder)["step"] == 5
    assert all_gone(list(run.seen.values()))
    assert keys_of(store.url, "run") == []


def test_a_spare_takes_over_where_one_is_ready(store: EmbeddedStore, tmp_path: Path, undisturbed: Path) -> None:
    with disturbed(store, tmp_path, "--spares", 1, pace=0.1) as run:
        run.at_step(2)
        coordination = run.coordination()
        assert eventually(lambda: len(coordination.acks(coordination.generation() or 0)) == 4)
        before: Plan | None = coordination.plan()
        assert before is not None
        names = {ack.worker_id for ack, _ in coordination.acks(before.generation)}
        run.kill(1)
        run.goes_on()
        after = coordination.plan()
        assert after is not None
        assert [name for name, rank in after.ranks.items() if rank == 1] == list(names - set(before.ranks))
        assert eventually(lambda: len(run.workers()) == 4)  # and there is another spare
        run.note()
    same_end(run.folder, undisturbed)


def test_a_straggler_is_shown_and_replaced(store: EmbeddedStore, tmp_path: Path, undisturbed: Path) -> None:
    slow = f"\n        self.slow = getattr(self, 'slow', None) or number == 1 and one_worker({str(tmp_path)!r})\n"
    slow += "        time.sleep(0.06 if self.slow else 0.02)\n"
    with disturbed(store, tmp_path, "--replace-stragglers", 2, script=slow) as run:
        warning = run.wait_for(lambda event: event["event"] == "warning")
        assert "is a straggler: its steps take" in warning["text"]
        rank = int(warning["text"].split()[1])
        assert run.goes_on()["reasons"] == [f"rank {rank} was slow"]
    same_end(run.folder, undisturbed)
    assert len(run.changes) == 1
