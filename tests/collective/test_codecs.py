"""Codecs and kernels: the documented bounds, exactness of integers, and equality of all instruction sets."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smlt.collective import _native
from smlt.collective.codecs import CODECS, FP16_CHUNK_ERROR, FP16_RELATIVE_ERROR, OPERATIONS, WIRE_DTYPES

Array = npt.NDArray[np.generic]


@pytest.fixture(params=_native.codec_paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.codec_path()
    _native.use_codec_path(request.param)
    yield request.param
    _native.use_codec_path(before)


def kernel(dtype: str, codec: str, operation: str) -> _native.Kernel:
    return _native.Kernel(WIRE_DTYPES[dtype], CODECS[codec], OPERATIONS[operation])


def as_bytes(array: Array) -> npt.NDArray[np.uint8]:
    return array.view(np.uint8) if array.size else np.empty(0, np.uint8)


def encoded(values: Array, codec: str) -> tuple[npt.NDArray[np.uint8], int]:
    k = kernel(values.dtype.name, codec, "sum")
    wire = np.zeros(values.size * k.wire_bytes, np.uint8)
    return wire, k.encode(as_bytes(values), wire)


def round_trip(values: Array, codec: str) -> Array:
    wire, exponent = encoded(values, codec)
    result = np.empty_like(values)
    kernel(values.dtype.name, codec, "sum").decode(wire, exponent, as_bytes(result))
    return result


floats32 = hnp.arrays(np.float32, st.integers(1, 70), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))
floats64 = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(allow_nan=False, allow_infinity=False))


def assert_within_bound(values: Array, result: Array) -> None:
    finite = np.isfinite(values)
    exact, got = values[finite].astype(np.longdouble), result[finite].astype(np.longdouble)
    amax = np.abs(exact).max(initial=0)
    smallest = np.longdouble(np.finfo(values.dtype).smallest_subnormal)
    bound = np.maximum(FP16_RELATIVE_ERROR * np.abs(exact) * 1.001, FP16_CHUNK_ERROR * amax) + smallest
    assert (np.abs(got - exact) <= bound).all()
    np.testing.assert_array_equal(result[~finite], values[~finite])


@given(floats32)
def test_fp16_stays_within_its_bound_and_keeps_nan_and_inf(values: Array) -> None:
    assert_within_bound(values, round_trip(values, "fp16"))


@given(floats64)
def test_fp16_of_float64_stays_within_its_bound(values: Array) -> None:
    assert_within_bound(values, round_trip(values, "fp16"))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-30, 1e-4, 1.0, 65504.0, 65520.0, 1e30, 1e38, 3.4e38, 3.4028e38])
def test_values_of_any_magnitude_survive_fp16(magnitude: float, path: str) -> None:
    values = (np.linspace(0.5, 1.0, 37) * magnitude).astype(np.float32)
    result = round_trip(values, "fp16")
    assert np.isfinite(result).all()
    assert (result != 0)[values != 0].all()
    assert_within_bound(values, result)


@given(floats32, st.integers(0, 3))
def test_all_instruction_sets_give_the_same_bits(values: Array, start: int) -> None:
    values = values[min(start, values.size - 1) :].copy()
    values[np.isnan(values)] = np.nan  # one NaN: which payload survives an addition is the processor's choice
    seen = []
    before = _native.codec_path()
    for name in _native.codec_paths():
        _native.use_codec_path(name)
        wire, exponent = encoded(values, "fp16")
        k, raw = kernel("float32", "fp16", "mean"), kernel("float32", "fp32", "mean")
        accumulator = np.zeros_like(values)
        k.reduce(as_bytes(accumulator), wire, exponent, 0, True)
        k.reduce(as_bytes(accumulator), wire, exponent, 1, False)
        raw.reduce(as_bytes(accumulator), as_bytes(values), 0, 2, False)
        overflowed = k.finish(as_bytes(accumulator), 3, 1)
        seen.append((wire.tobytes(), exponent, accumulator.tobytes(), round_trip(values, "fp16").tobytes(), overflowed))
    _native.use_codec_path(before)
    assert all(one == seen[0] for one in seen)


def test_every_half_decodes_and_encodes_to_itself(path: str) -> None:
    halves = np.arange(65536, dtype=np.uint16)
    halves = halves[~np.isnan(halves.view(np.float16))]
    k, values = kernel("float32", "fp16", "sum"), np.empty(halves.size, np.float32)
    k.decode(as_bytes(halves), 0, as_bytes(values))
    np.testing.assert_array_equal(values, halves.view(np.float16).astype(np.float32))
    wire = np.empty_like(halves)
    k.encode(as_bytes(values), as_bytes(wire), 0)
    np.testing.assert_array_equal(wire, halves)


def test_rounding_to_half_is_numpys(path: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, np.float32(2.0) ** rng.uniform(-26, 16, 200_000).astype(np.float32)])
    values = values[~np.isnan(values)]
    wire = np.empty(values.size, np.uint16)
    kernel("float32", "fp16", "sum").encode(as_bytes(values), as_bytes(wire), 0)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(wire, values.astype(np.float16).view(np.uint16))


@given(floats32)
def test_what_was_decoded_encodes_to_the_same_values_again(values: Array) -> None:
    once = round_trip(values, "fp16")
    _, exponent = encoded(values, "fp16")
    k, wire = kernel("float32", "fp16", "sum"), np.zeros(values.size * 2, np.uint8)
    k.encode(as_bytes(once), wire, exponent)
    twice = np.empty_like(once)
    k.decode(wire, exponent, as_bytes(twice))
    np.testing.assert_array_equal(once, twice)


INTEGERS = [name for name in WIRE_DTYPES if "int" in name]


@settings(max_examples=200)
@given(st.data())
def test_integers_are_reduced_exactly(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(INTEGERS)))
    operation = data.draw(st.sampled_from(list(OPERATIONS)))
    info, n = np.iinfo(dtype), data.draw(st.integers(1, 5))
    size = data.draw(st.integers(1, 9))
    element = st.integers(int(info.min), int(info.max))
    rows = [np.array(data.draw(st.lists(element, min_size=size, max_size=size)), dtype) for _ in range(n)]
    k = kernel(dtype.name, "fp32", operation)
    accumulator = np.zeros(size * k.accumulator_bytes, np.uint8)
    for i, row in enumerate(rows):
        k.reduce(accumulator, as_bytes(row), 0, 0, i == 0)
    k.finish(accumulator, n, 0)
    got = accumulator[: size * dtype.itemsize].view(dtype).tolist()
    columns = list(zip(*(row.tolist() for row in rows), strict=True))
    if operation == "mean":
        assert got == [round(Fraction(sum(column), n)) for column in columns]  # Fraction rounds ties to even
    elif operation == "sum":
        assert got == np.sum(np.stack(rows), axis=0, dtype=dtype).tolist()
    else:
        assert got == [{"min": min, "max": max}[operation](column) for column in columns]


def test_integers_have_no_fp16_kernel() -> None:
    with pytest.raises(ValueError, match="no such kernel"):
        kernel("int32", "fp16", "sum")
