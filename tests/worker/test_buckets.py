"""Buckets: every gradient in one of them, and all handed over in the same order whatever becomes ready first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt.errors import TaskError
from smlt.worker.buckets import Bucket, Countdown, plan_buckets

parameters = st.lists(
    st.tuples(st.sampled_from(["float32", "float64", "bfloat16"]), st.integers(0, 300)).map(
        lambda pair: (pair[0], pair[1], {"float32": 4, "float64": 8, "bfloat16": 2}[pair[0]])
    ),
    min_size=1,
    max_size=40,
)


@given(parameters, st.integers(1, 2000), st.integers(1, 2000))
def test_buckets_cover_the_flat_buffers_without_gap_or_overlap(
    sizes: list[tuple[str, int, int]], bucket_bytes: int, first_bytes: int
) -> None:
    plan = plan_buckets(sizes, bucket_bytes, first_bytes)
    assert sorted(index for bucket in plan for index in bucket.parameters) == list(range(len(sizes)))
    assert plan == sorted(plan, key=lambda bucket: bucket.parameters[-1]) or len({b.dtype for b in plan}) > 1
    for dtype in {dtype for dtype, _, _ in sizes}:
        at = 0
        for bucket in (bucket for bucket in plan if bucket.dtype == dtype):
            assert all(sizes[index][0] == dtype for index in bucket.parameters)
            assert (bucket.start, bucket.end) == (at, at + sum(sizes[index][1] for index in bucket.parameters))
            at = bucket.end
        assert at == sum(count for found, count, _ in sizes if found == dtype)


@given(parameters, st.integers(1, 2000))
def test_a_bucket_is_closed_when_it_has_reached_its_size(sizes: list[tuple[str, int, int]], bucket_bytes: int) -> None:
    plan = plan_buckets(sizes, bucket_bytes, bucket_bytes)
    for bucket in plan:
        counts = [sizes[index][1] * sizes[index][2] for index in bucket.parameters]
        assert sum(counts[:-1]) < bucket_bytes
    full = [b for b in plan if (b.end - b.start) * sizes[b.parameters[0]][2] >= bucket_bytes]
    assert len(plan) - len(full) <= len({dtype for dtype, _, _ in sizes})


def test_the_first_bucket_is_smaller_but_never_larger_than_the_others() -> None:
    sizes = [("float32", 100, 4)] * 10
    assert [len(bucket.parameters) for bucket in plan_buckets(sizes, 1200, 400)] == [1, 3, 3, 3]
    assert [len(bucket.parameters) for bucket in plan_buckets(sizes, 800, 4000)] == [2, 2, 2, 2, 2]


PLAN = [Bucket("float32", 0, 2, (0, 1)), Bucket("float32", 2, 3, (2,)), Bucket("float32", 3, 5, (3, 4))]


def watched(plan: list[Bucket]) -> Countdown:
    """A countdown that has seen one backward with a piece for each parameter."""
    countdown = Countdown(plan)
    sent: list[int] = []
    countdown.begin(sent.append)
    for bucket in plan:
        for index in bucket.parameters:
            countdown.ready(index)
            assert sent == []  # the first backward only watches
    countdown.finish()
    assert sent == list(range(len(plan)))
    return countdown


@given(st.permutations(range(5)), st.sets(st.integers(0, 4)))
def test_any_order_of_gradients_gives_the_same_order_of_buckets(order: list[int], without: set[int]) -> None:
    countdown = watched(PLAN)
    sent: list[int] = []
    ready: set[int] = set()
    countdown.begin(sent.append)
    for index in order:
        if index not in without:
            countdown.ready(index)
            ready.add(index)
            complete = [ready.issuperset(bucket.parameters) for bucket in PLAN]
            assert sent == list(range(complete.index(False) if False in complete else len(PLAN)))
    countdown.finish()
    assert sent == [0, 1, 2]
    assert countdown.lacking == sorted(without)


def test_a_bucket_does_not_wait_for_gradients_that_will_not_come() -> None:
    countdown = watched(PLAN)
    sent: list[int] = []
    countdown.begin(sent.append, absent=[1, 2])
    countdown.ready(0)
    assert sent == [0, 1]
    with pytest.raises(TaskError, match="--bucket-mb 0"):
        countdown.ready(2)


def test_a_gradient_in_pieces_holds_its_bucket_and_those_behind_until_the_end() -> None:
    countdown = Countdown(PLAN)
    sent: list[int] = []
    for _ in range(3):
        sent.clear()
        countdown.begin(sent.append)
        for index in (0, 1, 2, 2, 3, 4):
            countdown.ready(index)
        assert sent in ([], [0])
        countdown.finish()
        assert sent == [0, 1, 2]
    countdown.begin(sent.append)
    countdown.ready(0)
    countdown.ready(1)
    with pytest.raises(TaskError, match="changed after it was sent"):
        countdown.ready(0)


def test_gradients_outside_of_a_step_and_after_a_failed_one_are_nobodys_business() -> None:
    countdown = watched(PLAN)
    countdown.ready(0)
    sent: list[int] = []
    countdown.begin(sent.append)
    countdown.ready(0)
    countdown.cancel()
    countdown.ready(1)
    countdown.ready(7)  # in the last bucket, which is not counted
    assert sent == []
