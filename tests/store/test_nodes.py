"""Several independent servers as one store: who agrees on what, and what is cleaned where."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator

import pytest

from smlt.client.doctor import diagnose
from smlt.errors import ConfigError, StoreUnavailable
from smlt.store.embedded_set import EmbeddedStores
from smlt.store.parameter import ParameterStore
from smlt.store.server import smallest_memory_bytes
from smlt.store.url import endpoints

_jobs = (f"nodes-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def nodes() -> Iterator[EmbeddedStores]:
    with EmbeddedStores(3, memory_bytes=64 << 20) as made:
        yield made


@pytest.fixture
def parameters(nodes: EmbeddedStores) -> Iterator[ParameterStore]:
    with contextlib.closing(ParameterStore(nodes.url, job=next(_jobs), timeout_s=2, retries=0)) as made:
        yield made
        with contextlib.suppress(StoreUnavailable):
            made.sweep()


def put_everywhere(parameters: ParameterStore, session: str, places: list[str]) -> None:
    for place, url in zip(places, parameters.locate(places), strict=True):
        with parameters.nodes.connected(url) as client:
            client.set(parameters.session_prefix(session, place) + "x", b"chunk")


def join(parameters: ParameterStore, rank: int = 0) -> tuple[str, list[str]]:
    session, _, places = parameters.register(rank=rank, world_size=3, generation=1, worker_id=str(rank))
    return session, places


def test_every_node_has_a_place_and_stays_behind_it(nodes: EmbeddedStores, parameters: ParameterStore) -> None:
    places = parameters.propose_places()
    assert places == [f"{parameters.job}.{j}" for j in range(3)]
    assert parameters.locate(places) == endpoints(nodes.url)
    servers = parameters.survey()
    assert [server.run_id for server in servers] == parameters.run_ids(places)
    assert len({server.run_id for server in servers}) == 3
    assert smallest_memory_bytes(servers) == 64 << 20


def test_a_list_in_another_order_or_of_another_length_is_refused(nodes: EmbeddedStores, parameters: ParameterStore) -> None:
    _, places = join(parameters)
    first, second, third = endpoints(nodes.tcp_url)  # the same servers by other addresses are the same servers
    with contextlib.closing(ParameterStore(f"{first},{second},{third}", job=parameters.job)) as other:
        assert join(other, 1)[1] == places
    for url, message in (
        (f"{first},{third},{second}", "another order.*its node 1 is their node 2"),
        (f"{second},{first},{third}", "another order.*its node 1 is their node 0"),
        (f"{first},{second}", "has 2 nodes, the workers that are already there use 3"),
        (first, "has 1 node, the workers that are already there use 3"),
    ):
        with contextlib.closing(ParameterStore(url, job=parameters.job)) as other, pytest.raises(ConfigError, match=message):
            join(other, 2)
    session, _ = join(parameters)
    assert sorted(parameters.roster(session)) == [0, 1]  # the one that was refused has given its rank back
    join(parameters, 2)


def test_the_last_to_leave_and_a_sweep_clean_every_node(parameters: ParameterStore) -> None:
    session, places = join(parameters)
    join(parameters, 1)
    put_everywhere(parameters, session, places)
    assert parameters.count_keys(f"{session}:*") == 3
    assert not parameters.leave(rank=0, generation=1, worker_id="0", session=session)
    assert parameters.count_keys(f"{session}:*") == 3
    assert parameters.leave(rank=1, generation=1, worker_id="1", session=session)
    assert parameters.count_keys() == 0
    put_everywhere(parameters, "1.x", places)
    put_everywhere(parameters, "2.y", places)
    parameters.delete_generations_before(2)
    assert parameters.count_keys() == parameters.count_keys("2.y:*") == 3
    assert parameters.sweep() == 3


@pytest.fixture
def own() -> Iterator[tuple[EmbeddedStores, ParameterStore]]:
    """Nodes for one test, which may end them."""
    with (
        EmbeddedStores(3, memory_bytes=64 << 20) as made,
        contextlib.closing(ParameterStore(made.url, job="own", timeout_s=1, retries=0)) as parameters,
    ):
        yield made, parameters


def test_a_node_that_is_gone_does_not_keep_the_others_from_being_cleaned(own: tuple[EmbeddedStores, ParameterStore]) -> None:
    made, parameters = own
    put_everywhere(parameters, "1.x", parameters.propose_places())
    made.nodes[1].close()
    for call in (parameters.sweep, parameters.check):
        with pytest.raises(StoreUnavailable, match=made.nodes[1].url.partition("?")[0]):
            call()
    for node in (made.nodes[0], made.nodes[2]):
        with contextlib.closing(ParameterStore(node.url, job="own")) as left:
            assert left.count_keys() == 0


def test_a_node_that_was_restarted_is_welcome_and_known_by_its_run_id(own: tuple[EmbeddedStores, ParameterStore]) -> None:
    made, parameters = own
    _, places = join(parameters)
    before = parameters.run_ids(places)
    os.kill(made.nodes[1].pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while made.nodes[1].alive and time.monotonic() < deadline:
        time.sleep(0.01)
    made.nodes[1].restart()
    assert [old == new for old, new in zip(before, parameters.run_ids(places), strict=True)] == [True, False, True]
    assert join(parameters, 1)[1] == places


def test_doctor_looks_at_every_node(nodes: EmbeddedStores) -> None:
    url = f"{nodes.tcp_url},{endpoints(nodes.tcp_url)[0]}"
    findings = {finding.name: finding for finding in diagnose(url)}
    for name in ("store", "round trip", "bandwidth", "clock"):
        assert [finding.status for j in range(3) for finding in [findings[f"{name} {j}"]]] == ["ok"] * 3
    assert findings["store 2"].text.endswith(f"at redis://{endpoints(nodes.tcp_url)[2].partition('@')[2]}")
    assert "nodes 0 and 3 are the same server" in findings["store nodes"].text
    password = nodes.tcp_url.partition("@")[0].rpartition(":")[2]
    assert password not in str(findings)
