"""The control plane: what a server must be, membership, reports, and the errors that say what is wrong."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt.errors import ConfigError, FencedError, StoreAuthError, StoreFull, StoreUnavailable
from smlt.store.embedded import EmbeddedStore, find_server
from smlt.store.parameter import ParameterStore, redact


def test_the_embedded_server_will_do(parameters: ParameterStore) -> None:
    info = parameters.check()
    assert (info.cluster, info.maxmemory_policy) == (False, "noeviction")
    assert info.version >= {"Valkey": (7, 2, 0), "Redis": (6, 2, 0)}[info.product]
    assert info.maxmemory_bytes > info.used_memory_bytes > 0


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", ""])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must begin with redis://"):
        ParameterStore(url, job="x")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:1/2?ssl_keyfile=x", "redis://host:1/2"),
        ("unix:///tmp/s?password=secret", "unix:/tmp/s"),
        ("rediss://:sec@ret@host", "rediss://host"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://:se#cret@host", "redis://..."),
        ("redis://:secret", "redis://..."),
        ("redis://[::1", "redis://..."),
        ("unix:///tmp/s?password=sec@ret", "unix:///tmp/s"),
    ],
)
def test_no_secret_is_shown(url: str, shown: str) -> None:
    assert redact(url).replace("///", "/") == shown.replace("///", "/")


awkward = st.text("/?#@:[]%=&\N{FULLWIDTH NUMBER SIGN}1", max_size=4)


@given(
    scheme=st.sampled_from(["redis", "rediss", "unix", "http"]),
    before=awkward,
    after=awkward,
    host=st.sampled_from(["h:1/0", "/s"]),
)
def test_a_password_that_breaks_its_url_is_never_shown(scheme: str, before: str, after: str, host: str) -> None:
    url = f"{scheme}://:{before}hunter2{after}@{host}"
    shown = redact(url)
    try:
        ParameterStore(url, job="x").close()
    except ConfigError as error:
        shown += "".join(traceback.format_exception(error))
    assert "hunter2" not in shown.lower()


def test_a_url_that_cannot_be_read_says_how_a_password_is_written() -> None:
    for url in ("redis://:a/b@host", "redis://:a#b@host", "redis://:a?b@host", "redis://host:port", "redis://[::1"):
        with pytest.raises(ConfigError, match="be written %2F, %3F, %23 and %40"):
            ParameterStore(url, job="x")


def test_options_in_the_url_do_not_change_what_is_read(store: EmbeddedStore, job: str) -> None:
    with contextlib.closing(ParameterStore(f"{store.url}&decode_responses=true&socket_timeout=1", job=job)) as parameters:
        key = parameters.key("meta:0")
        assert parameters.read_streams({key: "0-0"}, 2000) == []  # waits less than the socket's timeout
        parameters.client.xadd(key, {"j": "1"})
        ((stream, [(_, fields)]),) = parameters.read_streams({key: "0-0"}, 10)
        assert (stream, fields) == (key.encode(), {b"j": b"1"})
        assert parameters.sweep() == 1


class OldServer:
    """Answers INFO as an old or clustered server would: such servers cannot be installed here."""

    def __init__(self, info: str) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}"
        self.info = f"${len(info)}\r\n{info}\r\n".encode()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(4096):
                commands = data.count(b"*")
                connection.sendall(self.info if b"INFO" in data.upper().split(b"\r\n") else b"+OK\r\n" * commands)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("redis_version:6.0.16\r\n", r"is Redis 6\.0\.16; SMLT needs Redis 6\.2 or newer"),
        ("redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:7.0.1\r\n", r"Valkey 7\.0\.1; SMLT needs Valkey 7\.2"),
        ("redis_version:7.4.0\r\ncluster_enabled:1\r\n", r"is a node of a cluster: write redis\+cluster://127\.0\.0\.1:"),
        ("uptime:3\r\n", "no Redis or Valkey"),
    ],
)
def test_a_server_that_will_not_do_is_told_why(info: str, message: str) -> None:
    server = OldServer(info)
    with pytest.raises((ConfigError, StoreUnavailable), match=message):
        ParameterStore(server.url, job="x", timeout_s=2).check()
    server.listener.close()


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n", "does not speak the Redis protocol"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "does not speak the Redis protocol"),  # a TLS alert
        (b"*99999999999\r\n", "does not speak the Redis protocol"),
        (b"", "cannot be reached"),
    ],
)
def test_what_is_not_a_redis_is_told_so(greeting: bytes, message: str) -> None:
    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        with pytest.raises(StoreUnavailable, match=f"the store at redis://127.0.0.1:{port} {message}"):
            ParameterStore(f"redis://:secret@127.0.0.1:{port}", job="x", timeout_s=2).check()


def test_a_real_clustered_server_is_refused(tmp_path: Path) -> None:
    arguments = ["--port", "0", "--unixsocket", str(tmp_path / "s"), "--cluster-enabled", "yes", "--dir", str(tmp_path)]
    process = subprocess.Popen([find_server(), *arguments, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        parameters = ParameterStore(f"unix://{tmp_path}/s", job="x")
        deadline = time.monotonic() + 10
        while not (tmp_path / "s").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ConfigError, match="is a node of a cluster: write redis"):
            parameters.check()
    finally:
        process.terminate()
        process.wait()


def test_a_wrong_password(store: EmbeddedStore) -> None:
    port = store.tcp_url.rpartition(":")[2]
    with pytest.raises(StoreAuthError, match=f"the store at redis://127.0.0.1:{port} refused") as caught:
        ParameterStore(f"redis://:not-this-one@127.0.0.1:{port}", job="x").check()
    assert "not-this-one" not in str(caught.value)
    with pytest.raises(StoreAuthError):
        ParameterStore(f"redis://127.0.0.1:{port}", job="x").check()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(StoreUnavailable, match=f"redis://127.0.0.1:{port} cannot be reached"):
        ParameterStore(f"redis://127.0.0.1:{port}", job="x", timeout_s=1).check()


def test_a_full_store() -> None:
    with EmbeddedStore(memory_bytes=3 << 20) as small:
        parameters = ParameterStore(small.url, job="full")

        def fill() -> None:
            for generation in range(100):
                parameters.register(rank=0, world_size=1, generation=generation, worker_id="a", tuning="x" * 100_000)

        with pytest.raises(StoreFull, match="raise its maxmemory"):
            fill()


def test_a_rank_belongs_to_one_worker(parameters: ParameterStore) -> None:
    def register(worker: str, rank: int = 0, size: int = 2) -> str:
        return parameters.register(rank=rank, world_size=size, generation=1, worker_id=worker)[0]

    session = register("a")
    assert register("a") == session
    assert register("b", rank=1) == session
    with pytest.raises(FencedError, match="held by another worker"):
        register("c")
    with pytest.raises(ConfigError, match="expects 3 workers"):
        register("d", size=3)
    with pytest.raises(ConfigError, match="rank 2 is not one of"):
        register("e", rank=2)
    assert {rank: row["worker_id"] for rank, row in parameters.roster(session).items()} == {0: "a", 1: "b"}


def test_a_worker_of_an_older_generation_is_fenced(parameters: ParameterStore) -> None:
    parameters.open_generation(2)
    with pytest.raises(FencedError, match="is at generation 2; this worker is of generation 1"):
        parameters.register(rank=0, world_size=2, generation=1, worker_id="late")
    assert not any(b"roster" in key for key in parameters.client.scan_iter(match=f"smlt:{{{parameters.job}.*"))
    assert parameters.register(rank=0, world_size=2, generation=2, worker_id="new")[0].startswith("2.")


def test_a_generation_that_opens_while_a_worker_registers_fences_it(
    store: EmbeddedStore, parameters: ParameterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ParameterStore(store.url, job=parameters.job)
    register = worker.client.eval

    def opened_before(*arguments: Any) -> Any:
        parameters.open_generation(2)  # the last moment before the script runs
        return register(*arguments)

    monkeypatch.setattr(worker.client, "eval", opened_before)
    with pytest.raises(FencedError, match="is at generation 2"):
        worker.register(rank=0, world_size=2, generation=1, worker_id="late")


def test_the_last_to_leave_deletes_the_session(parameters: ParameterStore) -> None:
    sessions = [parameters.register(rank=r, world_size=2, generation=1, worker_id=str(r))[0] for r in range(2)]
    parameters.client.set(parameters.session_prefix(sessions[0]) + "1:u:0:1", b"chunk")
    leave = {"generation": 1, "session": sessions[0]}
    assert not parameters.leave(rank=0, worker_id="not me", **leave)
    assert not parameters.leave(rank=0, worker_id="0", **leave)
    assert parameters.register(rank=0, world_size=2, generation=1, worker_id="again")[0] != sessions[0]  # a new session
    assert parameters.leave(rank=1, worker_id="1", **leave)
    keys = [key.decode() for key in parameters.client.scan_iter(match=f"smlt:{{{parameters.job}.*")]
    assert not any(sessions[0] in key for key in keys)
    assert len(keys) == 2  # the new session's pointer and roster


def test_what_an_older_generation_has_left_is_deleted_and_nothing_of_the_current_one(parameters: ParameterStore) -> None:
    kept, names = [], []
    for generation in (1, 2, 10):
        session, _, _ = parameters.register(rank=0, world_size=2, generation=generation, worker_id=f"w{generation}")
        parameters.client.hset(parameters.key(f"acks:{generation}"), "w", "{}")
        parameters.client.set(parameters.session_prefix(session) + "1:u:0:1", b"chunk")
        names.append(session)
    for name in ("generation", "plan", "scheduler", "claims", "ctl", "events", "meta:1", "worker:w1-10", "control", "failure"):
        parameters.client.set(parameters.key(name), "x")
        kept.append(parameters.key(name))
    kept += [parameters.key(name) for name in ("session:10", f"roster:{names[2]}", "acks:10", f"{names[2]}:1:u:0:1")]
    parameters.delete_generations_before(10)
    assert sorted(key.decode() for key in parameters.client.scan_iter(match=f"smlt:{{{parameters.job}.*")) == sorted(kept)
    assert parameters.count_keys("acks:*") == 1


def test_every_key_has_a_time_to_live(parameters: ParameterStore) -> None:
    parameters.register(rank=0, world_size=2, generation=1, worker_id="a")
    parameters.abort("x")
    parameters.open_generation(2)
    keys = list(parameters.client.scan_iter(match=f"smlt:{{{parameters.job}.*"))
    assert len(keys) == 4
    assert all(0 < parameters.client.pttl(key) <= parameters.ttl_s * 1000 for key in keys)
    assert parameters.sweep() == 4
    assert parameters.count_keys() == 0
