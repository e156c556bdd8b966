"""What a store answers while it starts, fails over, is busy or full: it is waited for, within the collective's deadline."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import redis
from groups import Group, in_parallel
from proxy import Connection, Proxy
from stores import KIND

from smlt import Communicator
from smlt.errors import StoreAuthError, StoreError, StoreFull, StoreUnavailable
from smlt.store.embedded import EmbeddedStore


@pytest.fixture
def own() -> Iterator[EmbeddedStore]:
    with EmbeddedStore() as server:
        yield server


def without_replicas(client: redis.Redis) -> Callable[[], object]:
    client.config_set("min-replicas-to-write", 1)
    return lambda: client.config_set("min-replicas-to-write", 0)


def read_only(client: redis.Redis) -> Callable[[], object]:
    client.replicaof("127.0.0.1", 1)
    return lambda: client.replicaof("NO", "ONE")


def busy(client: redis.Redis) -> Callable[[], object]:
    client.config_set("busy-reply-threshold", 10)
    other = redis.Redis(
        connection_pool=redis.ConnectionPool(
            **client.connection_pool.connection_kwargs, connection_class=client.connection_pool.connection_class
        )
    )

    def spin() -> None:
        with contextlib.suppress(redis.RedisError):
            other.eval("while true do end", 0)

    threading.Thread(target=spin, daemon=True).start()
    time.sleep(0.1)
    return client.script_kill


def full(client: redis.Redis) -> Callable[[], object]:
    before = client.config_get("maxmemory")["maxmemory"]
    client.config_set("maxmemory", 1)
    return lambda: client.config_set("maxmemory", before)


def no_more_clients(client: redis.Redis) -> Callable[[], object]:
    client.config_set("maxclients", 1)
    for other in client.client_list():
        if other["name"].startswith("smlt-"):
            with contextlib.suppress(redis.ResponseError):
                client.client_kill_filter(_id=other["id"])
    return lambda: client.config_set("maxclients", 1000)


TROUBLES = [without_replicas, read_only, busy, full, no_more_clients]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [100, 400_000])
def test_a_refusal_that_passes_changes_nothing(
    own: EmbeddedStore, trouble: Callable[..., Callable[[], object]], size: int
) -> None:
    workers = Group(own.url, "refused", 3, timeout_s=20, chunk_bytes=64 * 1024)
    rows = [np.random.default_rng(rank).standard_normal(size).astype(np.float32) for rank in range(3)]
    expected = np.mean(rows, axis=0, dtype=np.float64)
    ended = threading.Event()

    def disturb() -> None:
        with redis.Redis.from_url(own.url) as client:
            client.ping()
            while not ended.wait(0.02):
                mend = trouble(client)
                ended.wait(0.15)
                deadline = time.monotonic() + 5
                while time.monotonic() < deadline:
                    with contextlib.suppress(redis.RedisError):
                        mend()
                        break
                ended.wait(0.4)

    def work(comm: Communicator) -> None:
        until = time.monotonic() + 2
        while comm.allreduce(np.float32(time.monotonic() < until), op="min"):
            mine = rows[comm.rank].copy()
            comm.allreduce(mine, codec="fp32", out=mine)
            np.testing.assert_allclose(mine, expected, atol=1e-5)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        workers.run(work)
    finally:
        ended.set()
        disturber.join()
    workers.close()


@pytest.mark.parametrize("trouble", [without_replicas, read_only], ids=lambda f: f.__name__)
def test_a_refusal_that_lasts_is_named_at_the_deadline(
    own: EmbeddedStore, trouble: Callable[..., Callable[[], object]]
) -> None:
    workers = Group(own.url, "refused", 2, timeout_s=1.5)
    with redis.Redis.from_url(own.url) as client:
        mend = trouble(client)
        outcomes = workers.attempt(lambda comm: comm.allreduce(np.ones(100_000, np.float32)))
        for outcome in outcomes:
            assert isinstance(outcome.error, StoreUnavailable), outcome.error
            assert "NOREPLICAS" in str(outcome.error) or "READONLY" in str(outcome.error)
            assert "gave up after 1.5 s" in str(outcome.error)
        mend()
    workers.close()


def test_a_store_that_stays_full_is_not_waited_for_to_the_end(own: EmbeddedStore) -> None:
    workers = Group(own.url, "full", 2, timeout_s=4)
    with redis.Redis.from_url(own.url) as client:
        mend = full(client)
        began = time.monotonic()
        outcomes = workers.attempt(lambda comm: comm.allreduce(np.ones(100_000, np.float32)))
        assert time.monotonic() - began < 3.5
        for outcome in outcomes:
            assert isinstance(outcome.error, StoreFull), outcome.error
            assert "raise its maxmemory" in str(outcome.error)
        mend()
    workers.close()


#: Only the first answer after the handshake: later connections are honest.
def once(reply: bytes) -> Callable[[Connection], None]:
    said = threading.Event()

    def on_connect(connection: Connection) -> None:
        def change(data: bytes) -> bytes:
            if connection.down.passed < 10 or said.is_set():
                return data
            said.set()
            return reply

        connection.down.change = change

    return on_connect


@pytest.mark.parametrize(
    "reply",
    [
        b"-LOADING Valkey is loading the dataset in memory\r\n",
        b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n",
        b"-CLUSTERDOWN The cluster is down\r\n",
        b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
        b"-MISCONF Valkey is configured to save RDB snapshots, but it is currently unable to persist on disk\r\n",
        b"-UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)\r\n",
        b"-ERR max number of clients reached\r\n",
    ],
    ids=lambda reply: reply.split()[0].decode(),
)
def test_every_error_that_passes_is_survived(store: EmbeddedStore, job: str, reply: bytes) -> None:
    with Proxy(store) as proxy:
        proxy.on_connect = once(reply)
        comms = [
            Communicator(url, job=job, rank=rank, world_size=2, timeout_s=10) for rank, url in enumerate((store.url, proxy.url))
        ]
        outcomes = in_parallel([lambda comm=comm: comm.allreduce(np.full(50_000, comm.rank, np.float32)) for comm in comms])  # type: ignore[misc]
        for outcome in outcomes:
            assert outcome.error is None, outcome.error
            assert (outcome.value == 0.5).all()
        in_parallel([comm.close for comm in comms])


not_on_a_cluster = pytest.mark.skipif(KIND == "cluster", reason="where these are followed")


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        pytest.param(b"-MOVED 3999 127.0.0.1:6381\r\n", StoreError, "is of a cluster", marks=not_on_a_cluster),
        pytest.param(b"-ASK 3999 127.0.0.1:6381\r\n", StoreError, "write redis+cluster://", marks=not_on_a_cluster),
        (b"-NOAUTH Authentication required.\r\n", StoreAuthError, "refused a command"),
        (b"-NOPERM this user has no permissions\r\n", StoreAuthError, "refused a command"),
    ],
    ids=lambda value: value.split()[0].decode() if isinstance(value, bytes) else "",
)
def test_errors_that_do_not_pass_end_the_collective_at_once(
    store: EmbeddedStore, job: str, reply: bytes, kind: type[StoreError], words: str
) -> None:
    with Proxy(store) as proxy:
        honest = Communicator(store.url, job=job, rank=0, world_size=2, timeout_s=4)
        victim = Communicator(proxy.url, job=job, rank=1, world_size=2, timeout_s=60)
        for connection in proxy.connections:
            connection.down.change = lambda data: reply
        began = time.monotonic()
        outcomes = in_parallel([lambda: honest.allreduce(np.ones(1000)), lambda: victim.allreduce(np.ones(1000))])
        assert time.monotonic() - began < 10
        assert type(outcomes[1].error) is kind, outcomes[1].error
        assert words in str(outcomes[1].error)
        for connection in proxy.connections:
            connection.down.change = None
        in_parallel([honest.close, victim.close])


def test_a_password_that_is_changed_is_met_when_connecting_again(own: EmbeddedStore) -> None:
    workers = Group(own.url, "auth", 2, timeout_s=20)
    with redis.Redis.from_url(own.url) as client:
        client.config_set("requirepass", "another")
        for other in client.client_list():
            if other["name"].startswith("smlt-"):
                client.client_kill_filter(_id=other["id"])
        began = time.monotonic()
        for outcome in workers.attempt(lambda comm: comm.allreduce(np.ones(100))):
            assert isinstance(outcome.error, StoreAuthError), outcome.error
            assert "another" not in str(outcome.error)
        assert time.monotonic() - began < 5
        workers.close()
