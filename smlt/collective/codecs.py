"""Names of codecs, operations and dtypes, and what they may be combined with.

Codecs
    fp32
        No compression: float32 travels as float32, float64 as float64. Exact up to the rounding of the sum.
    fp16
        Floats travel as IEEE 754 binary16 with one power-of-two scale for each chunk of at most 131,072 elements. One
        encoding of an element x errs by at most ``max(2**-11 * |x|, 2**-39 * amax)`` with amax the largest finite
        magnitude of the chunk.
    bf16
        float32 travels as bfloat16, its upper half rounded to nearest. One encoding of x errs by at most
        ``max(2**-8 * |x|, 2**-134)``; finite values stay finite. float64 travels as fp16: bfloat16 lacks its range.
    int8
        float32 travels as signed bytes in blocks of 256, each block with its scale (a bfloat16 of 2 bytes). One encoding
        errs by at most ``max(amax / 250, 2**-126)`` with amax the largest finite magnitude of the block, for every
        element: small ones beside a large one are lost, which error feedback makes good over the steps. Inf and NaN
        survive. float64 travels as fp16.

In an all-reduce a value is encoded twice: once by its worker, once as an aggregate.

Small leaves of one dtype share chunks. Integers, booleans and leaves of at most 64 elements are never compressed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from smlt.errors import ConfigError

# Numbers shared with csrc/codec.h.
CODECS = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}
OPERATIONS = {"mean": 0, "sum": 1, "min": 2, "max": 3}
#: Of elements as they are; the last three of integers. For `smlt.torch`.
EXACT_OPERATIONS = {"product": 4, "band": 5, "bor": 6, "bxor": 7}
WIRE_DTYPES = {
    name: number
    for number, name in enumerate(
        ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    )
}

#: Relative error of one fp16 encoding, and its absolute error relative to the chunk's largest magnitude.
FP16_RELATIVE_ERROR = 2.0**-11
FP16_CHUNK_ERROR = 2.0**-39
#: Relative error of one bf16 encoding, and its absolute error among denormals.
BF16_RELATIVE_ERROR = 2.0**-8
BF16_SMALLEST_ERROR = 2.0**-134
#: Elements in an int8 block, the error of one encoding relative to the block's largest magnitude, and the absolute one
#: where that magnitude is next to nothing.
INT8_BLOCK_ELEMENTS = 256
INT8_HEADER_BYTES = 2
INT8_BLOCK_ERROR = 1 / 250
INT8_SMALLEST_ERROR = 2.0**-126


def check_codec(codec: str) -> str:
    """Return `codec` if it is one; ConfigError otherwise."""
    if codec not in CODECS:
        raise ConfigError(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    return codec


def check_operation(operation: str) -> str:
    """Return `operation` if it is one; ConfigError otherwise."""
    if operation not in OPERATIONS:
        raise ConfigError(f"unknown op {operation!r}; known: {', '.join(OPERATIONS)}")
    return operation


@lru_cache(maxsize=256)
def dtype_name(dtype: np.dtype) -> str:
    """`dtype.name`, which NumPy puts together anew each time."""
    return dtype.name


@lru_cache(maxsize=256)
def wire_dtype(dtype: np.dtype) -> str | None:
    """The dtype in which arrays of `dtype` are reduced and sent, None when they cannot be.

    float16 and bfloat16 are reduced in float32; booleans as uint8.
    """
    if dtype.name in ("float16", "bfloat16"):
        return "float32"
    if dtype.kind == "b":
        return "uint8"
    return dtype.name if dtype.name in WIRE_DTYPES else None


def wire_codec(dtype: str, codec: str) -> int:
    """The native codec for a segment of wire dtype `dtype` when the user asked for `codec`.

    Integers are never compressed; float64 exceeds the range of bf16 and int8 scales and gets fp16 instead.
    """
    if codec == "fp32" or not dtype.startswith("float"):
        return CODECS["fp32"]
    return CODECS["fp16"] if dtype == "float64" else CODECS[codec]


def wire_bytes(dtype: str, codec: str) -> int:
    """Bytes that one element takes on the wire, without block headers."""
    compressed = {CODECS["fp16"]: 2, CODECS["bf16"]: 2, CODECS["int8"]: 1}
    return compressed.get(wire_codec(dtype, codec)) or np.dtype(dtype).itemsize


def block_elements(dtype: str, codec: str) -> int:
    """Elements that share a block header on the wire; 1 when there is none. A chunk is best cut at multiples of it."""
    return INT8_BLOCK_ELEMENTS if wire_codec(dtype, codec) == CODECS["int8"] else 1


def wire_size(dtype: str, codec: str, count: int) -> int:
    """Bytes that a chunk of `count` elements takes on the wire, block headers included."""
    block = block_elements(dtype, codec)
    headers = -(-count // block) * INT8_HEADER_BYTES if block > 1 else 0
    return count * wire_bytes(dtype, codec) + headers
