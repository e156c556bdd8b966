"""The Resource Manager: reports of workers, read from a real store."""

from __future__ import annotations

import pytest

from smlt.client import resources
from smlt.client.resources import ResourceManager
from smlt.store.parameter import ParameterStore


def test_every_report_is_taken_once_in_each_workers_order(parameters: ParameterStore) -> None:
    manager = ResourceManager(parameters, 2)
    assert manager.poll(block_ms=1) == []
    for step in (1, 2):
        for rank in (0, 1):
            parameters.report(rank, {"rank": rank, "step": step, "loss": 0.5})
    parameters.report(1, {"rank": 1, "step": 2, "kind": "end", "state": "done"})
    taken = manager.poll(block_ms=1000)
    assert [row["step"] for row in taken if row["rank"] == 0] == [1, 2]
    assert [row["step"] for row in taken if row["rank"] == 1] == [1, 2, 2]
    assert manager.poll(block_ms=1) == []
    assert manager.latest[1]["kind"] == "end"
    assert [row["step"] for row in manager.history[1]] == [1, 2]  # iterations only


def test_a_long_backlog_comes_in_full_polls(parameters: ParameterStore) -> None:
    manager = ResourceManager(parameters, 1)
    for step in range(resources.REPORTS_PER_READ + 3):
        parameters.report(0, {"rank": 0, "step": step, "loss": 0.5})
    assert len(manager.poll(block_ms=1)) == resources.REPORTS_PER_READ
    assert len(manager.poll(block_ms=1)) == 3


def test_a_worker_whose_metadata_key_has_gone_is_lost(parameters: ParameterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "CHECK_EVERY_S", 0.0)
    manager = ResourceManager(parameters, 3)
    assert manager.lost() == []  # none was ever there
    for rank in (0, 1):
        parameters.report(rank, {"rank": rank, "step": 1, "loss": 0.5})
    manager.poll(block_ms=1000)
    assert manager.lost() == []
    parameters.client.delete(parameters.key("meta:1"))
    assert manager.lost() == [1]


def test_a_worker_over_its_memory_is_named(parameters: ParameterStore) -> None:
    manager = ResourceManager(parameters, 2, memory_mb=100)
    parameters.report(0, {"rank": 0, "step": 1, "loss": 0.5, "rss_mb": 99.0})
    parameters.report(1, {"rank": 1, "step": 1, "loss": 0.5, "rss_mb": 101.5})
    assert manager.over_memory() is None
    manager.poll(block_ms=1000)
    assert manager.over_memory() == (1, 101.5)
