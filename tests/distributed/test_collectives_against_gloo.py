"""Every collective of the backend against gloo's, on random cases, in the same processes."""

from __future__ import annotations

import json
import os
import random

import pytest
from processes import FOLDER, keys_left, start_all, wait_all

from smlt.store.embedded import EmbeddedStore

#: To try others: SMLT_TEST_SEED, SMLT_TEST_CASES.
CASES = int(os.environ.get("SMLT_TEST_CASES", "150"))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_collective_gives_what_gloo_gives(store: EmbeddedStore, job: str, world_size: int) -> None:
    seed = int(os.environ.get("SMLT_TEST_SEED", random.randrange(10**9)))
    arguments = [str(FOLDER / "against_gloo.py"), store.tcp_url, str(seed), str(CASES)]
    ended = wait_all(start_all(world_size, arguments, SMLT_JOB=job))
    print(f"seed {seed}")
    for worker in ended:
        assert worker.code == 0, f"SMLT_TEST_SEED={seed}\n{worker.err}"
        row = json.loads(worker.out.splitlines()[-1])
        print(row)
        assert row["differing"] == [], f"SMLT_TEST_SEED={seed}"
        assert row["compared"] >= CASES / 4
    assert keys_left(store, job) == []
