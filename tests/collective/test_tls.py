"""rediss://: the same collectives through Python's ssl. A proxy that ends TLS stands before the real store."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trustme
from groups import Group

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
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.target = int(store.tcp_url.rpartition(":")[2])
        password = store.tcp_url.partition("://")[2].partition("@")[0]
        self.url = f"rediss://{password}@localhost:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            secure = self.context.wrap_socket(connection, server_side=True)
            plain = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self._pump, args=(plain, secure), daemon=True).start()
            self._pump(secure, plain)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
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
    made.listener.close()


def check_collectives(workers: Group) -> None:
    rows = [np.random.default_rng(rank).standard_normal(700_000).astype(np.float32) for rank in range(3)]
    for result in workers.run(lambda comm: comm.allreduce(rows[comm.rank], codec="fp32")):
        np.testing.assert_allclose(result, np.mean(rows, axis=0), atol=1e-6)
    assert workers.run(lambda comm: comm.allreduce(comm.rank, op="max")) == [2, 2, 2]


def test_collectives_over_tls(store: EmbeddedStore, job: str, proxy: TlsProxy, tmp_path: Path) -> None:
    workers = Group(f"{proxy.url}?ssl_ca_certs={tmp_path}/ca.pem", job, 3)
    check_collectives(workers)
    workers.close()


def test_a_client_certificate_is_shown(store: EmbeddedStore, authority: trustme.CA, job: str, tmp_path: Path) -> None:
    proxy = TlsProxy(store, authority, client_certificates=True)
    options = f"ssl_ca_certs={tmp_path}/ca.pem&ssl_certfile={tmp_path}/cert.pem&ssl_keyfile={tmp_path}/key.pem"
    workers = Group(f"{proxy.url}?{options}", job, 3)
    check_collectives(workers)
    workers.close()
    proxy.listener.close()


def test_a_certificate_that_is_not_trusted_is_refused(proxy: TlsProxy, job: str) -> None:
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        Group(proxy.url, job, 2)


def test_verification_can_be_switched_off_by_url(proxy: TlsProxy, job: str) -> None:
    workers = Group(f"{proxy.url}?ssl_cert_reqs=none&ssl_check_hostname=false", job, 3)
    check_collectives(workers)
    workers.close()


def test_the_authority_and_the_password_may_come_from_the_environment(
    job: str, proxy: TlsProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password, _, address = proxy.url.removeprefix("rediss://:").partition("@")
    monkeypatch.setenv("SMLT_STORE_CA_CERTS", f"{tmp_path}/ca.pem")
    monkeypatch.setenv("SMLT_STORE_PASSWORD", password)
    workers = Group(f"rediss://{address}", job, 3)
    check_collectives(workers)
    workers.close()
