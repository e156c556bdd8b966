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
from smlt.collective.codecs import (
    BF16_RELATIVE_ERROR,
    BF16_SMALLEST_ERROR,
    CODECS,
    FP16_CHUNK_ERROR,
    FP16_RELATIVE_ERROR,
    INT8_BLOCK_ELEMENTS,
    INT8_BLOCK_ERROR,
    INT8_SMALLEST_ERROR,
    OPERATIONS,
    WIRE_DTYPES,
    block_elements,
    wire_bytes,
    wire_codec,
    wire_size,
)

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
    wire = np.zeros(k.wire_size(values.size), np.uint8)
    return wire, k.encode(as_bytes(values), wire)


def round_trip(values: Array, codec: str) -> Array:
    wire, exponent = encoded(values, codec)
    result = np.empty_like(values)
    kernel(values.dtype.name, codec, "sum").decode(wire, exponent, as_bytes(result))
    return result


LARGEST = np.finfo(np.float32).max
COMPRESSED = ["fp16", "bf16", "int8"]
floats32 = hnp.arrays(np.float32, st.integers(1, 70), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))
floats64 = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(allow_nan=False, allow_infinity=False))
#: Chunks of several int8 blocks: few drawn values beside each other over and over, so that blocks differ.
blocks32 = st.builds(lambda values, size: np.resize(values, size), floats32, st.integers(1, 3 * INT8_BLOCK_ELEMENTS))
any_bits = st.builds(
    lambda seed, size: np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32).view(np.float32),
    st.integers(0, 2**32 - 1),
    st.integers(1, 600),
)


def of_magnitudes(seed: int, size: int, powers: tuple[float, float]) -> Array:
    """Uniform numbers times powers of two between the two, drawn for each element."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(-1, 1, size) * 2.0 ** rng.uniform(*powers, size)).astype(np.float32)


powers = st.sampled_from([(-149, -125), (-149, 127.999), (-130, -120), (-100, -99), (-10, 0), (0, 30), (120, 127.999)])
extremes = st.builds(of_magnitudes, st.integers(0, 2**32 - 1), st.integers(1, 600), powers)
chunks32 = blocks32 | any_bits | extremes


def bound_of(values: Array, codec: str) -> npt.NDArray[np.longdouble]:
    """The documented error of one encoding, an element each."""
    exact = np.abs(np.where(np.isfinite(values), values, 0)).astype(np.longdouble)
    if codec == "fp16":
        smallest = np.longdouble(np.finfo(values.dtype).smallest_subnormal)
        return np.maximum(FP16_RELATIVE_ERROR * exact * 1.001, FP16_CHUNK_ERROR * exact.max(initial=0)) + smallest
    if codec == "bf16":
        return np.maximum(BF16_RELATIVE_ERROR * exact, BF16_SMALLEST_ERROR)
    starts = np.arange(0, values.size, INT8_BLOCK_ELEMENTS)
    largest = np.repeat(np.maximum.reduceat(exact, starts), INT8_BLOCK_ELEMENTS)[: values.size]
    return np.maximum(INT8_BLOCK_ERROR * largest, INT8_SMALLEST_ERROR)


def assert_within_bound(values: Array, result: Array, codec: str = "fp16") -> None:
    finite = np.isfinite(values)
    exact, got = values[finite].astype(np.longdouble), result[finite].astype(np.longdouble)
    assert np.isfinite(got).all()
    assert (np.abs(got - exact) <= bound_of(values, codec)[finite]).all()
    np.testing.assert_array_equal(result[~finite], values[~finite])


@pytest.mark.parametrize("codec", COMPRESSED)
@given(values=chunks32)
def test_every_codec_stays_within_its_bound_and_keeps_nan_and_inf(codec: str, values: Array) -> None:
    assert_within_bound(values, round_trip(values, codec), codec)


@given(floats64)
def test_fp16_of_float64_stays_within_its_bound(values: Array) -> None:
    assert_within_bound(values, round_trip(values, "fp16"))


@pytest.mark.parametrize("codec", COMPRESSED)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-30, 1e-4, 1.0, 65504.0, 65520.0, 1e30, 1e38, 3.4e38, 3.4028e38])
def test_values_of_any_magnitude_survive(magnitude: float, codec: str, path: str) -> None:
    values = (np.linspace(0.5, 1.0, 337) * magnitude).astype(np.float32)
    result = round_trip(values, codec)
    assert np.isfinite(result).all()
    if codec == "fp16" or magnitude > 1e-38:  # a step of int8 and the last place of bf16 are larger than these
        assert (result != 0)[values != 0].all()
    assert_within_bound(values, result, codec)


@pytest.mark.parametrize("codec", COMPRESSED)
def test_the_largest_floats_stay_finite_beside_others(codec: str, path: str) -> None:
    values = np.full(600, 1.0, np.float32)
    values[::7], values[3::7] = LARGEST, -LARGEST
    assert_within_bound(values, round_trip(values, codec), codec)
    if codec == "int8":
        scale = (encoded(values, codec)[0][:2].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        assert np.isfinite(scale * np.float32(127)).all()
    values[5], values[6] = np.inf, np.nan
    assert_within_bound(values, round_trip(values, codec), codec)


@pytest.mark.parametrize("codec", ["fp32", *COMPRESSED])
@given(values=chunks32, start=st.integers(0, 3), operation=st.sampled_from(list(OPERATIONS)))
def test_all_instruction_sets_give_the_same_bits(codec: str, values: Array, start: int, operation: str) -> None:
    values = values[min(start, values.size - 1) :].copy()
    seen = []
    before = _native.codec_path()
    for name in _native.codec_paths():
        _native.use_codec_path(name)
        wire, exponent = encoded(values, codec)
        k, raw = kernel("float32", codec, operation), kernel("float32", "fp32", operation)
        accumulator, lost, compensated = np.zeros_like(values), np.zeros_like(values), np.zeros_like(wire)
        k.reduce(as_bytes(accumulator), wire, exponent, 0, True)
        k.reduce(as_bytes(accumulator), wire, exponent, 1, False)
        raw.reduce(as_bytes(accumulator), as_bytes(values), 0, 2, False)
        overflowed = k.finish(as_bytes(accumulator), 3, 1)
        k.encode_feedback(as_bytes(values), None, as_bytes(lost), compensated)
        k.encode_feedback(as_bytes(values), as_bytes(lost), as_bytes(lost), compensated)
        arrays = (wire, accumulator, round_trip(values, codec), lost, compensated)
        seen.append((*(array.tobytes() for array in arrays), exponent, overflowed))
    _native.use_codec_path(before)
    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize("codec", COMPRESSED)
@given(values=chunks32)
def test_what_was_decoded_encodes_to_the_same_bytes_again(codec: str, values: Array) -> None:
    for name in _native.codec_paths():
        before = _native.codec_path()
        _native.use_codec_path(name)
        wire, exponent = encoded(values, codec)
        once, k, again = round_trip(values, codec), kernel("float32", codec, "sum"), wire.copy()
        if codec == "int8":
            for block in range(0, values.size, INT8_BLOCK_ELEMENTS):  # only the headers are to be kept
                codes = k.wire_size(block) + k.block_header_bytes
                again[codes : codes + INT8_BLOCK_ELEMENTS] = 77
        k.encode(as_bytes(once), again, _native.KEEP_SCALES if codec == "int8" else exponent)
        _native.use_codec_path(before)
        np.testing.assert_array_equal(again, wire)


@pytest.mark.parametrize("codec", ["fp32", *COMPRESSED])
@given(values=chunks32, data=st.data())
def test_a_chunk_decoded_in_pieces_gives_the_bits_of_the_whole(codec: str, values: Array, data: st.DataObject) -> None:
    k = kernel("float32", codec, "sum")
    wire, exponent = encoded(values, codec)
    result, total = np.zeros_like(values), np.ones_like(values)
    done = taken = arrived = 0
    while done < values.size:
        arrived = min(wire.size, arrived + data.draw(st.integers(1, 400)))
        count = k.wire_elements(arrived - taken, values.size - done)
        piece = wire[taken : taken + k.wire_size(count)]
        k.decode(piece, exponent, as_bytes(result[done : done + count]))
        k.reduce(as_bytes(total[done : done + count]), piece, exponent, 0, False)
        done, taken = done + count, taken + piece.size
        assert taken <= arrived
    assert taken == wire.size
    whole = np.ones_like(values)
    k.reduce(as_bytes(whole), wire, exponent, 0, False)
    assert result.tobytes() == round_trip(values, codec).tobytes()
    assert total.tobytes() == whole.tobytes()


@given(st.sampled_from(list(CODECS)), st.integers(0, 2000), st.integers(0, 2000))
def test_wire_elements_are_the_most_whole_blocks_that_fit(codec: str, length: int, left: int) -> None:
    k = kernel("float32", codec, "sum")
    fitting = [n for n in [*range(0, left, k.block_elements), left] if k.wire_size(n) <= length]
    assert k.wire_elements(length, left) == max(fitting)


@given(st.sampled_from(list(CODECS)), st.sampled_from(["float32", "float64", "int32", "uint8"]), st.integers(0, 2**31))
def test_python_and_c_agree_about_the_wire(codec: str, dtype: str, count: int) -> None:
    k = _native.Kernel(WIRE_DTYPES[dtype], wire_codec(dtype, codec), OPERATIONS["sum"])
    assert wire_size(dtype, codec, count) == k.wire_size(count)
    assert (wire_bytes(dtype, codec), block_elements(dtype, codec)) == (k.wire_bytes, k.block_elements)


def test_bf16_rounds_to_the_nearest_and_ties_to_even(path: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000  # ties
    values = bits.view(np.float32)
    bits = bits[np.abs(values) < 3.38e38]
    values = bits.view(np.float32).astype(np.float64)
    below = bits & np.uint32(0xFFFF0000)
    above = below + np.uint32(0x10000)
    to_below = np.abs(values - below.view(np.float32))
    to_above = np.abs(above.view(np.float32).astype(np.float64) - values)
    odd = (below >> np.uint32(16) & np.uint32(1)).astype(bool)
    expected = np.where((to_above < to_below) | ((to_above == to_below) & odd), above, below) >> np.uint32(16)
    wire, _ = encoded(bits.view(np.float32), "bf16")
    np.testing.assert_array_equal(wire.view(np.uint16), expected.astype(np.uint16))


def test_an_int8_block_is_its_scale_and_the_nearest_codes(path: str) -> None:
    values = np.random.default_rng(0).standard_normal(INT8_BLOCK_ELEMENTS).astype(np.float32)
    wire, exponent = encoded(values, "int8")
    scale = (wire[:2].view(np.uint16).astype(np.uint32) << 16).view(np.float32)[0]
    smallest = np.abs(values).max() / 127
    assert smallest <= scale <= smallest * (1 + 2**-7)
    np.testing.assert_array_equal(wire[2:].view(np.int8), np.rint(values * (np.float32(1) / scale)))
    assert exponent == 0


def test_an_int8_block_with_inf_and_nan_is_flagged_and_keeps_codes_for_them(path: str) -> None:
    values = np.linspace(-1, 1, 2 * INT8_BLOCK_ELEMENTS, dtype=np.float32)
    values[[1, 2, 3]] = np.inf, -np.inf, np.nan
    wire, _ = encoded(values, "int8")
    first, second = wire[: 2 + INT8_BLOCK_ELEMENTS], wire[2 + INT8_BLOCK_ELEMENTS :]
    assert first[2:].view(np.int8)[[1, 2, 3]].tolist() == [127, -127, -128]
    assert np.abs(first[2:].view(np.int8)[4:]).max() <= 126
    assert (first[1] >> 7, second[1] >> 7) == (1, 0)


def test_a_block_of_zeros_has_no_scale(path: str) -> None:
    wire, _ = encoded(np.array([0.0, -0.0] * 150, np.float32), "int8")
    assert not wire.any()


@pytest.mark.parametrize(("dtype", "codec"), [("float32", "fp32"), ("float64", "fp16"), *(("float32", c) for c in COMPRESSED)])
def test_feedback_keeps_exactly_what_the_encoding_lost(dtype: str, codec: str, path: str) -> None:
    rng = np.random.default_rng(0)
    source, residual = rng.standard_normal((2, 1777)).astype(dtype)
    source[7], source[300] = np.inf, np.nan
    k, value, lost = kernel(dtype, codec, "sum"), source + residual, np.empty_like(source)
    wire, expected = np.zeros(k.wire_size(source.size), np.uint8), encoded(value, codec)
    exponent = k.encode_feedback(as_bytes(source), as_bytes(residual), as_bytes(lost), wire)
    assert (wire.tobytes(), exponent) == (expected[0].tobytes(), expected[1])
    with np.errstate(invalid="ignore"):
        difference = np.where(np.isfinite(value), value - round_trip(value, codec), 0)
    np.testing.assert_array_equal(lost, difference)
    in_place = residual.copy()
    k.encode_feedback(as_bytes(source), as_bytes(in_place), as_bytes(in_place), wire)
    np.testing.assert_array_equal(in_place, lost)
    k.encode_feedback(as_bytes(source), None, as_bytes(lost), wire)
    assert wire.tobytes() == encoded(source, codec)[0].tobytes()


@pytest.mark.parametrize("codec", COMPRESSED)
@pytest.mark.parametrize("magnitude", [1.0, 1e30, 1e-30])
def test_with_feedback_the_decoded_steps_add_up_to_the_inputs(codec: str, magnitude: float, path: str) -> None:
    rng = np.random.default_rng(0)
    k = kernel("float32", codec, "sum")
    weights = 10.0 ** rng.uniform(-4, 0, 700)  # small elements beside large ones: int8 alone loses them all
    residual, decoded = np.zeros(700, np.float32), np.empty(700, np.float32)
    sent, plain, wanted = np.zeros((3, 700))
    wire = np.zeros(k.wire_size(700), np.uint8)
    largest = np.zeros(700)
    for _ in range(100):
        gradient = (weights * magnitude * rng.normal(0.5, 0.2, 700)).astype(np.float32)
        exponent = k.encode_feedback(as_bytes(gradient), as_bytes(residual), as_bytes(residual), wire)
        k.decode(wire, exponent, as_bytes(decoded))
        sent += decoded
        plain += round_trip(gradient, codec)
        wanted += gradient
        largest = np.maximum(largest, bound_of(gradient, codec).astype(np.float64))
    assert (np.abs(sent - wanted) <= 2.1 * largest + 1e-5 * np.abs(wanted)).all()
    assert np.abs(sent - wanted).mean() < 0.3 * np.abs(plain - wanted).mean()


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


@pytest.mark.parametrize(
    ("dtype", "codec"), [*(("int32", codec) for codec in COMPRESSED), ("float64", "bf16"), ("float64", "int8")]
)
def test_what_a_codec_cannot_hold_has_no_kernel(dtype: str, codec: str) -> None:
    with pytest.raises(ValueError, match="no such kernel"):
        kernel(dtype, codec, "sum")
    assert wire_codec(dtype, codec) == CODECS["fp16" if dtype == "float64" else "fp32"]


def test_integers_lose_nothing_to_feedback(path: str) -> None:
    values, lost = np.arange(-5, 6, dtype=np.int32), np.ones(11, np.int32)
    wire = np.zeros(values.nbytes, np.uint8)
    kernel("int32", "fp32", "sum").encode_feedback(as_bytes(values), None, as_bytes(lost), wire)
    np.testing.assert_array_equal(wire.view(np.int32), values)
    assert not lost.any()
