"""Buffers that no 32-bit number can measure: above 4 GiB of addresses, over far less memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
from groups import in_parallel

from smlt import Communicator
from smlt.store.embedded import EmbeddedStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")

PERIOD, END = 64 << 20, 8 << 20
PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@contextmanager
def repeated(size: int) -> Iterator[npt.NDArray[np.float64]]:
    """An array of `size` bytes: the same PERIOD bytes of memory over and over, and behind them END bytes of their own."""
    file = os.memfd_create("repeated")
    os.ftruncate(file, PERIOD + END)
    address = libc.mmap(None, size, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    try:
        read_write, shared = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED
        for at in range(0, size - END, PERIOD):
            length = min(PERIOD, size - END - at)
            assert libc.mmap(address + at, length, read_write, shared, file, 0) == address + at
        assert libc.mmap(address + size - END, END, read_write, shared, file, PERIOD) == address + size - END
        yield np.frombuffer((ctypes.c_char * size).from_address(address), np.float64)
    finally:
        libc.munmap(address, size)
        os.close(file)


def test_what_lies_beyond_4_gib_of_a_buffer_is_reduced_and_nothing_else_is_touched_for_it() -> None:
    size = 2**32 + END  # an offset that is cut to 32 bits, or to 31, points into the part before
    end = END // 8
    pattern = np.linspace(-1, 1, end)
    with (
        repeated(size) as first,
        repeated(size) as second,
        repeated(size) as first_mean,
        repeated(size) as second_mean,
        EmbeddedStore() as store,
    ):
        for array, value in ((first, 1.0), (second, 2.0)):
            array[: PERIOD // 8] = value
            array[-end:] = value * pattern

        def work(rank: int, source: npt.NDArray[np.float64], out: npt.NDArray[np.float64]) -> None:
            with Communicator(store.url, job="large", rank=rank, world_size=2, codec="int8", timeout_s=90) as comm:
                comm.allreduce(source, out=out)

        outcomes = in_parallel([lambda: work(0, first, first_mean), lambda: work(1, second, second_mean)], timeout_s=100)
        assert [outcome.error for outcome in outcomes] == [None, None]
        for mean in (first_mean, second_mean):
            np.testing.assert_allclose(mean[-end:], 1.5 * pattern, atol=0.03)
            np.testing.assert_allclose(mean[: PERIOD // 8], 1.5, atol=0.03)
        assert np.array_equal(first_mean[-end:], second_mean[-end:])
