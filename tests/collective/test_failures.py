"""What a collective does when a worker, the store or the network fails: a clear error on every worker, nothing left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import redis
from groups import Group, in_parallel
from proxy import Connection, Proxy
from stores import Everywhere, lanes_of

from smlt import Communicator
from smlt.errors import (
    CollectiveError,
    CollectiveTimeout,
    ConfigError,
    FencedError,
    MismatchError,
    StoreAuthError,
    StoreError,
    StoreFull,
    StoreUnavailable,
    WorkerLostError,
)
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (lambda comm: comm.allreduce(np.ones((3, 4), np.float32)), "float32[3, 4]"),
        (lambda comm: comm.allreduce(np.ones((4, 4), np.float64)), "float64[4, 4]"),
        (lambda comm: comm.allreduce(np.ones((4, 4), np.float32), op="max"), "max"),
        (lambda comm: comm.allreduce(np.ones((4, 4), np.float32), codec="fp32"), "fp32"),
        (lambda comm: comm.allreduce({"w": np.ones((4, 4), np.float32)}), "w: float32"),
        (lambda comm: comm.allreduce(np.ones((2000, 1000), np.float32)), "float32[2000, 1000]"),
        (lambda comm: comm.allreduce(np.ones(0, np.float32)), "float32[0]"),
        (lambda comm: comm.barrier(), "barrier"),
        (lambda comm: comm.broadcast(np.ones((4, 4), np.float32)), "broadcast"),
        (lambda comm: comm.allgather(np.ones((4, 4), np.float32)), "allgather"),
    ],
)
@pytest.mark.parametrize("odd_rank", [0, 2])
def test_workers_that_call_different_things_all_raise_and_go_on(
    group: Callable[..., Group], odd: Callable[[Communicator], Any], told: str, odd_rank: int
) -> None:
    workers = group(3)
    started = time.monotonic()
    outcomes = workers.attempt(lambda comm: odd(comm) if comm.rank == odd_rank else comm.allreduce(np.ones((4, 4), np.float32)))
    assert time.monotonic() - started < 2
    for outcome in outcomes:
        assert isinstance(outcome.error, MismatchError), outcome.error
        assert told in str(outcome.error)
        assert "allreduce(float32[4, 4], mean, fp16)" in str(outcome.error)
        assert "rank 0 called" in str(outcome.error)
    assert workers.run(lambda comm: comm.allreduce(comm.rank, op="sum")) == [3, 3, 3]  # and the next one is fine


@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("size", [1, 300_000])
def test_the_survivors_of_a_lost_worker_are_told_who_it_was(group: Callable[..., Group], absent: int, size: int) -> None:
    workers = group(3, timeout_s=1.0)
    outcomes = workers.attempt(lambda comm: None if comm.rank == absent else comm.allreduce(np.ones(size, np.float32)))
    for rank, outcome in enumerate(outcomes):
        if rank != absent:
            assert isinstance(outcome.error, WorkerLostError), outcome.error
            assert (outcome.error.rank, outcome.error.step) == (absent, 1)
            with pytest.raises(CollectiveError, match="can do no more"):
                workers.members[rank].barrier()


def test_a_worker_that_left_is_told_to_those_who_wait_for_it_at_once(group: Callable[..., Group]) -> None:
    workers = group(3)

    def call(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 1:
            comm.close()
        else:
            comm.allreduce(np.ones(10))

    started = time.monotonic()
    outcomes = workers.attempt(call)
    assert time.monotonic() - started < 5
    for rank in (0, 2):
        error = outcomes[rank].error
        assert isinstance(error, WorkerLostError)
        assert (error.rank, error.step) == (1, 2)
        assert "rank 1 has left the job: it called 1 collectives" in str(error)


def test_a_second_worker_of_a_rank_is_refused(store: EmbeddedStore, group: Callable[..., Group], job: str) -> None:
    workers = group(2)
    with pytest.raises(FencedError, match=r"rank 1 of job .* is held by another worker"):
        Communicator(store.url, job=job, rank=1, world_size=2)
    assert workers.run(lambda comm: comm.allreduce(1, op="sum")) == [2, 2]


def test_another_world_size_is_refused(store: EmbeddedStore, group: Callable[..., Group], job: str) -> None:
    group(2)
    with pytest.raises(ConfigError, match="rank 2 expects 3 workers, those already there expect 2"):
        Communicator(store.url, job=job, rank=2, world_size=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 is not one of the 2 workers"),
        ({"rank": -1, "world_size": 2}, "rank -1"),
        ({"world_size": 0}, "world_size 0"),
        ({"world_size": 2, "timeout_s": 0}, "timeout_s 0"),
        ({"world_size": 2, "codec": "zip"}, "unknown codec"),
        ({"world_size": 2, "job": "a b"}, "job name 'a b'"),
        ({"world_size": 2, "chunk_bytes": 7}, "chunk_bytes 7"),
    ],
)
def test_settings_that_cannot_work_are_refused(store: EmbeddedStore, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Communicator(store.url, **settings)


def test_a_store_is_needed_for_several_workers() -> None:
    with pytest.raises(ConfigError, match="2 workers need a store"):
        Communicator(world_size=2)


def test_a_scheduler_ends_waiting_workers_at_once(store: EmbeddedStore, group: Callable[..., Group], job: str) -> None:
    workers, parameters = group(3), ParameterStore(store.url, job=job)

    def call(comm: Communicator) -> None:
        if comm.rank == 0:
            time.sleep(0.2)
            parameters.abort("rank 7 failed: out of cheese")
        comm.allreduce(np.ones(10)) if comm.rank else None

    started = time.monotonic()
    outcomes = workers.attempt(call)
    assert time.monotonic() - started < 2
    for outcome in outcomes[1:]:
        assert isinstance(outcome.error, CollectiveError)
        assert "out of cheese" in str(outcome.error)
    workers.close()
    parameters.sweep()
    parameters.close()


def test_workers_of_an_older_generation_are_fenced(store: EmbeddedStore, group: Callable[..., Group], job: str) -> None:
    workers, parameters = group(2), ParameterStore(store.url, job=job)

    def call(comm: Communicator) -> None:
        if comm.rank == 0:
            parameters.open_generation(2)
        else:
            comm.barrier()

    error = workers.attempt(call)[1].error
    assert isinstance(error, FencedError)
    assert "generation 2 has begun; this worker is of generation 1" in str(error)
    with pytest.raises(FencedError, match="is at generation 2"):
        Communicator(store.url, job=job, rank=0, world_size=2, generation=1)
    newer = Group(store.url, job, 2, generation=2)
    assert newer.run(lambda comm: comm.allreduce(2, op="sum")) == [4, 4]
    newer.close()
    workers.close()
    parameters.sweep()
    parameters.close()


def test_a_job_can_be_joined_again_after_it_was_left(store: EmbeddedStore, job: str) -> None:
    for total in range(1, 4):
        workers = Group(store.url, job, 3)
        assert workers.run(lambda comm, total=total: comm.allreduce(total, op="sum")) == [3 * total] * 3
        workers.close()
    parameters = ParameterStore(store.url, job=job)
    assert parameters.count_keys() == 0
    parameters.close()


# ---- the store ----


def test_a_store_that_is_down(tmp_path: Any) -> None:
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        Communicator(f"unix://{tmp_path}/none", rank=0, world_size=2)


def test_a_wrong_password_is_named_but_not_shown(store: EmbeddedStore) -> None:
    with pytest.raises(StoreAuthError) as caught:
        Communicator(store.tcp_url.replace("://:", "://:wrong-"), rank=0, world_size=2)
    assert "wrong-" not in str(caught.value)


def test_a_full_store_is_named_on_the_worker_that_meets_it() -> None:
    with EmbeddedStore(memory_bytes=6 << 20) as small:
        workers = Group(small.url, "full", 2, timeout_s=5)
        with redis.Redis.from_url(small.url) as other:  # another's data, when the workers have made their plans
            number = 0
            with contextlib.suppress(redis.exceptions.OutOfMemoryError):
                while other.set(f"another's {number}", bytes(50_000)):
                    number += 1
        outcomes = workers.attempt(lambda comm: comm.allreduce(np.ones(400_000, np.float32), codec="fp32"))
        assert any(isinstance(outcome.error, StoreFull) for outcome in outcomes), [o.error for o in outcomes]
        assert all(isinstance(outcome.error, (StoreFull, CollectiveError)) for outcome in outcomes), [o.error for o in outcomes]
        assert "raise its maxmemory" in str(next(o.error for o in outcomes if isinstance(o.error, StoreFull)))
        workers.close()


def test_a_store_that_goes_away_ends_the_collective_at_its_deadline() -> None:
    with EmbeddedStore() as doomed:
        workers = Group(doomed.url, "doomed", 2, timeout_s=1.5)

        def call(comm: Communicator) -> None:
            if comm.rank == 0:
                os.kill(doomed.pid, signal.SIGKILL)
            comm.allreduce(np.ones(10))

        started = time.monotonic()
        for outcome in workers.attempt(call):
            assert isinstance(outcome.error, StoreUnavailable), outcome.error
            assert "gave up after 1.5 s" in str(outcome.error)
        assert time.monotonic() - started < 5
        workers.close()


def test_a_connection_cut_in_mid_collective_changes_nothing(store: EmbeddedStore, group: Callable[..., Group]) -> None:
    """CLIENT KILL from outside, again and again, while collectives run: every result is right (invariant 5)."""
    workers = group(3, chunk_bytes=20_000)
    rows = [np.random.default_rng(rank).standard_normal(400_000).astype(np.float32) for rank in range(3)]
    expected, ended, kills = np.mean(rows, axis=0, dtype=np.float64), threading.Event(), 0

    def cut() -> None:
        nonlocal kills
        with Everywhere(store) as client:
            rng = np.random.default_rng(0)
            while not ended.is_set():
                lanes = [c for c in client.client_list() if c["name"].startswith("smlt-")]
                if lanes:
                    with contextlib.suppress(redis.ResponseError):
                        client.kill(rng.choice(lanes))
                        kills += 1
                ended.wait(0.01)

    def work(comm: Communicator) -> None:
        for _ in range(40):
            mine = rows[comm.rank].copy()
            comm.allreduce(mine, codec="fp32", out=mine)  # in place: the gradient is overwritten while it is resent
            np.testing.assert_allclose(mine, expected, atol=1e-5)

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        workers.run(work)
    finally:
        ended.set()
        cutter.join()
    assert kills >= 10


def answering(replies: Callable[[bytes], bytes]) -> Iterator[int]:
    """A server on loopback that answers every receive with what `replies` makes of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopping = False

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(replies(data))

    def accept() -> None:
        while not stopping:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        stopping = True
        listener.close()


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x16", b"+PONG\r\n"])
def test_what_is_not_a_redis_is_told_so(greeting: bytes) -> None:
    with contextlib.closing(answering(lambda data: greeting)) as servers:  # type: ignore[type-var]
        port = next(servers)
        with pytest.raises(StoreError, match="store at redis://127"):
            ParameterStore(f"redis://127.0.0.1:{port}", job="x", timeout_s=2).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"!garbage\r\n", "not the Redis protocol"),
        (lambda data: b"-LOADING Redis is loading the dataset in memory\r\n", "LOADING"),
        (lambda data: b"-NOPERM this user has no permissions\r\n", "NOPERM"),
        (lambda data: b"$99999999999\r\n", "not the Redis protocol"),
        (lambda data: b"*2\r\n$5\r\nhello\r\n:1\r\n", "not as it must be"),
        (lambda data: b":1\r\n" * 3, "not as it must be"),
        (lambda data: b"*1\r\n$10\r\n0123456789\r\n", "not as it must be"),
    ],
)
def test_hostile_replies_end_in_a_clear_error(
    store: EmbeddedStore, job: str, change: Callable[[bytes], bytes], message: str
) -> None:
    with Proxy(store) as proxy:
        honest = Communicator(store.tcp_url, job=job, rank=0, world_size=2, timeout_s=3)
        victim = Communicator(proxy.url, job=job, rank=1, world_size=2, timeout_s=3)
        proxy.change_down(change)
        outcomes = in_parallel([lambda: honest.allreduce(np.ones(1000)), lambda: victim.allreduce(np.ones(1000))])
        proxy.change_down(None)
        assert isinstance(outcomes[1].error, StoreError), outcomes[1].error
        assert message.casefold() in str(outcomes[1].error).casefold()
        in_parallel([honest.close, victim.close])


@pytest.mark.parametrize("at", [1, 30, 50_000])
def test_a_reply_cut_short_is_asked_for_again(store: EmbeddedStore, job: str, at: int) -> None:
    """The proxy passes `at` bytes and closes, six times: the collective goes through."""
    with Proxy(store) as proxy:
        comms = [
            Communicator(proxy.url, job=job, rank=0, world_size=2, timeout_s=20),
            Communicator(store.url, job=job, rank=1, world_size=2, timeout_s=20),
        ]
        cuts = 0

        def cut(connection: Connection) -> None:
            nonlocal cuts
            cuts += 1
            if cuts <= 6:
                connection.down.at(at, "close")

        for connection in lanes_of(proxy.connections):
            cut(connection)
        proxy.on_connect = cut
        x = np.random.default_rng(1).standard_normal(500_000).astype(np.float32)
        outcomes = in_parallel([lambda comm=comm: comm.allreduce(x * (comm.rank + 1), codec="fp32") for comm in comms])  # type: ignore[misc]
        for outcome in outcomes:
            np.testing.assert_allclose(outcome.value, x * 1.5, rtol=1e-6)
        in_parallel([comm.close for comm in comms])


def test_a_chunk_that_vanished_is_named(store: EmbeddedStore, group: Callable[..., Group], job: str) -> None:
    """What an evicting store does: chunks are deleted between their announcement and their fetching."""
    workers = group(2, timeout_s=5)
    ended = threading.Event()

    def evict() -> None:
        with Everywhere(store) as client:
            while not ended.is_set():
                client.unlink_all(f"smlt:{{{job}.*}}:*:[au]:*")

    evictor = threading.Thread(target=evict)
    evictor.start()
    try:
        errors: list[BaseException | None] = []
        for _ in range(200):
            outcomes = workers.attempt(lambda comm: comm.allreduce(np.ones(200_000, np.float32)))
            errors = [outcome.error for outcome in outcomes]
            if any(errors):
                break
    finally:
        ended.set()
        evictor.join()
    assert any(isinstance(error, StoreError) and "noeviction" in str(error) for error in errors), errors


# ---- the process ----

INTERRUPTED = """
import sys
import numpy as np
from smlt import Communicator
comm = Communicator(sys.argv[1], job=sys.argv[2], rank=0, world_size=2)
print("ready", flush=True)
comm.allreduce(np.ones(100_000, np.float32))
"""


def test_ctrl_c_ends_a_wait_and_leaves_nothing(store: EmbeddedStore, job: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, store.url, job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with Everywhere(store) as client:  # its contribution lies in the store: it waits for the other
        deadline = time.monotonic() + 10
        while not list(client.scan_iter(match=f"smlt:{{{job}.*}}:*:u:*")) and time.monotonic() < deadline:
            time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, trace = process.communicate(timeout=10)
    assert "KeyboardInterrupt" in trace
    assert process.returncode != 0


def test_a_communicator_refuses_to_work_in_a_forked_child(group: Callable[..., Group]) -> None:
    (comm, _) = group(2).members
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            comm.barrier()
        except CollectiveError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"does not survive fork" in os.read(reader, 1000)


def test_a_worker_that_came_and_then_stalls_is_a_timeout_that_names_it(store: EmbeddedStore, job: str) -> None:
    """Rank 1 sends its contributions, then hears nothing more from the store: its aggregates never come."""
    with Proxy(store) as proxy:
        well = Communicator(store.url, job=job, rank=0, world_size=2, timeout_s=1)
        stalled = Communicator(proxy.url, job=job, rank=1, world_size=2, timeout_s=2)
        proxy.change_down(lambda data: b"")
        x = np.ones(100_000, np.float32)
        outcomes = in_parallel([lambda: well.allreduce(x), lambda: stalled.allreduce(x)])
        proxy.change_down(None)
        assert isinstance(outcomes[0].error, CollectiveTimeout), outcomes[0].error
        assert "rank 0 waits for the aggregate of rank 1" in str(outcomes[0].error)
        assert isinstance(outcomes[1].error, (CollectiveError, StoreError))
        in_parallel([well.close, stalled.close])
