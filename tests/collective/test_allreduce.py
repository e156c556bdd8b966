"""The collectives against NumPy: random shapes, dtypes, world sizes, operations, codecs, chunk sizes and nestings."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from groups import Group
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlt import Communicator
from smlt.collective.codecs import FP16_CHUNK_ERROR, FP16_RELATIVE_ERROR
from smlt.collective.structure import EXACT_ELEMENTS
from smlt.errors import ConfigError
from smlt.store.embedded import EmbeddedStore

Array = npt.NDArray[Any]
DTYPES = ["float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.fixture(scope="module")
def groups(store: EmbeddedStore) -> Iterator[Callable[[int, int], Group]]:
    """Groups by (world size, chunk bytes), made once: random cases follow each other on the same connections."""
    made: dict[tuple[int, int], Group] = {}

    def get(world_size: int, chunk_bytes: int) -> Group:
        key = (world_size, chunk_bytes)
        if key not in made:
            made[key] = Group(store.url, f"random-{uuid.uuid4().hex[:8]}", world_size, chunk_bytes=chunk_bytes)
        return made[key]

    yield get
    for group in made.values():
        group.close()


def random_array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return np.asarray(rng.integers(info.min, info.max, shape, dtype=kind, endpoint=True))
    spread = {"float16": 3, "float32": 37, "float64": 37}[dtype]
    values = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.uniform(-spread, spread, shape))
    if rng.random() < 0.15 and values.size:
        values.reshape(-1)[rng.integers(values.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return np.asarray(values).astype(kind)


def reference(rows: list[Array], op: str) -> Array:
    """What NumPy says, computed wider where it can be."""
    stacked = np.stack(rows)
    dtype = rows[0].dtype
    with np.errstate(all="ignore"):
        if op == "min":
            return stacked.min(axis=0)
        if op == "max":
            return stacked.max(axis=0)
        if dtype.kind == "f":
            wide = stacked.astype(np.longdouble)
            return wide.mean(axis=0) if op == "mean" else wide.sum(axis=0)
        if op == "sum":
            return stacked.sum(axis=0, dtype=dtype)
        total = stacked.astype(object).sum(axis=0) if stacked.size else stacked.sum(axis=0)
        from fractions import Fraction

        flat = [round(Fraction(int(value), len(rows))) for value in np.ravel(total)]
        return np.array(flat, dtype=dtype).reshape(rows[0].shape)


def assert_close(result: Array, rows: list[Array], op: str, codec: str, amax: float = 0.0) -> None:
    """`amax`: of what shares chunks with this array."""
    expected = reference(rows, op)
    assert result.dtype == rows[0].dtype
    assert result.shape == rows[0].shape
    if rows[0].dtype.kind != "f":
        np.testing.assert_array_equal(result, expected)
        return
    n, dtype = len(rows), rows[0].dtype
    with np.errstate(all="ignore"):
        magnitudes = np.abs(np.stack(rows).astype(np.longdouble))
        magnitudes[~np.isfinite(magnitudes)] = 0
        weight = magnitudes.sum(axis=0) / (n if op == "mean" else 1)
        wire = np.float32 if dtype == np.float16 else dtype
        epsilon = max(np.finfo(dtype).eps, np.finfo(wire).eps)
        bound = weight * epsilon * n + np.finfo(dtype).smallest_subnormal * n
        if codec == "fp16":
            amax = max(amax, magnitudes.max(initial=0)) * n
            bound = bound + 2.01 * FP16_RELATIVE_ERROR * weight + 2 * n * FP16_CHUNK_ERROR * amax
        largest = np.longdouble(np.finfo(dtype).max)
        certain = np.isfinite(expected) & (np.abs(expected) < largest * 0.99) & (weight < largest * 0.99)
    error = np.abs(result.astype(np.longdouble)[certain] - expected.astype(np.longdouble)[certain])
    assert (error <= bound[certain]).all()
    special = ~np.isfinite(np.stack(rows)).all(axis=0) & ~np.isfinite(expected)
    np.testing.assert_array_equal(result[special], expected.astype(dtype)[special])


shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple) | st.sampled_from([(0,), (), (1,), (5000,), (333, 7), (4096,)])


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 5),
    op=st.sampled_from(["mean", "sum", "min", "max"]),
    codec=st.sampled_from(["fp32", "fp16"]),
    chunk_bytes=st.sampled_from([64, 1000, 262144]),
    leaves=st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=4),
    nesting=st.sampled_from(["one", "list", "dict", "deep"]),
    in_place=st.booleans(),
)
def test_allreduce_is_numpys(
    groups: Callable[[int, int], Group],
    seed: int,
    n: int,
    op: str,
    codec: str,
    chunk_bytes: int,
    leaves: list[tuple[str, tuple[int, ...]]],
    nesting: str,
    in_place: bool,
) -> None:
    if nesting == "one":
        leaves = leaves[:1]
    rng = np.random.default_rng(seed)
    inputs = [[random_array(rng, dtype, shape) for dtype, shape in leaves] for _ in range(n)]

    def nest(arrays: list[Array]) -> Any:
        if nesting == "one":
            return arrays[0]
        if nesting == "list":
            return list(arrays)
        named = {f"w{i}": array for i, array in enumerate(arrays)}
        return named if nesting == "dict" else {"net": (named, None), "more": []}

    def unnest(value: Any) -> list[Array]:
        if nesting == "one":
            return [value]
        if nesting == "list":
            return list(value)
        return list((value if nesting == "dict" else value["net"][0]).values())

    def call(comm: Communicator) -> list[Array]:
        x = nest([array.copy() for array in inputs[comm.rank]])
        result = comm.allreduce(x, op=op, codec=codec, out=x if in_place else None)
        assert not in_place or result is x
        return unnest(result)

    outputs = groups(n, chunk_bytes).run(call)
    every = np.concatenate(
        [a.astype(np.longdouble).ravel() for row in inputs for a in row if a.dtype.kind == "f"] or [np.zeros(1)]
    )
    amax = float(np.abs(every[np.isfinite(every)]).max(initial=0))
    for leaf in range(len(leaves)):
        rows = [inputs[rank][leaf] for rank in range(n)]
        assert_close(outputs[0][leaf], rows, op, codec if n > 1 and rows[0].size > EXACT_ELEMENTS else "fp32", amax)
        for rank in range(1, n):  # invariant 1: same bytes everywhere
            assert outputs[rank][leaf].tobytes() == outputs[0][leaf].tobytes()


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-10, 1.0, 65504.0, 1e10, 1e30, 1e38, 3e38])
def test_a_mean_of_values_of_any_magnitude_neither_overflows_nor_vanishes(
    group: Callable[..., Group], magnitude: float
) -> None:
    rows = [(np.linspace(0.5, 1, 1000) * magnitude * (1 if rank else 0.9)).astype(np.float32) for rank in range(5)]
    results = group(5).run(
        lambda comm: (comm.allreduce(rows[comm.rank], codec="fp16"), comm.allreduce(rows[comm.rank], codec="fp32"))
    )
    for compressed, exact in results:
        assert_close(compressed, rows, "mean", "fp16")
        assert_close(exact, rows, "mean", "fp32")
        assert np.isfinite(compressed).all()
        assert np.isfinite(exact).all()


def test_broadcast_and_allgather_are_exact(group: Callable[..., Group]) -> None:
    def call(comm: Communicator) -> Any:
        rng = np.random.default_rng(comm.rank)
        x = {
            "f": rng.standard_normal((300, 500)),
            "i": rng.integers(0, 100, 7, dtype=np.int16),
            "s": comm.rank,
            "b": comm.rank == 1,
        }
        return comm.broadcast(x, root=2), comm.allgather(x), comm.broadcast(np.full(3, comm.rank), root=0)

    results = group(3).run(call)
    rngs = [np.random.default_rng(rank) for rank in range(3)]
    floats = [rng.standard_normal((300, 500)) for rng in rngs]
    for sent, gathered, zeros in results:
        np.testing.assert_array_equal(sent["f"], floats[2])
        assert (sent["s"], sent["b"]) == (2, False)
        assert type(sent["s"]) is int
        np.testing.assert_array_equal(gathered["f"], np.stack(floats))
        assert gathered["i"].shape == (3, 7)
        assert gathered["s"].tolist() == [0, 1, 2]
        assert gathered["b"].tolist() == [False, True, False]
        assert zeros.tolist() == [0, 0, 0]


def test_numbers_and_numpy_scalars_come_back_as_what_they_were(group: Callable[..., Group]) -> None:
    x = {"float": 1.5, "int": 3, "generic": np.float32(2), "zero_d": np.array(4.0)}
    for y in group(2).run(lambda comm: comm.allreduce(x, op="sum")):
        assert y == {"float": 3.0, "int": 6, "generic": 4.0, "zero_d": 8.0}
        assert [type(value) for value in y.values()] == [float, int, np.float32, np.ndarray]


def test_a_mean_of_python_ints_is_a_float_and_of_integer_arrays_rounded(group: Callable[..., Group]) -> None:
    for number, array in group(2).run(lambda comm: (comm.allreduce(comm.rank), comm.allreduce(np.array([comm.rank + 1])))):
        assert (number, type(number)) == (0.5, float)
        assert (array.tolist(), array.dtype) == ([2], np.int64)  # 1.5: ties go to even


def test_booleans_take_min_and_max_only(group: Callable[..., Group]) -> None:
    def call(comm: Communicator) -> Any:
        x = np.array([True, False, comm.rank == 0])
        with pytest.raises(ConfigError, match="booleans have no mean"):
            comm.allreduce(x)
        return comm.allreduce(x, op="max"), comm.allreduce(x, op="min")

    for any_of, all_of in group(2).run(call):
        assert any_of.tolist() == [True, False, True]
        assert all_of.tolist() == [True, False, False]


def test_non_contiguous_byte_swapped_and_buffer_inputs(group: Callable[..., Group]) -> None:
    import array

    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    x = {
        "transposed": base.T,
        "strided": base[::2, ::-1],
        "swapped": base.astype(">f4"),
        "buffer": array.array("d", [1.0, 2.0]),
        "view": memoryview(b"\x01\x02"),
    }
    for y in group(2).run(lambda comm: comm.allreduce(x, codec="fp32")):
        np.testing.assert_array_equal(y["transposed"], base.T)
        np.testing.assert_array_equal(y["strided"], base[::2, ::-1])
        np.testing.assert_array_equal(y["swapped"], base)
        assert y["swapped"].dtype == np.dtype(">f4")
        assert y["buffer"].tolist() == [1.0, 2.0]
        assert y["view"].tolist() == [1, 2]


class Exported:
    """Anything that speaks DLPack and nothing else."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_dlpack_objects_are_read_and_written(group: Callable[..., Group]) -> None:
    def call(comm: Communicator) -> tuple[Array, Array]:
        x = np.full(1000, comm.rank, np.float32)
        target = np.zeros(1000, np.float32)
        comm.allreduce(Exported(x), out=target)
        return comm.allreduce(Exported(x)), target

    for result, target in group(3).run(call):
        assert (result == 1).all()
        assert (target == 1).all()


def test_out_is_filled_and_returned(group: Callable[..., Group]) -> None:
    def call(comm: Communicator) -> tuple[Array, Array]:
        x, whole, strided = (
            np.full(5000, comm.rank, np.float32),
            np.empty(5000, np.float32),
            np.zeros((5000, 2), np.float32),
        )
        assert comm.allreduce(x, out=whole) is whole
        comm.allreduce(x, out=strided[:, 1])
        assert (x == comm.rank).all()
        return whole, strided[:, 1].copy()

    for whole, strided in group(3).run(call):
        assert (whole == 1).all()
        assert (strided == 1).all()


def test_input_and_output_may_overlap(group: Callable[..., Group]) -> None:
    def call(comm: Communicator) -> tuple[Array, Array]:
        shifted = np.arange(300_001, dtype=np.float32) + comm.rank
        comm.allreduce(shifted[:-1], codec="fp32", out=shifted[1:])
        pair = {"a": np.full(200_000, 1.0, np.float32), "b": np.full(200_000, 2, np.int32)}
        comm.allreduce(pair, op="sum", out={"a": pair["b"].view(np.float32), "b": pair["a"].view(np.int32)})
        return shifted[1:], np.concatenate([pair["b"].view(np.float32), pair["a"].view(np.int32)])

    for shifted, swapped in group(2, chunk_bytes=4096).run(call):
        np.testing.assert_array_equal(shifted, np.arange(300_000) + 0.5)
        assert (swapped[:200_000] == 2).all()
        assert (swapped[200_000:] == 4).all()


def test_a_codec_for_each_key(group: Callable[..., Group]) -> None:
    stats = np.array([1 / 3, 1e-300])
    x = {"gradient": np.full(1000, 1 / 3, np.float32), "stats": stats}
    for y in group(2).run(lambda comm: comm.allreduce(x, codec={"gradient": "fp16", "stats": "fp32"})):
        np.testing.assert_array_equal(y["stats"], stats)
        assert 0 < abs(y["gradient"][0] - np.float32(1 / 3)) < 2.0**-11


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones(2), {"op": "median"}, "unknown op 'median'"),
        (np.ones(2), {"codec": "zip"}, "unknown codec 'zip'"),
        (np.ones(2), {"out": np.ones(3)}, r"out is float64\[3\], not float64\[2\]"),
        (np.ones(2), {"out": [np.ones(2)]}, "structure"),
        (np.ones(2, complex), {}, "cannot reduce dtype complex128"),
        (np.array(["a"]), {}, "cannot reduce dtype"),
        (object(), {}, "cannot reduce a builtins.object"),
        ({"a": 1}, {"codec": {"b": "fp16"}}, "same keys"),
        (1.0, {"out": 2.0}, "out cannot be written to"),
        (2**70, {"op": "sum"}, "does not fit 64 bits"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(x: Any, options: dict[str, Any], message: str) -> None:
    with Communicator() as comm, pytest.raises(ConfigError, match=message):
        comm.allreduce(x, **options)
    assert comm.step == 0


def test_the_same_job_twice_gives_the_same_bits(group: Callable[..., Group]) -> None:
    workers = group(4, chunk_bytes=4096)
    rows = [np.random.default_rng(rank).standard_normal(50_000).astype(np.float32) for rank in range(4)]
    first, second = (workers.run(lambda comm: comm.allreduce(rows[comm.rank]).tobytes()) for _ in range(2))
    assert len(set(first + second)) == 1
