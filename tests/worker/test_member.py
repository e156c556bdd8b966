"""A worker's view of its scheduler."""

from __future__ import annotations

import time

import pytest

from smlt.errors import StoreUnavailable
from smlt.store.coordination import LEASE_S, Answer
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore
from smlt.worker.config import WorkerConfig
from smlt.worker.member import Member


def test_a_scheduler_is_gone_when_its_lease_is_missing_for_long_not_when_it_was_last_seen_long_ago(
    store: EmbeddedStore, monkeypatch: object
) -> None:
    config = WorkerConfig("run", "job", 0, 1, "", "", 1, 1, store_url=store.url, liveness_s=120.0)
    member = Member(config, ParameterStore(store.url, job="job"))
    now = time.monotonic()
    clock = iter([now + 1, now + 31, now + 31 + LEASE_S / 2, now + 50, now + 80, now + 81 + LEASE_S])
    monkeypatch.setattr("smlt.worker.member.time.monotonic", lambda: next(clock))  # type: ignore[attr-defined]
    member.hear(Answer(scheduled=True))
    member.hear(Answer(scheduled=False))  # with this liveness a heartbeat asks every 30 s; the store has just lost its data
    member.hear(Answer(scheduled=False))
    assert not member.orphaned
    member.hear(Answer(scheduled=True))
    member.hear(Answer(scheduled=False))
    assert not member.orphaned
    member.hear(Answer(scheduled=False))
    assert member.orphaned


def test_a_worker_whose_store_stays_away_gives_up() -> None:
    """A function has no life line: without this it would ask, and be billed, until Lambda ends it."""
    nowhere = "redis://127.0.0.1:1"
    config = WorkerConfig("run", "job", 0, 1, "", "", 1, 1, store_url=nowhere, timeout_s=0.3)
    member = Member(config, ParameterStore(nowhere, job="job", retries=0))
    with pytest.raises(StoreUnavailable):
        member._ask_for_a_new_generation(StoreUnavailable("gone"))
