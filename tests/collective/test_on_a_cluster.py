"""Collectives on a real Valkey Cluster, which moves slots and replaces primaries under way.

All tests of collectives run on a cluster with SMLT_TEST_STORE=cluster (`stores`); `bench.cluster_faults` disturbs one longer.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from groups import Group, in_parallel

from smlt import Communicator
from smlt.errors import StoreUnavailable
from smlt.store.embedded_cluster import EmbeddedCluster
from smlt.store.parameter import ParameterStore
from smlt.store.slots import slot_of


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    with EmbeddedCluster(3, 1, memory_bytes=64 << 20, node_timeout_ms=1000) as made:
        yield made


def eventually(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(StoreUnavailable):
            condition()
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def disturb(cluster: EmbeddedCluster, slots: list[int]) -> None:
    """Every slot of the job's goes to another primary and back, both ways that there are; two primaries are replaced."""
    for slot in slots:
        home = cluster.owner(slot)
        for migrate in (cluster.migrate, cluster.migrate_at_once):
            migrate(slot, (home + 1) % 3)
            migrate(slot, home)
    asked, killed = cluster.owner(slots[1]), cluster.owner(slots[0])
    cluster.fail_over(cluster.replica_of(asked))
    cluster.nodes[killed].kill()
    eventually(lambda: cluster.owner(slots[0]))
    cluster.nodes[killed].restart()
    cluster.wait_for_replica(killed)


def test_no_collective_is_lost_or_wrong_while_slots_move_and_primaries_are_replaced(cluster: EmbeddedCluster) -> None:
    workers = Group(cluster.url, "moving", 3, timeout_s=40, chunk_bytes=20_000)
    slots = [slot_of(place) for place in workers.members[0]._session.places]  # type: ignore[union-attr]
    assert len({cluster.owner(slot) for slot in slots}) == 3
    rows = [np.random.default_rng(rank).standard_normal(60_000).astype(np.float32) for rank in range(3)]
    expected, over = np.mean(rows, axis=0, dtype=np.float64), threading.Event()

    def work(comm: Communicator) -> int:
        count = 0
        while comm.allreduce(float(not over.is_set()), op="max"):
            mine = rows[comm.rank].copy()
            comm.allreduce(mine, codec="fp32", out=mine)
            np.testing.assert_allclose(mine, expected, atol=1e-6)
            assert comm.broadcast(count, root=count % 3) == count
            count += 1
        return count

    def strike() -> None:
        try:
            disturb(cluster, slots)
        finally:
            over.set()

    outcomes = in_parallel([strike, *(lambda comm=comm: work(comm) for comm in workers.members)])  # type: ignore[misc]
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
    assert len({outcome.value for outcome in outcomes[1:]}) == 1
    assert outcomes[1].value >= 10
    workers.close()
    with contextlib.closing(ParameterStore(cluster.url, job="moving")) as parameters:
        assert parameters.count_keys() == 0
