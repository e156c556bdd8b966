"""Connections that are dead and do not say so: half-open ones are given up, slow ones are not."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import trustme
from groups import in_parallel
from proxy import Connection, Proxy
from stores import lanes_of
from test_tls import TlsProxy

from smlt import Communicator
from smlt.errors import StoreUnavailable
from smlt.store.embedded import EmbeddedStore

UP, DOWN, TOKENS = range(3)


def data_connections(proxy: Proxy) -> list[Connection]:
    """Those to one server: the control plane's came before."""
    return lanes_of(proxy.connections)


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("lane", [UP, DOWN, TOKENS])
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_a_lane_that_goes_half_open_is_replaced(
    store: EmbeddedStore, job: str, tmp_path: Path, lane: int, way: str, encrypted: bool
) -> None:
    with Proxy(store) as proxy:
        url = proxy.url
        if encrypted:
            authority = trustme.CA()
            authority.cert_pem.write_to_path(tmp_path / "ca.pem")
            secure = TlsProxy(store, authority, client_certificates=False)
            secure.doors.targets = proxy.doors.ports
            url = secure.url(f"?ssl_ca_certs={tmp_path}/ca.pem")
        comms = [
            Communicator(each, job=job, rank=rank, world_size=2, timeout_s=12, chunk_bytes=64 * 1024)
            for rank, each in enumerate((store.url, url))
        ]
        assert in_parallel([lambda comm=comm: comm.allreduce(1.0) for comm in comms])[1].value == 1.0  # type: ignore[misc]
        if (lane, way, encrypted) != (DOWN, "down", False):  # once it is noticed after the usual time
            for comm in comms:
                assert comm._session is not None
                comm._session._engine.set_silence(1000)
        getattr(data_connections(proxy)[lane], way).at(
            50_000 if (lane, way) in ((UP, "up"), (DOWN, "down")) else 300, "silence"
        )
        x = np.ones(300_000, np.float32)
        for _ in range(3):
            outcomes = in_parallel([lambda comm=comm: comm.allreduce(x * comm.rank, codec="fp32") for comm in comms])  # type: ignore[misc]
            for outcome in outcomes:
                assert outcome.error is None, outcome.error
                assert (outcome.value == 0.5).all()
        assert len(proxy.connections) >= 1 + 6 * len(proxy.doors.ports)
        in_parallel([comm.close for comm in comms])


def test_a_store_that_is_slow_but_moves_is_waited_for(store: EmbeddedStore, job: str) -> None:
    """A chunk takes several times as long to come down as a connection may be silent."""
    with Proxy(store) as proxy:
        comms = [
            Communicator(url, job=job, rank=rank, world_size=2, timeout_s=30, chunk_bytes=64 * 1024)
            for rank, url in enumerate((store.url, proxy.url))
        ]
        for comm in comms:
            assert comm._session is not None
            comm._session._engine.set_silence(400)
        before = len(proxy.connections)
        for connection in data_connections(proxy):
            connection.down.piece, connection.down.delay_s = 1024, 0.02
        outcomes = in_parallel([lambda comm=comm: comm.allreduce(np.full(30_000, comm.rank, np.float32)) for comm in comms])  # type: ignore[misc]
        for outcome in outcomes:
            assert outcome.error is None, outcome.error
            assert (outcome.value == 0.5).all()
        assert len(proxy.connections) == before
        in_parallel([comm.close for comm in comms])


@pytest.mark.parametrize("freeze_s", [1.0, 5.0])
def test_a_network_that_freezes_for_a_while_changes_nothing(store: EmbeddedStore, job: str, freeze_s: float) -> None:
    with Proxy(store) as proxy:
        comms = [Communicator(proxy.url, job=job, rank=rank, world_size=3, timeout_s=30) for rank in range(3)]
        x = np.ones(500_000, np.float32)
        begun = threading.Barrier(4, timeout=10)

        def freeze() -> None:
            begun.wait()
            proxy.freeze()
            time.sleep(freeze_s)
            proxy.thaw()

        def work(comm: Communicator) -> None:
            begun.wait()
            for _ in range(3):
                assert (comm.allreduce(x * comm.rank, codec="fp32") == 1).all()

        for outcome in in_parallel([freeze, *(lambda comm=comm: work(comm) for comm in comms)]):  # type: ignore[misc]
            assert outcome.error is None, outcome.error
        in_parallel([comm.close for comm in comms])


def test_a_store_that_says_nothing_more_ends_the_collective_at_its_deadline(store: EmbeddedStore, job: str) -> None:
    with Proxy(store) as proxy:
        comms = [Communicator(proxy.url, job=job, rank=rank, world_size=2, timeout_s=3) for rank in range(2)]
        proxy.on_connect = Connection.silence
        proxy.freeze()
        began = time.monotonic()
        for outcome in in_parallel([lambda comm=comm: comm.allreduce(1.0) for comm in comms]):  # type: ignore[misc]
            assert isinstance(outcome.error, StoreUnavailable), outcome.error
        assert time.monotonic() - began < 6
        proxy.on_connect = lambda connection: None
        proxy.thaw()
        in_parallel([comm.close for comm in comms])
