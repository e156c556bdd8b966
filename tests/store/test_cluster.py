"""A real Valkey Cluster as a parameter store: where its places are, and that the control plane follows them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest

from smlt.client.acl import acl_user
from smlt.client.doctor import diagnose
from smlt.errors import ConfigError, StoreAuthError, StoreUnavailable
from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore
from smlt.store.embedded_cluster import EmbeddedCluster
from smlt.store.parameter import ParameterStore
from smlt.store.slots import slot_of
from smlt.store.url import endpoints

_jobs = (f"cluster-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    with EmbeddedCluster(3, 1, memory_bytes=64 << 20, node_timeout_ms=1000) as made:
        yield made


@pytest.fixture
def parameters(cluster: EmbeddedCluster) -> Iterator[ParameterStore]:
    with contextlib.closing(ParameterStore(cluster.url, job=next(_jobs))) as made:
        yield made
        made.sweep()


def join(parameters: ParameterStore, rank: int = 0) -> tuple[str, list[str]]:
    session, _, places = parameters.register(rank=rank, world_size=3, generation=1, worker_id=str(rank))
    return session, places


def put_everywhere(parameters: ParameterStore, session: str, places: list[str]) -> None:
    for place, url in zip(places, parameters.locate(places), strict=True):
        with parameters.nodes.connected(url) as client:
            client.set(parameters.session_prefix(session, place) + "x", b"chunk")


def test_each_primary_has_a_place_and_a_job_that_ends_leaves_nothing(
    cluster: EmbeddedCluster, parameters: ParameterStore
) -> None:
    session, places = join(parameters)
    assert sorted(cluster.owner(slot_of(place)) for place in places) == [0, 1, 2]
    assert [(server.cluster, server.maxmemory_bytes) for server in parameters.survey()] == [(True, 64 << 20)] * 3
    put_everywhere(parameters, session, places)
    with contextlib.closing(ParameterStore(f"{endpoints(cluster.url)[0]}?groups=5", job=parameters.job)) as other:
        assert len(other.propose_places()) == 5
        assert join(other, 1)[1] == places  # the first to join has chosen
    assert parameters.count_keys(f"{session}:*") == 3
    assert not parameters.leave(rank=0, generation=1, worker_id="0", session=session)
    assert parameters.leave(rank=1, generation=1, worker_id="1", session=session)
    assert parameters.count_keys() == 0


@pytest.mark.parametrize("how", ["migrate", "migrate_at_once"])
def test_the_control_plane_follows_its_slot(cluster: EmbeddedCluster, parameters: ParameterStore, how: str) -> None:
    session, places = join(parameters)
    before, slot = parameters.run_ids(places), slot_of(places[0])
    home = cluster.owner(slot)
    getattr(cluster, how)(slot, (home + 1) % 3)
    assert sorted(parameters.roster(session)) == [0]
    parameters.abort("a pipeline of commands")
    assert [old == new for old, new in zip(before, parameters.run_ids(places), strict=True)] == [False, True, True]
    put_everywhere(parameters, session, places)
    getattr(cluster, how)(slot, home)
    assert parameters.run_ids(places) == before
    assert parameters.sweep() == 6  # roster, session, ctl, and one at each place


def test_the_control_plane_follows_a_replica_that_takes_over(cluster: EmbeddedCluster) -> None:
    with contextlib.closing(ParameterStore(cluster.url, job="failover")) as parameters:
        session, places = join(parameters)
        Coordination(parameters).open_generation(1, "scheduler")
        before, at = parameters.run_ids(places), cluster.owner(slot_of(places[0]))
        replica = cluster.replica_of(at)
        cluster.fail_over(replica)
        assert Coordination(parameters).generation() == 1
        assert [old == new for old, new in zip(before, parameters.run_ids(places), strict=True)] == [False, True, True]
        with contextlib.closing(parameters.impatient()) as impatient:
            assert sorted(impatient.roster(session)) == [0]
        assert parameters.sweep() > 0


def test_a_url_of_the_wrong_kind_is_told_the_right_one(cluster: EmbeddedCluster, store: EmbeddedStore) -> None:
    node = cluster.nodes[0].tcp_url
    address = node.partition("@")[2]
    elsewhere = next(job for job in _jobs if cluster.owner(slot_of(f"{job}.0")) != 0)
    for call in (ParameterStore(node, job="x").check, lambda: join(ParameterStore(node, job=elsewhere))):
        with pytest.raises(ConfigError, match=rf"redis\+cluster://{address}"):
            call()
    single = store.tcp_url.replace("redis://", "redis+cluster://")
    with pytest.raises(ConfigError, match="is no cluster: write redis://"):
        ParameterStore(single, job="x").check()
    with pytest.raises(StoreAuthError):
        ParameterStore(f"redis+cluster://:wrong@{address}", job="x").check()
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        ParameterStore("redis+cluster://127.0.0.1:1", job="x", timeout_s=1, retries=0).check()


def test_the_user_that_acl_prints_is_enough_on_a_cluster(cluster: EmbeddedCluster) -> None:
    line = acl_user("worker", ["limited"], [], "secret").line
    for node in cluster.nodes:
        node.command(*line.split())
    url = f"redis+cluster://worker:secret@{cluster.nodes[0].tcp_url.partition('@')[2]}"
    with contextlib.closing(ParameterStore(url, job="limited")) as parameters:
        session, places = join(parameters)
        assert parameters.locate(places)
        put_everywhere(parameters, session, places)
        assert parameters.leave(rank=0, generation=1, worker_id="0", session=session)
        assert parameters.count_keys() == 0


def test_doctor_looks_at_every_primary(cluster: EmbeddedCluster) -> None:
    findings = {finding.name: finding for finding in diagnose(cluster.url)}
    assert [findings[f"{name} {j}"].status for name in ("store", "round trip", "bandwidth") for j in range(3)] == ["ok"] * 9
    assert findings["store cluster"].text == "3 primaries, 3 groups"
