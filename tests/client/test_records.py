"""What a run writes down: each step and each epoch once and in order, however the reports come in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlt.client.records import Records
from smlt.client.runs import Run
from smlt.client.watching import Unwatched

STEPS_PER_EPOCH, WORKERS = 3, 3


def step_row(rank: int, step: int) -> dict[str, Any]:
    times = {"compute_s": 0.1, "communication_s": 0.1, "communication_total_s": 0.15, "data_s": 0.0, "rss_mb": 1.0}
    place = {"epoch": (step - 1) // STEPS_PER_EPOCH, "time": 100.0 + step}
    return {"rank": rank, "step": step, "loss": 1.0 / step, "samples": 4, **place, **times}


def epoch_row(rank: int, step: int) -> dict[str, Any]:
    epoch = step // STEPS_PER_EPOCH - 1
    return {"rank": rank, "step": step, "epoch": epoch, "kind": "epoch", "metrics": {"accuracy": epoch / 10}, "time": 1.0}


def reports(rank: int, steps: int) -> list[dict[str, Any]]:
    """What a worker reports, in order."""
    found = []
    for step in range(1, steps + 1):
        found.append(step_row(rank, step))
        if step % STEPS_PER_EPOCH == 0:
            found.append(epoch_row(rank, step))
    return found


def whole(steps: int) -> list[tuple[str, int]]:
    """What metrics.jsonl has to say of so many steps."""
    found = []
    for step in range(1, steps + 1):
        found.append(("step", step))
        if step % STEPS_PER_EPOCH == 0:
            found.append(("epoch", step))
    return found


def make(folder: Path, name: str = "run") -> Records:
    return Records(Run.create(folder, Path("a.py"), {}, name), Unwatched(), WORKERS)


def written(records: Records) -> list[tuple[str, int]]:
    return [(row["kind"], row["step"]) for row in rows(records.folder.path)]


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    made = make(tmp_path)
    yield made
    made.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.data())
def test_rows_interleaved_doubled_and_late_give_each_step_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    records = make(tmp_path_factory.mktemp("records"))
    queues = {rank: reports(rank, 7) for rank in range(WORKERS)}
    while any(queues.values()):  # each worker's in its order, the workers' in any
        rank = data.draw(st.sampled_from([rank for rank, queue in queues.items() if queue]))
        row = queues[rank].pop(0)
        for _ in range(data.draw(st.integers(1, 2))):
            records.take(row)
        if data.draw(st.booleans()):
            records.take_recent(reports(rank, row["step"]))  # all that it has said so far, once more
    assert written(records) == whole(7)
    assert (records.done_step, records.epoch, records.metrics) == (7, 2, {"accuracy": 0.1})
    records.close()


def test_a_step_waits_for_all_workers_and_an_epoch_for_its_last_step(records: Records) -> None:
    for row in reports(0, 3):
        records.take(row)
    records.take(step_row(1, 1))
    assert records.done_step == 0
    records.take(step_row(2, 1))
    assert written(records) == [("step", 1)]
    assert records.epoch == 0
    for rank in (1, 2):
        for row in reports(rank, 3)[1:]:
            records.take(row)
    assert written(records) == whole(3)
    assert rows(records.folder.path)[0]["ranks"] == [0, 1, 2]


def test_a_step_that_was_never_reported_by_all_is_settled_by_the_plan(records: Records) -> None:
    for row in reports(0, 4):
        records.take(row)
    for row in reports(1, 2):
        records.take(row)
    records.settle(3)  # rank 2 died before it had reported anything
    assert written(records) == whole(3)
    assert [row["ranks"] for row in rows(records.folder.path) if row["kind"] == "step"] == [[0, 1], [0, 1], [0]]
    records.take(step_row(2, 2))  # a report that was still in the store
    assert written(records) == whole(3)
    for rank in (1, 2):
        records.take(step_row(rank, 4))
    assert written(records) == [*whole(3), ("step", 4)]


def test_reports_that_were_lost_come_with_the_acknowledgements(records: Records) -> None:
    for rank in range(WORKERS):
        for row in reports(rank, 2):
            records.take(row)
    for rank in (1, 0):
        records.take_recent([*reports(rank, 6)[1:], {"rank": rank, "kind": "end", "state": "paused", "step": 6}])
    assert records.done_step == 2
    records.settle(6)
    assert written(records) == whole(6)
    assert records.ended == {}  # of a generation that is over


def test_fewer_workers_complete_a_step(records: Records) -> None:
    records.world_size = 2
    for rank in range(2):
        records.take(step_row(rank, 1))
    assert written(records) == [("step", 1)]


def test_going_back_drops_what_came_later_and_takes_it_again(records: Records) -> None:
    for row in reports(0, 7):
        records.take(row)
    records.settle(7)
    records.take({"rank": 1, **step_row(1, 8)})  # under way
    records.go_back(3, 1, {"accuracy": 0.0})
    assert written(records) == whole(3)
    assert (records.done_step, records.epoch) == (3, 1)
    for rank in range(WORKERS):
        for row in reports(rank, 6)[4:]:
            records.take(row)
    assert written(records) == whole(6)
    assert (records.done_step, records.epoch) == (6, 2)


def test_catching_up_fills_in_what_the_lost_scheduler_had_not_written(tmp_path: Path) -> None:
    before = make(tmp_path)
    for row in reports(0, 2):
        before.take(row)
    before.settle(2)
    before.close()
    after = Records(before.folder, Unwatched(), WORKERS)
    # Steps 3 to 7 and two epochs, of which only the checkpoint of step 7 tells.
    after.catch_up(7, 2, {"accuracy": 0.1}, reports(0, 7))
    assert written(after) == whole(7)
    assert (after.done_step, after.epoch, after.metrics) == (7, 2, {"accuracy": 0.1})
    after.close()


def test_catching_up_goes_back_to_a_checkpoint_that_is_older_than_what_is_written(tmp_path: Path) -> None:
    before = make(tmp_path)
    for row in reports(0, 7):
        before.take(row)
    before.settle(7)
    before.close()
    with (before.folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 8, "lo')  # the scheduler was killed while it wrote
    after = Records(before.folder, Unwatched(), WORKERS)
    after.catch_up(3, 1, {"accuracy": 0.0}, reports(0, 3))
    assert written(after) == whole(3)
    assert (after.done_step, after.epoch) == (3, 1)
    after.close()


@pytest.mark.parametrize("seed", range(3))
def test_catching_up_from_any_place_leaves_no_gap_and_no_double(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    records = make(tmp_path)
    for _ in range(20):
        step = draw.randint(0, 12)
        records.catch_up(step, step // STEPS_PER_EPOCH, {}, reports(0, step))
        assert written(records) == whole(step)
        for row in reports(0, draw.randint(step, 13))[len(whole(step)) :]:
            records.take(row)
        records.settle(13)
    records.close()


def test_a_change_of_the_membership_is_written_down_between_the_steps(records: Records) -> None:
    for row in reports(0, 1):
        records.take(row)
    records.settle(1)
    records.change({"generation": 2, "world_size": 2, "step": 1, "reasons": ["worker 1 left"]})
    assert [row["kind"] for row in rows(records.folder.path)] == ["step", "membership"]
