"""The codec kernels beside memcpy: bytes touched a second, on every instruction set this machine has.

    python -m bench.kernels [--floats 16777216] [--rounds 9] [--codec fp16 ...] [--json]

Arrays larger than the caches are worked through in chunks of 131,072 elements, as the collective does. Bytes touched are
those an operation has to read and to write, once each: 4 an element of the arrays and the wire's own. In each round every
operation (`stream` is a decode past the caches) runs once, preceded by a memcpy of float32 arrays of the same size, chunk
by chunk; its ratio is its bytes a second over that memcpy's. The table gives medians and the middle half of the ratios:
they are what a machine that others use too lets one compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from smlt.collective import _native
from smlt.collective.codecs import CODECS, OPERATIONS, WIRE_DTYPES

CHUNK = 131_072  # elements

Bytes = npt.NDArray[np.uint8]


@dataclass
class Row:
    """One operation of one codec on one path, and what was measured."""

    codec: str
    path: str
    operation: str
    bytes_touched: int
    run: Callable[[], None]
    rates: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


@dataclass
class Arrays:
    """Shared by all rows: the caller's elements, another array of the same size, and room for the wire."""

    source: Bytes
    target: Bytes
    residual: Bytes
    wire: Bytes
    chunks: int


def arrays(floats: int) -> Arrays:
    chunks = max(1, floats // CHUNK)
    size = chunks * CHUNK
    rng = np.random.default_rng(0)
    source = np.tile(rng.standard_normal(CHUNK, dtype=np.float32), chunks)
    return Arrays(source.view(np.uint8), *(np.ones(4 * size, np.uint8) for _ in range(3)), chunks)


def copy_rate(a: Arrays) -> float:
    """Bytes read and written a second by memcpy, chunk by chunk."""
    begin = time.perf_counter()
    for i in range(a.chunks):
        part = slice(4 * CHUNK * i, 4 * CHUNK * (i + 1))
        a.target[part] = a.source[part]
    return 2 * a.source.size / (time.perf_counter() - begin)


def rows_of(a: Arrays, codec: str, path: str) -> list[Row]:
    """The operations in an order in which each finds what it works on: `encode` fills the wire, `decode` the target."""
    kernel = _native.Kernel(WIRE_DTYPES["float32"], CODECS[codec], OPERATIONS["mean"])
    wire_bytes = kernel.wire_size(CHUNK)
    parts = [slice(4 * CHUNK * i, 4 * CHUNK * (i + 1)) for i in range(a.chunks)]
    wires = [slice(wire_bytes * i, wire_bytes * (i + 1)) for i in range(a.chunks)]
    exponents = [0] * a.chunks

    def encode() -> None:
        for i, (part, wire) in enumerate(zip(parts, wires, strict=True)):
            exponents[i] = kernel.encode(a.source[part], a.wire[wire])

    def decode() -> None:
        for part, wire, exponent in zip(parts, wires, exponents, strict=True):
            kernel.decode(a.wire[wire], exponent, a.target[part])

    def stream() -> None:
        for part, wire, exponent in zip(parts, wires, exponents, strict=True):
            kernel.decode(a.wire[wire], exponent, a.target[part], streaming=True)

    def reduce() -> None:
        for part, wire, exponent in zip(parts, wires, exponents, strict=True):
            kernel.reduce(a.target[part], a.wire[wire], exponent, 0, False)

    def feedback() -> None:
        for part, wire in zip(parts, wires, strict=True):
            kernel.encode_feedback(a.source[part], a.residual[part], a.residual[part], a.wire[wire])

    def finish() -> None:
        for part in parts:
            kernel.finish(a.target[part], 4, 0)

    wire_total, total = wire_bytes * a.chunks, a.source.size
    touched = {
        encode: total + wire_total,
        decode: total + wire_total,
        stream: total + wire_total,
        reduce: 2 * total + wire_total,
        feedback: 3 * total + wire_total,
    }
    if codec == "fp32":  # the accumulator knows no codec
        touched[finish] = 2 * total
    return [Row(codec, path, run.__name__, count, run) for run, count in touched.items()]


def measure(floats: int, rounds: int, codecs: list[str]) -> list[Row]:
    a = arrays(floats)
    rows = []
    before = _native.codec_path()
    for path in _native.codec_paths():
        _native.use_codec_path(path)
        for codec in codecs:
            rows += rows_of(a, codec, path)
    _native.use_codec_path(before)
    for turn in range(rounds + 1):
        for row in rows:
            memcpy = copy_rate(a)
            begin = time.perf_counter()
            row.run()
            rate = row.bytes_touched / (time.perf_counter() - begin)
            if turn:  # the first one touches the memory for the first time
                row.rates.append(rate)
                row.ratios.append(rate / memcpy)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floats", type=int, default=16_777_216)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--codec", nargs="+", choices=list(CODECS), default=list(CODECS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.floats, options.rounds, options.codec)
    table = []
    for row in rows:
        low, median, high = statistics.quantiles(row.ratios, n=4) if len(row.ratios) > 1 else row.ratios * 3
        table.append(
            {
                "codec": row.codec,
                "path": row.path,
                "operation": row.operation,
                "gigabytes_per_s": statistics.median(row.rates) / 1e9,
                "ratio_to_memcpy": median,
                "middle_half": [low, high],
            }
        )
    if options.json:
        print(json.dumps({"floats": options.floats, "rounds": options.rounds, "rows": table}, indent=1))
        return
    print(f"{'codec':6}{'path':10}{'operation':10}{'GB/s':>8}{'of memcpy':>11}   middle half")
    for line in table:
        low, high = line["middle_half"]
        print(
            f"{line['codec']:6}{line['path']:10}{line['operation']:10}{line['gigabytes_per_s']:8.1f}"
            f"{line['ratio_to_memcpy']:11.2f}   {low:.2f} to {high:.2f}"
        )


if __name__ == "__main__":
    main()
