"""A worker's view of its scheduler."""

from __future__ import annotations

import time

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
