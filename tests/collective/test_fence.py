"""A newer generation begins: whoever waits is told at once, and what another worker has completed can be completed here."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from groups import Group, in_parallel
from test_tls import TlsProxy

import smlt
from smlt import Communicator
from smlt.errors import FencedError
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore

UP, DOWN, TOKENS = range(3)
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@pytest.fixture
def secure_url(store: EmbeddedStore, tmp_path: Path) -> Iterator[str]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    proxy = TlsProxy(store, authority, client_certificates=False)
    yield proxy.url(f"?ssl_ca_certs={tmp_path}/ca.pem")
    proxy.doors.close()


class Held:
    """A worker whose lanes move when the test says so, and by themselves once it is released."""

    def __init__(self, comm: Communicator) -> None:
        assert comm._session is not None
        self.comm, self.session = comm, comm._session
        self.engine = self.session._engine
        self.session.start_progress = lambda: None  # type: ignore[method-assign]

    def lanes(self, kind: int) -> range:
        """The lanes of a kind: one to each server of the store."""
        return range(kind, len(self.session._connections._sockets), 3)

    def says(self, kind: int) -> bool:
        """Whether something is to be sent by a lane of the kind."""
        return any(self.engine.output(lane) for lane in self.lanes(kind))

    def move(self, kind: int) -> bool:
        moved = [self._move(lane) for lane in self.lanes(kind)]  # each of them
        return any(moved)

    def _move(self, lane: int) -> bool:
        moved, sock = False, self.session._connections._sockets[lane]
        with contextlib.suppress(*WOULD_BLOCK):
            while views := self.engine.output(lane):
                self.engine.sent(lane, sock.send(views[0]))
                moved = True
        with contextlib.suppress(*WOULD_BLOCK):
            while True:
                self.engine.received(lane, sock.recv_into(self.engine.input(lane)))
                moved = True
        return moved

    def move_until(self, kinds: list[int], over: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not over():
            assert time.monotonic() < deadline
            if not sum(self.move(kind) for kind in kinds):
                time.sleep(0.001)


def contribute(held: Held, size: int) -> None:
    """The worker does all that the others need of it, and reads nothing of what they publish."""
    if size > 20_000:  # the others' contributions come first: its own shard is aggregated before anyone else's can be
        quiet = 0

        def added() -> bool:
            nonlocal quiet
            quiet = 0 if held.move(TOKENS) or held.move(DOWN) else quiet + 1
            time.sleep(0.001)
            return quiet > 100

        held.move_until([], added)
    held.move_until([UP], lambda: not held.says(UP) and held.engine.flushed())


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("in_place", [False, True], ids=["elsewhere", "in-place"])
@pytest.mark.parametrize("size", [1000, 160_000], ids=["one-shot", "hierarchical"])
def test_a_fenced_worker_completes_what_the_others_have_completed(
    store: EmbeddedStore, job: str, parameters: ParameterStore, secure_url: str, size: int, in_place: bool, encrypted: bool
) -> None:
    urls = [store.url, store.url, secure_url if encrypted else store.url]
    comms = [
        Communicator(url, job=job, rank=rank, world_size=3, timeout_s=20, codec="int8" if size > 20_000 else "fp16")
        for rank, url in enumerate(urls)
    ]
    x = [np.random.default_rng(rank).standard_normal(size).astype(np.float32) for rank in range(3)]
    feedbacks = [smlt.ErrorFeedback() for _ in range(3)]
    outs = [mine if in_place else np.zeros_like(mine) for mine in x]
    held, results = Held(comms[2]), {}

    def call(rank: int) -> None:
        results[rank] = comms[rank].allreduce(x[rank], out=outs[rank], feedback=feedbacks[rank])

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    work = comms[2].allreduce_async(x[2], out=outs[2], feedback=feedbacks[2])
    contribute(held, size)
    for thread in threads:
        thread.join(20)
    assert sorted(results) == [0, 1]

    parameters.open_generation(2)
    assert not held.engine.has_ended(1), held.engine.state(1)
    held.engine.fence(2)  # it has heard of it by another way: before the tokens that wait in its socket
    for _ in range(2):
        with pytest.raises(FencedError, match="generation 2 has begun; this worker is of generation 1"):
            work.wait()
    assert comms[2].fenced == 2
    assert not comms[2].usable
    with pytest.raises(FencedError, match="join the new generation"):
        comms[2].allreduce(1.0)
    with pytest.raises(smlt.errors.ConfigError, match="in use"):
        feedbacks[2].begin([])

    assert comms[2].complete_fenced(10)
    assert work.wait() is outs[2]
    assert outs[0].tobytes() == outs[1].tobytes() == outs[2].tobytes()
    if size > 20_000:
        assert feedbacks[2].state_dict()
    in_parallel([comm.close for comm in comms])
    parameters.sweep()


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("size", [1000, 160_000], ids=["one-shot", "hierarchical"])
def test_what_nobody_has_completed_is_let_go(
    store: EmbeddedStore, job: str, parameters: ParameterStore, secure_url: str, size: int, encrypted: bool
) -> None:
    url = secure_url if encrypted else store.url
    comms = [Communicator(url, job=job, rank=rank, world_size=3, timeout_s=60) for rank in range(3)]
    feedbacks = [smlt.ErrorFeedback() for _ in range(2)]
    told = threading.Barrier(3, timeout=20)

    def call(rank: int) -> float:
        comm, x = comms[rank], np.ones(size, np.float32)
        works = [comm.allreduce_async(x, out=x, codec="int8", feedback=feedbacks[rank]), comm.allreduce_async(x)]
        told.wait()
        for work in works:
            with pytest.raises(FencedError):
                work.wait()
        assert not comm.complete_fenced(0.2)
        began = time.monotonic()
        comm.close()
        took = time.monotonic() - began
        for work in works:
            with pytest.raises(FencedError):
                work.wait()
        return took

    def schedule() -> None:
        told.wait()
        parameters.open_generation(2)

    outcomes: list[Any] = in_parallel([lambda: call(0), lambda: call(1), schedule])
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
    assert max(outcome.value for outcome in outcomes[:2]) < 2
    comms[2].close()
    newer = Group(url, job, 2, generation=2)
    results = newer.run(
        lambda comm: comm.allreduce(np.ones(size, np.float32), codec="int8", feedback=feedbacks[comm.rank]).tobytes()
    )
    assert results[0] == results[1]
    newer.close()
    parameters.sweep()


def test_a_blocking_call_that_was_fenced_is_completed_into_its_memory(
    store: EmbeddedStore, job: str, parameters: ParameterStore
) -> None:
    comms = [Communicator(store.url, job=job, rank=rank, world_size=2, timeout_s=20) for rank in range(2)]
    held = Held(comms[1])
    x = [np.full(200_000, rank, np.float32) for rank in range(2)]
    waiting = threading.Thread(target=lambda: comms[0].allreduce(x[0], out=x[0]))
    waiting.start()
    work = comms[1].allreduce_async(x[1], out=x[1])
    contribute(held, x[1].size)
    waiting.join(20)
    parameters.open_generation(2)
    held.engine.fence(2)
    with pytest.raises(FencedError):
        held.session.finish(work.step, time.monotonic() + 10, time.monotonic() + 10)
    assert comms[1].complete_fenced(10)
    assert (x[1] == 0.5).all()
    assert (x[0] == 0.5).all()
    in_parallel([comm.close for comm in comms])
    parameters.sweep()


def test_alone_there_is_nothing_to_be_fenced_from() -> None:
    with Communicator(world_size=1) as comm:
        assert comm.fenced == 0
        assert comm.complete_fenced(1)
