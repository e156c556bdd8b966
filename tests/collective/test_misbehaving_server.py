"""A store that answers wrongly: whatever it says, a worker ends in its deadline, with the right result or an error of ours."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import pytest
from groups import in_parallel
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from stores import Doors, asks_for_slots

from smlt import Communicator
from smlt.errors import SmltError
from smlt.store.embedded import EmbeddedStore

ERRORS = (
    b"-LOADING Valkey is loading the dataset in memory\r\n",
    b"-READONLY You can't write against a read only replica.\r\n",
    b"-BUSY Valkey is busy running a script.\r\n",
    b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    b"-MOVED 3999 127.0.0.1:6381\r\n",
    b"-NOPERM this user has no permissions\r\n",
    b"-NOAUTH Authentication required.\r\n",
    b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
    b"-ERR unknown command\r\n",
    b"-\r\n",
)
MISTYPED = (
    b":1\r\n",
    b":-1\r\n",
    b"+OK\r\n",
    b"$-1\r\n",
    b"*-1\r\n",
    b"*0\r\n",
    b"$0\r\n\r\n",
    b"*1\r\n*1\r\n*1\r\n$1\r\nx\r\n",
    b"*1\r\n$-1\r\n",
)


def read_one(stream: BinaryIO) -> bytes:
    """One value of the protocol as it stands on the wire: a command, or a reply."""
    line = stream.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError
    if line[:1] == b"$" and line != b"$-1\r\n":
        return line + stream.read(int(line[1:]) + 2)
    if line[:1] == b"*":
        return line + b"".join(read_one(stream) for _ in range(max(0, int(line[1:]))))
    return line


def first_bulk(reply: bytes) -> tuple[int, int, int] | None:
    """Where the first string that is not empty stands: its line, its content, its length."""
    at = reply.find(b"$")
    end = reply.find(b"\r\n", at)
    if at < 0 or end < 0 or not reply[at + 1 : end].isdigit() or reply[at + 1 : end] == b"0":
        return None
    return at, end + 2, int(reply[at + 1 : end])


def truncated(chance: random.Random, reply: bytes) -> bytes | None:
    return reply[: chance.randrange(len(reply))]


def mistyped(chance: random.Random, reply: bytes) -> bytes | None:
    return chance.choice(MISTYPED)


def of_another_length(chance: random.Random, reply: bytes) -> bytes | None:
    """Well-formed, but a string is shorter than it was, or a list has an element more."""
    bulk = first_bulk(reply)
    if bulk is not None and chance.random() < 0.7:
        at, content, length = bulk
        less = chance.randrange(length)
        return reply[:at] + b"$%d\r\n" % less + reply[content : content + less] + reply[content + length :]
    if reply[:1] == b"*" and reply[1:2].isdigit():
        count, _, rest = reply[1:].partition(b"\r\n")
        return b"*%d\r\n" % (int(count) + 1) + rest + b"$-1\r\n"
    return reply * 2


def of_an_absurd_length(chance: random.Random, reply: bytes) -> bytes | None:
    return (
        chance.choice((b"$", b"*", b":"))
        + chance.choice((b"99999999999", b"-5", b"", b"12x", b"18446744073709551616"))
        + b"\r\n"
    )


def an_error(chance: random.Random, reply: bytes) -> bytes | None:
    return chance.choice(ERRORS)


def garbage(chance: random.Random, reply: bytes) -> bytes | None:
    return chance.randbytes(chance.randint(1, 200))


def silence(chance: random.Random, reply: bytes) -> bytes | None:
    return b""


def the_end(chance: random.Random, reply: bytes) -> bytes | None:
    return None


WRONGS: tuple[Callable[[random.Random, bytes], bytes | None], ...] = (
    truncated,
    mistyped,
    of_another_length,
    of_an_absurd_length,
    an_error,
    garbage,
    silence,
    the_end,
)


class MisbehavingServer:
    """Does what the real store does, and says so, or something else, with a probability of `wrong` a reply."""

    def __init__(self, store: EmbeddedStore, seed: int, wrong: float, kinds: tuple[str, ...]) -> None:
        self._chance, self._wrong = random.Random(seed), wrong
        self._kinds = [kind for kind in WRONGS if kind.__name__ in kinds]
        self.honest = True
        self._doors = Doors(store)
        self.url = self._doors.url()
        for number in range(len(self._doors.listeners)):
            threading.Thread(target=self._accept, args=(number,), daemon=True).start()

    def _accept(self, number: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._doors.listeners[number].accept()
                threading.Thread(target=self._serve, args=(client, number), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError), client:
            store = socket.create_connection(("127.0.0.1", self._doors.targets[number]))
            with store:
                commands, replies = client.makefile("rb"), store.makefile("rb")
                while True:
                    command = read_one(commands)
                    store.sendall(command)
                    reply: bytes | None = read_one(replies)
                    assert reply is not None
                    if asks_for_slots(command):
                        reply = self._doors.translate(reply)
                    if not self.honest and self._chance.random() < self._wrong:
                        reply = self._chance.choice(self._kinds)(self._chance, reply)
                    if reply is None:
                        return
                    client.sendall(reply)

    def close(self) -> None:
        self._doors.close()


@contextlib.contextmanager
def misbehaving(store: EmbeddedStore, seed: int, wrong: float, kinds: tuple[str, ...]) -> Iterator[MisbehavingServer]:
    server = MisbehavingServer(store, seed, wrong, kinds)
    try:
        yield server
    finally:
        server.honest = True
        server.close()


def work(store: EmbeddedStore, seed: int, wrong: float, kinds: tuple[str, ...], size: int, victim: int) -> None:
    job = f"wrong-{seed}-{size}-{victim}-{uuid.uuid4().hex[:8]}"  # what failed is tried again, and has not left
    with misbehaving(store, seed, wrong, kinds) as server:
        comms = [
            Communicator(
                server.url if rank == victim else store.url,
                job=job,
                rank=rank,
                world_size=2,
                timeout_s=1.5,
                chunk_bytes=4096,
            )
            for rank in range(2)
        ]
        server.honest = False
        x = np.arange(size, dtype=np.float32)

        def call(comm: Communicator) -> None:
            for number in range(3):
                began = time.monotonic()
                try:
                    result = comm.allreduce(x + comm.rank, codec="fp32")
                    np.testing.assert_array_equal(result, x + 0.5)
                    comm.broadcast(x, root=number % 2)
                except SmltError:
                    return
                finally:
                    assert time.monotonic() - began < 10

        outcomes = in_parallel([lambda comm=comm: call(comm) for comm in comms])  # type: ignore[misc]
        for outcome in outcomes:
            assert outcome.error is None, outcome.error
        server.honest = True
        for outcome in in_parallel([comm.close for comm in comms]):
            assert outcome.error is None, outcome.error


@pytest.mark.parametrize("size", [100, 20_000], ids=["one-shot", "hierarchical"])
@pytest.mark.parametrize("kind", [kind.__name__ for kind in WRONGS])
def test_a_store_that_is_wrong_now_and_then(store: EmbeddedStore, kind: str, size: int) -> None:
    for victim in range(2):
        work(store, victim, 0.1, (kind,), size, victim)


@settings(max_examples=15, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    wrong=st.sampled_from([0.01, 0.05, 0.3]),
    kinds=st.sets(st.sampled_from([kind.__name__ for kind in WRONGS]), min_size=2),
    size=st.sampled_from([10, 3000, 40_000]),
    victim=st.integers(0, 1),
)
def test_a_store_that_is_wrong_in_several_ways(
    store: EmbeddedStore, seed: int, wrong: float, kinds: set[str], size: int, victim: int
) -> None:
    note(f"seed {seed}, {sorted(kinds)}")
    work(store, seed, wrong, tuple(sorted(kinds)), size, victim)
