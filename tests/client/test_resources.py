"""The Resource Manager: reports of workers, read from a real store."""

from __future__ import annotations

from typing import Any

import pytest

from smlt.client.resources import HISTORY, STRAGGLER_STEPS, ResourceManager
from smlt.store.coordination import Coordination
from smlt.store.parameter import ParameterStore


@pytest.fixture
def coordination(parameters: ParameterStore) -> Coordination:
    made = Coordination(parameters)
    made.open_generation(1, "s")
    return made


def report(coordination: Coordination, rank: int, step: int, generation: int = 1, **more: Any) -> None:
    times = {"compute_s": 0.1, "data_s": 0.0}
    row = {"rank": rank, "step": step, **({} if "kind" in more else {"loss": 0.5, **times}), **more}
    coordination.report(generation, f"w{rank}", rank, row, liveness_s=10)


def test_every_report_is_taken_once_in_each_workers_order(coordination: Coordination) -> None:
    manager = ResourceManager(coordination)
    assert manager.poll(2, block_ms=1) == ([], [])
    for step in (1, 2):
        for rank in (0, 1):
            report(coordination, rank, step)
    report(coordination, 1, 2, kind="end", state="done")
    taken, words = manager.poll(2, block_ms=1000)
    assert [row["step"] for row in taken if row["rank"] == 0] == [1, 2]
    assert [row["step"] for row in taken if row["rank"] == 1] == [1, 2, 2]
    assert words == []
    assert manager.poll(2, block_ms=1) == ([], [])
    assert manager.latest[1]["kind"] == "end"
    assert [row["step"] for row in manager.history[1]] == [1, 2]  # iterations only


def test_a_long_backlog_comes_in_full_polls(coordination: Coordination) -> None:
    manager = ResourceManager(coordination)
    for step in range(1003):
        report(coordination, 0, step)
    found = [len(manager.poll(1, block_ms=1)[0]) for _ in range(3)]
    assert found == [1000, 3, 0]
    assert len(manager.history[0]) == 1003 < HISTORY


def test_words_of_the_workers_come_with_their_reports(coordination: Coordination) -> None:
    manager = ResourceManager(coordination)
    report(coordination, 0, 1)
    coordination.pause("w0")
    rows, words = manager.poll(1, block_ms=1000)
    assert ([row["step"] for row in rows], words) == ([1], [("paused", "w0")])


def test_a_store_that_came_back_empty_is_read_from_its_beginning(coordination: Coordination) -> None:
    manager = ResourceManager(coordination)
    report(coordination, 0, 1)
    assert len(manager.poll(1, block_ms=1000)[0]) == 1
    coordination.parameters.sweep()
    coordination.open_generation(2, "s")
    report(coordination, 0, 2, generation=2)
    manager.streams_are_new()
    assert [row["step"] for row in manager.poll(1, block_ms=1000)[0]] == [2]


def test_a_worker_over_its_memory_is_named(coordination: Coordination) -> None:
    manager = ResourceManager(coordination, memory_mb=100)
    report(coordination, 0, 1, rss_mb=99.0)
    report(coordination, 1, 1, rss_mb=101.5)
    assert manager.over_memory() is None
    manager.poll(2, block_ms=1000)
    assert manager.over_memory() == (1, 101.5)
    manager.begin_anew(2)  # the worker that held it has been replaced
    assert manager.over_memory() is None


def test_a_straggler_is_told_by_its_own_time_and_not_by_what_it_waits(coordination: Coordination) -> None:
    manager = ResourceManager(coordination)
    for step in range(1, STRAGGLER_STEPS + 1):
        assert manager.stragglers() == {}
        for rank in range(3):  # rank 2 computes and loads for longer; rank 0 waits for it
            slow = rank == 2 or step == 5  # one slow step of the others is nothing
            report(coordination, rank, step, compute_s=0.3 if slow else 0.1, data_s=0.1 if slow else 0.0, communication_s=9.0)
        manager.poll(3, block_ms=1000)
    assert manager.stragglers() == {2: pytest.approx(4.0)}
    manager.begin_anew(2)
    assert manager.stragglers() == {}
    assert set(manager.history) == {0, 1}


def test_workers_that_are_all_alike_or_alone_are_no_stragglers(coordination: Coordination) -> None:
    manager = ResourceManager(coordination)
    for step in range(STRAGGLER_STEPS):
        for rank in range(2):  # twice the time, but of nothing
            report(coordination, rank, step, compute_s=0.001 * (1 + rank))
    manager.poll(1, block_ms=1000)
    assert manager.stragglers() == {}
    manager.poll(2, block_ms=1000)
    assert manager.stragglers() == {}
