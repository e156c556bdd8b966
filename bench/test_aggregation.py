"""pytest-benchmark suites of the aggregator: kernels, RESP, the collective.

pytest bench --benchmark-columns=median,iqr,rounds
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from smlt import Communicator
from smlt.collective import _native
from smlt.collective.codecs import CODECS, OPERATIONS, WIRE_DTYPES
from smlt.store.embedded import EmbeddedStore

CHUNK = 131_072  # elements


@pytest.fixture(scope="module")
def store() -> Iterator[EmbeddedStore]:
    with EmbeddedStore() as server:
        yield server


@pytest.mark.parametrize("path", _native.codec_paths())
@pytest.mark.parametrize("step", ["encode", "decode", "reduce"])
def test_fp16_kernel(benchmark: Any, path: str, step: str) -> None:
    before = _native.codec_path()
    _native.use_codec_path(path)
    kernel = _native.Kernel(WIRE_DTYPES["float32"], CODECS["fp16"], OPERATIONS["mean"])
    values = np.random.default_rng(0).standard_normal(CHUNK, dtype=np.float32).view(np.uint8)
    wire, target = np.zeros(2 * CHUNK, np.uint8), np.zeros(4 * CHUNK, np.uint8)
    exponent = kernel.encode(values, wire)
    calls = {
        "encode": lambda: kernel.encode(values, wire),
        "decode": lambda: kernel.decode(wire, exponent, target),
        "reduce": lambda: kernel.reduce(target, wire, exponent, 0, False),
    }
    benchmark(calls[step])
    benchmark.extra_info["GB/s of float32"] = 4 * CHUNK / benchmark.stats["median"] / 1e9
    _native.use_codec_path(before)


def test_resp_decoding_of_a_token_reply(benchmark: Any) -> None:
    entry = b"*2\r\n$15\r\n1700000000000-1\r\n*2\r\n$1\r\nt\r\n$40\r\n" + bytes(40) + b"\r\n"
    reply = b"*1\r\n*2\r\n$10\r\nsmlt:inbox\r\n*100\r\n" + 100 * entry
    (decoded,) = benchmark(lambda: _native.Decoder().feed(reply))
    assert len(decoded[0][1]) == 100


@pytest.mark.parametrize("floats", [1_000, 100_000, 11_000_000])
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("codec", ["fp32", "fp16"])
def test_allreduce(benchmark: Any, store: EmbeddedStore, workers: int, floats: int, codec: str) -> None:
    """Workers are threads here (the collective holds no GIL); bench.compare uses processes."""
    comms = [Communicator(store.url, job="bench", rank=rank, world_size=workers) for rank in range(workers)]
    gradients = [np.ones(floats, np.float32) for _ in comms]
    with ThreadPoolExecutor(workers) as pool:

        def all_of_them() -> None:
            calls = [pool.submit(c.allreduce, g, "mean", codec, g) for c, g in zip(comms, gradients, strict=True)]
            for call in calls:
                call.result()

        benchmark.pedantic(all_of_them, rounds=7 if floats > 1_000_000 else 50, warmup_rounds=2)
        for comm in comms:
            pool.submit(comm.close)
