"""pytest-benchmark suite of the codec kernels, each on every instruction set of this machine. See `bench.kernels` for
arrays larger than the caches.

pytest bench/test_kernels.py --benchmark-columns=median,iqr,rounds
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from smlt.collective import _native
from smlt.collective.codecs import CODECS, OPERATIONS, WIRE_DTYPES

CHUNK = 131_072  # elements


@pytest.fixture(params=_native.codec_paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.codec_path()
    _native.use_codec_path(request.param)
    yield request.param
    _native.use_codec_path(before)


@pytest.mark.parametrize("step", ["encode", "encode with feedback", "decode", "decode and add", "finish"])
@pytest.mark.parametrize("codec", list(CODECS))
def test_kernel(benchmark: Any, path: str, codec: str, step: str) -> None:
    kernel = _native.Kernel(WIRE_DTYPES["float32"], CODECS[codec], OPERATIONS["mean"])
    values = np.random.default_rng(0).standard_normal(CHUNK, dtype=np.float32).view(np.uint8)
    wire, target = np.zeros(kernel.wire_size(CHUNK), np.uint8), np.zeros(4 * CHUNK, np.uint8)
    residual = np.zeros(4 * CHUNK, np.uint8)
    exponent = kernel.encode(values, wire)
    calls = {
        "encode": lambda: kernel.encode(values, wire),
        "encode with feedback": lambda: kernel.encode_feedback(values, residual, residual, wire),
        "decode": lambda: kernel.decode(wire, exponent, target),
        "decode and add": lambda: kernel.reduce(target, wire, exponent, 0, False),
        "finish": lambda: kernel.finish(target, 4, 0),
    }
    benchmark(calls[step])
    benchmark.extra_info["GB/s of float32"] = 4 * CHUNK / benchmark.stats["median"] / 1e9
