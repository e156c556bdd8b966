"""pytest-benchmark suite of the Redis protocol: commands out, replies in.

pytest bench/test_resp.py --benchmark-columns=median,iqr,rounds
"""

from __future__ import annotations

from typing import Any

import pytest

from smlt.collective import _native


@pytest.mark.parametrize("size", [100, 10_000, 262_144])
def test_encoding_of_a_set(benchmark: Any, size: int) -> None:
    value = bytes(size)
    command = benchmark(lambda: _native.encode_command(b"SET", b"smlt:{job.0}:1.1:7:u:3:2", value, b"PX", b"1800000"))
    assert len(command) > size


@pytest.mark.parametrize("tokens", [1, 100])
def test_decoding_of_tokens(benchmark: Any, tokens: int) -> None:
    entry = b"*2\r\n$15\r\n1700000000000-1\r\n*2\r\n$1\r\nt\r\n$40\r\n" + bytes(40) + b"\r\n"
    reply = b"*1\r\n*2\r\n$10\r\nsmlt:inbox\r\n*%d\r\n" % tokens + tokens * entry
    (decoded,) = benchmark(lambda: _native.Decoder().feed(reply))
    assert len(decoded[0][1]) == tokens


@pytest.mark.parametrize("size", [1_000, 262_144])
def test_decoding_of_chunks(benchmark: Any, size: int) -> None:
    reply = b"*3\r\n" + 3 * (b"$%d\r\n" % size + bytes(size) + b"\r\n")
    (decoded,) = benchmark(lambda: _native.Decoder().feed(reply))
    assert [len(chunk) for chunk in decoded] == 3 * [size]
    benchmark.extra_info["GB/s"] = len(reply) / benchmark.stats["median"] / 1e9
