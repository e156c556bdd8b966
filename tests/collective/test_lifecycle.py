"""How handles, threads and connections end: closing, forking, dropping, disconnecting at the wrong moment."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import redis
from groups import Group, in_parallel
from stores import Everywhere

from smlt import Communicator
from smlt.errors import CollectiveError, SmltError, WorkerLostError
from smlt.store.embedded import EmbeddedStore

SIZE = 300_000


def test_closing_tells_the_others_and_the_own_handles_at_once(group: Callable[..., Group]) -> None:
    one, other = group(2, timeout_s=60).members
    mine = one.allreduce_async(np.ones(SIZE, np.float32))
    theirs = other.allreduce_async(np.ones(3, np.float32))
    began = time.monotonic()
    one.close()
    with pytest.raises(CollectiveError, match=r"closed before it was complete|do not agree"):
        mine.wait()
    with pytest.raises(SmltError):
        theirs.wait()
    assert time.monotonic() - began < 20  # not the deadline
    assert mine.done()
    assert theirs.done()


def test_a_worker_that_leaves_is_missed_at_once_in_what_is_under_way(group: Callable[..., Group]) -> None:
    one, other = group(2, timeout_s=60).members
    works = [one.allreduce_async(np.ones(SIZE, np.float32)) for _ in range(3)]
    other.close()
    for work, error in zip(works, [WorkerLostError, CollectiveError, CollectiveError], strict=True):
        with pytest.raises(error):
            work.wait()


def test_closing_from_another_thread_while_one_waits(group: Callable[..., Group]) -> None:
    for _ in range(5):
        one, other = group(2, timeout_s=60).members
        caught: list[BaseException] = []

        def wait(comm: Communicator = one, caught: list[BaseException] = caught) -> None:
            try:
                comm.allreduce(np.ones(SIZE, np.float32))
            except BaseException as error:
                caught.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.05)
        one.close()
        waiter.join(20)
        assert not waiter.is_alive()
        assert isinstance(caught[0], CollectiveError)
        other.close()


def test_many_threads_on_one_communicator(group: Callable[..., Group]) -> None:
    workers = group(2)
    values = [np.full(20_000, rank, np.float32) for rank in range(2)]

    def work(comm: Communicator) -> None:
        def some() -> None:
            for number in range(15):
                if number % 3:
                    result = comm.allreduce_async(values[comm.rank], codec="fp32").wait()
                else:
                    result = comm.allreduce(values[comm.rank], codec="fp32")
                np.testing.assert_array_equal(result, 0.5)

        for outcome in in_parallel([some] * 8):
            if outcome.error is not None:
                raise outcome.error

    workers.run(work)


def test_cut_while_the_native_thread_drives(group: Callable[..., Group], store: EmbeddedStore) -> None:
    workers = group(2, chunk_bytes=20_000)
    rows = [np.random.default_rng(rank).standard_normal(SIZE).astype(np.float32) for rank in range(2)]
    expected, ended = np.mean(rows, axis=0, dtype=np.float64), threading.Event()

    def cut() -> None:
        rng = np.random.default_rng(1)
        with Everywhere(store) as client:
            while not ended.wait(0.02):
                lanes = [each for each in client.client_list() if each["name"].startswith("smlt-")]
                with contextlib.suppress(redis.ResponseError):
                    if lanes:  # none while they connect anew
                        client.kill(rng.choice(lanes))

    def work(comm: Communicator) -> None:
        for _ in range(15):
            works = [comm.allreduce_async(rows[comm.rank], codec="fp32") for _ in range(4)]
            time.sleep(0.01)
            for each in works:
                np.testing.assert_allclose(each.wait(), expected, atol=1e-5)

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        workers.run(work)
    finally:
        ended.set()
        cutter.join()


def test_handles_that_nobody_keeps_let_go_of_their_memory(group: Callable[..., Group]) -> None:
    workers = group(2)

    def work(comm: Communicator) -> list[weakref.ref[np.ndarray]]:
        seen = []
        for _ in range(10):
            gradient = np.ones(SIZE, np.float32)
            comm.allreduce_async(gradient, out=gradient)
            seen.append(weakref.ref(gradient))
            del gradient
        for _ in range(50):  # each lets go of what has ended
            comm.barrier()
            gc.collect()
        return seen

    gc.freeze()  # a collection then looks at what this test makes, not at all that the tests before it have imported
    try:
        found = workers.run(work)
    finally:
        gc.unfreeze()
    for seen in found:
        assert [number for number, each in enumerate(seen) if each() is not None] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_child_forked_in_the_middle_ends_and_the_parent_goes_on(group: Callable[..., Group]) -> None:
    one, other = group(2).members
    gradient = np.ones(SIZE, np.float32)
    work = one.allreduce_async(gradient)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # in case it hangs
        try:
            work.wait()
        except CollectiveError:
            one.close()
            del work
            gc.collect()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    in_parallel([work.wait, lambda: other.allreduce(gradient)])
    np.testing.assert_array_equal(work.wait(), gradient)
