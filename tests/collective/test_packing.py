"""Packed arrays: aligned, one collective, what they are before and behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from groups import Group

from smlt import Communicator
from smlt.collective.packing import Packing, aligned, is_aligned, reduce_arrays
from smlt.errors import ConfigError, MismatchError

SPECS = [
    ((3, 4), np.float32),
    ((), np.float64),
    ((100,), np.float16),
    ((65,), np.float32),
    ((2,), np.int32),
    ((0,), np.float32),
]


@pytest.mark.parametrize("exact", [False, True])
def test_every_view_is_aligned_and_apart_from_the_others(exact: bool) -> None:
    packing = Packing(SPECS, exact=exact)
    for number, view in enumerate(packing.views):
        assert is_aligned(view) or not view.size
        assert not view.any()
        view[...] = number + 1
    for number, (view, (shape, dtype), (name, at)) in enumerate(zip(packing.views, SPECS, packing.places, strict=True)):
        assert view.shape == shape
        assert view.dtype == (np.float32 if dtype == np.float16 else dtype)
        assert (view == number + 1).all()
        assert not view.size or packing.buffers[name][at] == number + 1
        assert name.startswith("exact-") == (exact and view.size <= 64)


def test_aligned_memory_is_aligned() -> None:
    assert all(is_aligned(aligned((n,), np.int8)) for n in range(1, 40))


@pytest.mark.parametrize("world_size", [1, 3])
def test_arrays_come_back_reduced_in_their_shapes_and_dtypes(group: Callable[..., Group], world_size: int) -> None:
    def arrays(rank: int) -> list[np.ndarray]:
        rng = np.random.default_rng(rank)
        return [(rng.normal(size=shape) * 8).astype(dtype) for shape, dtype in SPECS]

    def run(comm: Communicator) -> tuple[list[np.ndarray], list[np.ndarray]]:
        mine = arrays(comm.rank)
        return reduce_arrays(comm, mine, "sum", "fp32"), [reduce_arrays(comm, [one], "sum", "fp32")[0] for one in mine[:4]]

    expected = [sum(column[1:], column[0]) for column in zip(*map(arrays, range(world_size)), strict=True)]
    for together, alone in group(world_size).run(run):
        for got, want in zip([*together, *alone], [*expected, *expected[:4]], strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            np.testing.assert_allclose(got, want, rtol=1e-2 if got.dtype == np.float16 else 1e-5, atol=1e-2)


def test_workers_that_pack_other_shapes_of_the_same_size_are_told(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> None:
        shapes = [(3, 5), (5, 3)] if comm.rank else [(5, 3), (3, 5)]
        reduce_arrays(comm, [np.zeros(shape, np.float32) for shape in shapes], "mean", None)

    assert all(isinstance(outcome.error, MismatchError) for outcome in group(2).attempt(run))


def test_small_arrays_are_exact_beside_large_ones(group: Callable[..., Group]) -> None:
    loss = np.array(1 / 3, np.float32)
    for small, _ in group(2).run(lambda comm: reduce_arrays(comm, [loss, np.full(1000, 1e6, np.float32)], "mean", "fp16")):
        assert small == loss


def test_what_is_no_number_is_refused() -> None:
    with Communicator() as comm, pytest.raises(ConfigError, match="cannot reduce dtype complex64"):
        reduce_arrays(comm, [np.zeros(2, np.complex64), np.zeros(1)], "mean", None)
    with Communicator() as comm, pytest.raises(ConfigError, match="booleans take"):
        reduce_arrays(comm, [np.zeros(2, bool), np.zeros(1)], "mean", None)
