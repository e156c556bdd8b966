"""allreduce_async: handles, several collectives under way, the native thread, and what failures do to all of them."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from groups import Group
from stores import Everywhere
from test_tls import TlsProxy, authority  # noqa: F401  (fixture)

from smlt import Communicator
from smlt.errors import CollectiveError, MismatchError, StoreError, WorkerLostError
from smlt.store.embedded import EmbeddedStore


def gradient(rank: int, number: int, size: int) -> np.ndarray:
    return np.random.default_rng([rank, number]).standard_normal(size, dtype=np.float32)


def test_many_under_way_give_what_the_blocking_calls_give(group: Callable[..., Group]) -> None:
    workers, sizes = group(3), [10, 300_000, 1, 70_000, 1_000_000, 65, 5_000] * 3

    def run(comm: Communicator) -> None:
        inputs = [gradient(comm.rank, i, size) for i, size in enumerate(sizes)]
        expected = [comm.allreduce(x) for x in inputs]
        works = [comm.allreduce_async(x) for x in inputs]
        order = list(range(len(works)))
        random.Random(comm.rank).shuffle(order)  # workers wait in different orders
        for i in order:
            np.testing.assert_array_equal(works[i].wait(), expected[i])
            assert works[i].done()
            assert works[i].exception() is None
            assert works[i].wait() is works[i].wait()

    workers.run(run)


def test_in_place_and_with_blocking_calls_in_between(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> None:
        buffers = [np.full(200_000, comm.rank + i, np.float32) for i in range(4)]
        works = [comm.allreduce_async(b, op="sum", codec="fp32", out=b) for b in buffers]
        assert comm.allreduce(comm.rank, op="sum") == 3
        comm.barrier()
        assert comm.broadcast({"x": comm.rank}, root=2) == {"x": 2}
        for i, (work, buffer) in enumerate(zip(works, buffers, strict=True)):
            assert work.wait() is buffer
            assert (buffer == 3 + 3 * i).all()

    group(3).run(run)


def test_they_move_while_nobody_waits(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> None:
        work = comm.allreduce_async(np.ones(500_000, np.float32))
        deadline = time.monotonic() + 20
        while not work.done():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert (work.wait(timeout_s=0) == 1).all()

    group(2).run(run)


def test_a_wait_can_be_given_up_and_taken_up_again(group: Callable[..., Group]) -> None:
    workers, late = group(2), threading.Event()

    def run(comm: Communicator) -> None:
        if comm.rank == 1:
            assert late.wait(20)
            comm.allreduce(np.ones(1000, np.float32))
            return
        work = comm.allreduce_async(np.zeros(1000, np.float32))
        with pytest.raises(TimeoutError, match=r"collective 1 has not ended after 0\.05 s"):
            work.wait(timeout_s=0.05)
        assert not work.done()
        late.set()
        assert (work.wait() == 0.5).all()

    workers.run(run)


def test_a_lost_worker_ends_all_that_is_under_way(group: Callable[..., Group]) -> None:
    workers = group(3, timeout_s=1.0)

    def run(comm: Communicator) -> None:
        if comm.rank == 2:
            return
        works = [comm.allreduce_async(np.ones(100_000, np.float32)) for _ in range(3)]
        started = time.monotonic()
        errors = [work.exception() for work in reversed(works)][::-1]
        assert time.monotonic() - started < 10
        assert any(isinstance(error, WorkerLostError) and error.rank == 2 for error in errors)
        assert all(isinstance(error, CollectiveError) for error in errors)
        with pytest.raises(CollectiveError, match="can do no more"):
            comm.allreduce_async(np.ones(3))

    workers.run(run)


def test_a_mismatch_ends_one_and_spares_the_others(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> None:
        sizes = [50_000, 1000 + comm.rank, 50_000]
        works = [comm.allreduce_async(np.ones(size, np.float32)) for size in sizes]
        assert (works[0].wait() == 1).all()
        assert isinstance(works[1].exception(), MismatchError)
        assert (works[2].wait() == 1).all()

    group(2).run(run)


def test_alone_it_is_done_at_once() -> None:
    with Communicator() as comm:
        work = comm.allreduce_async(np.arange(5))
        assert work.done()
        assert (work.wait() == np.arange(5)).all()
        assert comm.step == 1


def test_closing_ends_what_is_under_way_and_leaves_no_thread(group: Callable[..., Group]) -> None:
    workers = group(2)
    before = set(os.listdir("/proc/self/task"))  # native threads too
    work = workers.members[0].allreduce_async(np.ones(100_000, np.float32))
    assert set(os.listdir("/proc/self/task")) > before
    workers.close()
    assert isinstance(work.exception(), CollectiveError)
    deadline = time.monotonic() + 10  # the kernel lists a thread for a moment after it was joined
    while not set(os.listdir("/proc/self/task")) <= before:
        assert time.monotonic() < deadline


def test_a_cut_connection_is_mended_by_whoever_waits(group: Callable[..., Group], store: EmbeddedStore) -> None:
    workers = group(2)

    def run(comm: Communicator) -> None:
        comm.barrier()
        works = [comm.allreduce_async(np.full(2_000_000, comm.rank, np.float32)) for _ in range(4)]
        if comm.rank == 0:
            with Everywhere(store) as client:
                client.kill_all()
        for work in works:
            assert (work.wait() == 0.5).all()

    workers.run(run)


def test_over_tls(store: EmbeddedStore, job: str, authority, tmp_path) -> None:  # noqa: F811
    certificate = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(certificate))
    proxy = TlsProxy(store, authority, client_certificates=False)
    workers = Group(proxy.url(f"?ssl_ca_certs={certificate}"), job, 2)

    def run(comm: Communicator) -> None:
        works = [comm.allreduce_async(np.full(300_000, comm.rank + i, np.float32)) for i in range(5)]
        assert comm.allreduce(1, op="sum") == 2
        deadline = time.monotonic() + 20
        while not all(work.done() for work in works):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for i, work in enumerate(works):
            assert (work.wait() == 0.5 + i).all()

    try:
        workers.run(run)
    finally:
        workers.close()


def test_a_forked_child_says_that_it_cannot_and_ends(group: Callable[..., Group]) -> None:
    workers = group(2)
    workers.run(lambda comm: comm.allreduce_async(np.ones(10)).wait())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            workers.members[0].allreduce_async(np.ones(10))
        except (CollectiveError, StoreError) as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    assert b"does not survive fork" in os.read(read, 1000)
    os.close(read)
    os.waitpid(child, 0)
