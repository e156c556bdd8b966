"""The Minibatch Buffer: order, bound, errors, ending."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from smlt.worker.data import DataIterator
from smlt.worker.minibatch import MinibatchBuffer


def test_batches_come_in_order_and_complete() -> None:
    iterator = DataIterator(50, lambda epoch: 8, 0, 1, 3)
    with MinibatchBuffer(iterator.steps(0, 0, 2), lambda indices: indices.tolist(), depth=2) as buffer:
        got = [(b.epoch, b.step, b.batch, b.local_size, b.global_size) for b in buffer]
    assert got == [(e, s, i.tolist(), len(i), total) for e, s, i, total in iterator.steps(0, 0, 2)]


def test_it_never_runs_further_ahead_than_its_depth() -> None:
    loaded: list[Any] = []
    with MinibatchBuffer(DataIterator(100, lambda epoch: 1, 0, 0, 1).steps(0, 0, 1), loaded.append, depth=3) as buffer:
        taken = iter(buffer)
        for count in range(1, 20):
            next(taken)
            deadline = time.monotonic() + 5
            while len(loaded) < count + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert count <= len(loaded) <= count + 3 + 1  # three ready, one in hand


def test_what_loading_raises_is_raised_where_the_batch_would_have_been_taken() -> None:
    def load(indices: Any) -> Any:
        if len(loaded) == 3:
            raise OSError("disk on fire")
        loaded.append(indices)
        return indices

    loaded: list[Any] = []
    with MinibatchBuffer(DataIterator(10, lambda epoch: 1, 0, 0, 1).steps(0, 0, 1), load) as buffer:
        taken = iter(buffer)
        for _ in range(3):
            next(taken)
        with pytest.raises(OSError, match="on fire"):
            next(taken)


def test_leaving_it_ends_the_thread() -> None:
    before = threading.active_count()
    with MinibatchBuffer(
        DataIterator(1000, lambda epoch: 1, 0, 0, 1).steps(0, 0, 1), lambda indices: indices, depth=1
    ) as buffer:
        next(iter(buffer))
    assert threading.active_count() == before
    buffer.close()
