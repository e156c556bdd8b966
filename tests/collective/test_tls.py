"""rediss://: the same collectives through Python's ssl. A proxy that ends TLS stands before the real store."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import trustme
from groups import Group
from stores import Doors, asks_for_slots

from smlt.errors import StoreUnavailable
from smlt.store.embedded import EmbeddedStore


class TlsProxy:
    """Accepts TLS on loopback and passes the plain bytes on to the store."""

    def __init__(self, store: EmbeddedStore, authority: trustme.CA, *, client_certificates: bool) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(self.context)
        if client_certificates:
            authority.configure_trust(self.context)
            self.context.verify_mode = ssl.CERT_REQUIRED
        self.doors = Doors(store, scheme="rediss", host="localhost")
        self.url = self.doors.url  # takes options
        for number in range(len(self.doors.listeners)):
            threading.Thread(target=self._accept, args=(number,), daemon=True).start()

    def _accept(self, number: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.doors.listeners[number].accept()
                threading.Thread(target=self._serve, args=(connection, number), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            secure = self.context.wrap_socket(connection, server_side=True)
            plain = socket.create_connection(("127.0.0.1", self.doors.targets[number]))
            asked = threading.Event()
            threading.Thread(target=self._pump, args=(plain, secure, lambda data: data, asked), daemon=True).start()
            self._pump(secure, plain, lambda data: asked.set() if asks_for_slots(data) else None, asked)

    def _pump(
        self, source: socket.socket, sink: socket.socket, heard: Callable[[bytes], object], asked: threading.Event
    ) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := source.recv(1 << 16):
                heard(data)
                sink.sendall(self.doors.translate(data) if asked.is_set() else data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.close()


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    client = authority.issue_cert("worker")
    client.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    client.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    return authority


@pytest.fixture
def proxy(store: EmbeddedStore, authority: trustme.CA) -> Iterator[TlsProxy]:
    made = TlsProxy(store, authority, client_certificates=False)
    yield made
    made.doors.close()


def check_collectives(workers: Group) -> None:
    rows = [np.random.default_rng(rank).standard_normal(700_000).astype(np.float32) for rank in range(3)]
    for result in workers.run(lambda comm: comm.allreduce(rows[comm.rank], codec="fp32")):
        np.testing.assert_allclose(result, np.mean(rows, axis=0), atol=1e-6)
    assert workers.run(lambda comm: comm.allreduce(comm.rank, op="max")) == [2, 2, 2]


def test_collectives_over_tls(store: EmbeddedStore, job: str, proxy: TlsProxy, tmp_path: Path) -> None:
    workers = Group(proxy.url(f"?ssl_ca_certs={tmp_path}/ca.pem"), job, 3)
    check_collectives(workers)
    workers.close()


def test_a_client_certificate_is_shown(store: EmbeddedStore, authority: trustme.CA, job: str, tmp_path: Path) -> None:
    proxy = TlsProxy(store, authority, client_certificates=True)
    options = f"ssl_ca_certs={tmp_path}/ca.pem&ssl_certfile={tmp_path}/cert.pem&ssl_keyfile={tmp_path}/key.pem"
    workers = Group(proxy.url(f"?{options}"), job, 3)
    check_collectives(workers)
    workers.close()
    proxy.doors.close()


def test_a_certificate_that_is_not_trusted_is_refused(proxy: TlsProxy, job: str) -> None:
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        Group(proxy.url(), job, 2)


def test_verification_can_be_switched_off_by_url(proxy: TlsProxy, job: str) -> None:
    workers = Group(proxy.url("?ssl_cert_reqs=none&ssl_check_hostname=false"), job, 3)
    check_collectives(workers)
    workers.close()


def test_the_authority_and_the_password_may_come_from_the_environment(
    job: str, proxy: TlsProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = proxy.url().partition("://:")[2].partition("@")[0]
    monkeypatch.setenv("SMLT_STORE_CA_CERTS", f"{tmp_path}/ca.pem")
    monkeypatch.setenv("SMLT_STORE_PASSWORD", password)
    workers = Group(proxy.url().replace(f":{password}@", ""), job, 3)
    check_collectives(workers)
    workers.close()
