"""Names of codecs, operations and dtypes, and what they may be combined with.

Codecs
    fp32
        No compression: float32 travels as float32, float64 as float64. Exact up to the rounding of the sum.
    fp16
        Floats travel as IEEE 754 binary16 with one power-of-two scale for each chunk of at most 131,072 elements. One
        encoding of an element x errs by at most ``max(2**-11 * |x|, 2**-39 * amax)`` with amax the largest finite
        magnitude of the chunk. In an all-reduce a value is encoded twice: once by its worker, once as an aggregate.

Small leaves of one dtype share chunks. Integers, booleans and leaves of at most 64 elements are never compressed.
"""

from __future__ import annotations

import numpy as np

from smlt.errors import ConfigError

# Numbers shared with csrc/codec.h.
CODECS = {"fp32": 0, "fp16": 1}
OPERATIONS = {"mean": 0, "sum": 1, "min": 2, "max": 3}
WIRE_DTYPES = {
    name: number
    for number, name in enumerate(
        ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    )
}

#: Relative error of one fp16 encoding, and its absolute error relative to the chunk's largest magnitude.
FP16_RELATIVE_ERROR = 2.0**-11
FP16_CHUNK_ERROR = 2.0**-39


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
    """The native codec for a segment of wire dtype `dtype` when the user asked for `codec`."""
    return CODECS["fp16"] if codec == "fp16" and dtype.startswith("float") else CODECS["fp32"]


def wire_bytes(dtype: str, codec: str) -> int:
    """Bytes that one element takes on the wire."""
    return 2 if wire_codec(dtype, codec) == CODECS["fp16"] else np.dtype(dtype).itemsize
