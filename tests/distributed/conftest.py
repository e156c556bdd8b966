"""Fixtures: two workers that serve all tests of DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ddp_pair import Pair

from smlt.store.embedded import EmbeddedStore


@pytest.fixture(scope="session")
def pair(store: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pytest.importorskip("torch")
    made = Pair(store.url, tmp_path_factory.mktemp("pair"))
    yield made
    made.close()
