"""Nested values to flat buffers and back: what a caller hands to a collective, and what it gets.

A value is a NumPy array or scalar, a Python number, a PyTorch CPU tensor, anything with DLPack or the buffer protocol, or
a dict, list, tuple or named tuple of these, nested as one likes; None stands for "nothing here". The leaves are fused:
one buffer for each pair of wire dtype and codec. A single contiguous leaf is not copied: the native code reads the
caller's memory and writes the result to the caller's `out`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from smlt.collective.codecs import check_codec, check_operation, dtype_name, wire_dtype
from smlt.collective.plan import SegmentType
from smlt.errors import ConfigError

Array = npt.NDArray[Any]

#: Leaves of so few elements are never compressed: a loss or a count stays exact, and does not set the scale of the chunk
#: that it would share with a gradient.
EXACT_ELEMENTS = 64


@dataclass
class Leaf:
    """One array of a value, as NumPy sees it, and the way back to the caller's type."""

    path: str
    array: Array
    codec: str
    dtype: str  # the caller's; bfloat16 is seen through a float32 copy
    restore: Callable[[Array], Any]  # a result as the caller's type
    write: Callable[[Array], None] | None  # a result into the caller's own memory; None when that cannot be written to
    is_number: bool = False


@dataclass
class Segment:
    """Leaves fused into one run of elements on the wire. `source` and `target` are contiguous; they may be one."""

    type: SegmentType
    leaves: list[int]
    source: Array
    target: Array


def _torch_leaf(path: str, tensor: Any, codec: str) -> Leaf:
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise ConfigError(f"the tensor is on {tensor.device}; collectives take CPU tensors: call .cpu() first")
    if tensor.is_sparse or tensor.is_quantized:
        raise ConfigError("sparse and quantized tensors cannot be reduced; make them dense first")
    plain = tensor.detach()
    if plain.dtype != torch.bfloat16:
        array = plain.numpy()
        return Leaf(path, array, codec, dtype_name(array.dtype), torch.from_numpy, _writer(array))

    def write(result: Array) -> None:
        plain.copy_(torch.from_numpy(result))

    def restore(result: Array) -> Any:
        return torch.from_numpy(result).to(torch.bfloat16)

    return Leaf(path, plain.float().numpy(), codec, "bfloat16", restore, write)


def _writer(array: Array) -> Callable[[Array], None] | None:
    """Copies a result into the caller's array, unless it was written there in the first place."""
    if not array.flags.writeable:
        return None

    def write(result: Array) -> None:
        if not np.may_share_memory(result, array):
            array[...] = result

    return write


def _number(path: str, value: Any, codec: str, floats: bool) -> Leaf:
    if isinstance(value, np.generic):
        array = np.asarray(value)
        return Leaf(path, array, codec, dtype_name(array.dtype), lambda result: result[()], None, is_number=True)
    kind = bool if isinstance(value, bool) else int if isinstance(value, int) and not floats else float
    try:
        array = np.asarray(value, {bool: np.bool_, int: np.int64, float: np.float64}[kind])
    except OverflowError as error:
        raise ConfigError(f"the integer {value} does not fit 64 bits") from error
    return Leaf(path, array, codec, dtype_name(array.dtype), lambda result: kind(result.item()), None, is_number=True)


def _leaf(path: str, value: Any, codec: str, floats: bool) -> Leaf:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch_leaf(path, value, codec)
    if isinstance(value, (bool, int, float, np.generic)):
        return _number(path, value, codec, floats)
    if isinstance(value, np.ndarray):
        array = value
    elif hasattr(value, "__dlpack__"):
        array = np.from_dlpack(value)
    elif hasattr(value, "__array__"):
        array = np.asarray(value)
    else:
        try:
            array = np.asarray(memoryview(value))
        except TypeError:
            raise ConfigError(
                f"cannot reduce a {type(value).__module__}.{type(value).__qualname__}: give arrays, numbers, CPU tensors, "
                "objects with DLPack or the buffer protocol, or dicts, lists and tuples of these"
            ) from None
    return Leaf(path, array, codec, dtype_name(array.dtype), lambda result: result, _writer(array))


def _children(value: Any) -> Iterator[tuple[str, Any]] | None:
    """The parts of a container by name, None for a leaf. Dicts go by sorted key: insertion order may differ by worker."""
    if isinstance(value, Mapping):
        return ((str(key), value[key]) for key in sorted(value, key=lambda key: (type(key).__name__, key)))
    if isinstance(value, (list, tuple)):
        return ((str(index), item) for index, item in enumerate(value))
    return None


def flatten(value: Any, codec: str | Mapping[str, str], *, floats: bool = False) -> list[Leaf]:
    """The leaves of `value` in an order that depends only on its structure.

    `codec` is a codec's name, or a mapping from the keys of a top-level dict to names.
    With `floats`, Python ints are taken as floats: a mean of them is seldom whole.
    """
    leaves: list[Leaf] = []

    def visit(path: str, item: Any, codec: str) -> None:
        if item is None:
            return
        children = _children(item)
        if children is not None:
            for name, child in children:
                visit(f"{path}.{name}" if path else name, child, codec)
            return
        leaf = _leaf(path, item, codec, floats)
        if wire_dtype(leaf.array.dtype) is None:
            where = f" of {path}" if path else ""
            raise ConfigError(f"cannot reduce dtype {leaf.dtype}{where}: floats, integers and booleans only")
        leaves.append(leaf)

    if isinstance(codec, Mapping):
        if not isinstance(value, Mapping) or set(codec) != set(value):
            raise ConfigError("a mapping of codecs needs a dict with the same keys")
        for key in sorted(value, key=lambda key: (type(key).__name__, key)):
            visit(str(key), value[key], check_codec(codec[key]))
    else:
        visit("", value, check_codec(codec))
    return leaves


def rebuild(value: Any, results: Iterator[Any]) -> Any:
    """The structure of `value` with the leaves replaced by `results`, in flatten's order."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        done = {key: rebuild(value[key], results) for key in sorted(value, key=lambda key: (type(key).__name__, key))}
        return {key: done[key] for key in value}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rebuild(item, results) for item in value))
    if isinstance(value, (list, tuple)):
        items = [rebuild(item, results) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return next(results)


#: What the workers must agree on for a leaf: path, dtype, shape, codec.
Signature = tuple[str, str, tuple[int, ...], str]


def _describe(leaves: tuple[Signature, ...]) -> str:
    """The leaves in words, for an error message: float32[64, 10], or {w: float32[64, 10], b: float32[10]}."""
    texts = [f"{path + ': ' if path else ''}{dtype}{list(shape)}" for path, dtype, shape, _ in leaves[:8]]
    if len(leaves) > 8:
        texts.append(f"and {len(leaves) - 8} more")
    return texts[0] if len(leaves) == 1 and not leaves[0][0] else "{" + ", ".join(texts) + "}"


@lru_cache(maxsize=256)
def describe_call(
    kind: str, detail: str, world_size: int, chunk_bytes: int, algorithm: int, leaves: tuple[Signature, ...]
) -> tuple[int, bytes]:
    """The digest and the description of a call, equal on all workers that call the same.

    All leaves enter the digest; the text names only the first few.
    """
    digest = blake2b(repr((kind, detail, world_size, chunk_bytes, algorithm, leaves)).encode(), digest_size=8).digest()
    codecs = "+".join(sorted({codec for _, dtype, _, codec in leaves if "float" in dtype})) if kind == "allreduce" else ""
    text = f"{kind}({', '.join(filter(None, (_describe(leaves) if leaves else '', detail, codecs)))})"
    return int.from_bytes(digest, "little"), text[:450].encode()


def is_plain(array: Array, dtype: str) -> bool:
    """Whether the native code can use the array's memory as it is."""
    return array.dtype == np.dtype(dtype) and array.dtype.isnative and array.flags.c_contiguous and array.flags.aligned


def _is_memory(leaf: Leaf, dtype: str) -> bool:
    """Whether a result can be written straight to the caller's memory."""
    return leaf.dtype == dtype and is_plain(leaf.array, dtype)


def fuse(leaves: list[Leaf], outs: list[Leaf] | None, *, target_times: int = 1) -> list[Segment]:
    """One segment for each pair of wire dtype and codec. `target_times` is the world size for an all-gather."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, leaf in enumerate(leaves):
        dtype = wire_dtype(leaf.array.dtype)
        assert dtype is not None  # flatten has checked
        compressed = dtype.startswith("float") and leaf.array.size > EXACT_ELEMENTS
        groups.setdefault((dtype, leaf.codec if compressed else "fp32"), []).append(index)
    segments = []
    for (dtype, codec), members in sorted(groups.items()):
        count = sum(leaves[i].array.size for i in members)
        source = _source(leaves, members, dtype, count)
        target = None
        if outs is not None and len(members) == 1 and target_times == 1 and _is_memory(outs[members[0]], dtype):
            target = outs[members[0]].array.reshape(-1)
        elif target_times == 1 and (len(members) > 1 or not np.may_share_memory(source, leaves[members[0]].array)):
            target = source  # already a copy: reduce in place
        if target is None:
            target = np.empty(count * target_times, dtype)
        segments.append(Segment(SegmentType(dtype, codec, count), members, source, target))
    _part_overlaps(segments)
    return segments or [Segment(SegmentType("uint8", "fp32", 0), [], np.empty(0, np.uint8), np.empty(0, np.uint8))]


def _part_overlaps(segments: list[Segment]) -> None:
    """Results are written while other elements are still being read: a source may be its own target, or apart from all."""
    for written in segments:
        for read in segments:
            in_place = read is written and read.source.ctypes.data == written.target.ctypes.data
            if not in_place and np.may_share_memory(read.source, written.target):
                read.source = read.source.copy()


def _source(leaves: list[Leaf], members: list[int], dtype: str, count: int) -> Array:
    if len(members) == 1 and is_plain(leaves[members[0]].array, dtype):
        return leaves[members[0]].array.reshape(-1)
    source, at = np.empty(count, dtype), 0
    for i in members:
        array = leaves[i].array
        source[at : at + array.size].reshape(array.shape)[...] = array
        at += array.size
    return source


def results(leaves: list[Leaf], segments: list[Segment], *, world_size: int | None = None) -> list[Array]:
    """The leaves' results as arrays of the leaves' dtypes; stacked along a new first axis when `world_size` is given."""
    found: list[Array | None] = [None] * len(leaves)
    for segment in segments:
        rows = segment.target.reshape(world_size if world_size is not None else 1, segment.type.count)
        at = 0
        for i in segment.leaves:
            array = leaves[i].array
            shape = array.shape if world_size is None else (world_size, *array.shape)
            part = rows[:, at : at + array.size]
            found[i] = np.ascontiguousarray(part).reshape(shape).astype(array.dtype, copy=False)
            at += array.size
    return [array for array in found if array is not None]


def check_outs(leaves: list[Leaf], outs: list[Leaf]) -> None:
    """ConfigError unless `outs` can take the results of `leaves`."""
    if [leaf.path for leaf in leaves] != [leaf.path for leaf in outs]:
        raise ConfigError("out must have the structure of the input")
    for leaf, out in zip(leaves, outs, strict=True):
        name = f"out.{leaf.path}" if leaf.path else "out"
        if leaf.array.shape != out.array.shape or leaf.dtype != out.dtype:
            raise ConfigError(f"{name} is {out.dtype}{list(out.array.shape)}, not {leaf.dtype}{list(leaf.array.shape)}")
        if out.write is None:
            raise ConfigError(f"{name} cannot be written to")


def prepare_reduction(
    x: Any, op: str, codec: str | Mapping[str, str], out: Any, feedback: bool, default_codec: str
) -> tuple[list[Leaf], list[Leaf] | None, list[Segment]]:
    """The leaves of `x` and of `out`, and what is to be reduced of them by `op`. ConfigError for what cannot be."""
    check_operation(op)
    leaves = flatten(x, codec, floats=op == "mean")
    if op in ("mean", "sum") and any(leaf.array.dtype.kind == "b" for leaf in leaves):
        raise ConfigError(f'booleans have no {op}: use op="max" for any, op="min" for all')
    if feedback and op not in ("mean", "sum"):
        raise ConfigError(f"error feedback goes with a mean or a sum, not with {op}")
    outs = None
    if out is not None:
        outs = flatten(out, default_codec)
        check_outs(leaves, outs)
    return leaves, outs, fuse(leaves, outs)


def signature_of(leaves: list[Leaf]) -> tuple[Signature, ...]:
    """What all workers must agree on of a call's values."""
    return tuple((leaf.path, leaf.dtype, leaf.array.shape, leaf.codec) for leaf in leaves)


def deliver(x: Any, leaves: list[Leaf], segments: list[Segment], out: Any, outs: list[Leaf] | None) -> Any:
    """The results in the form of `x`, or written to `out`."""
    arrays = results(leaves, segments)
    if outs is None:
        return rebuild(x, iter(leaf.restore(array) for leaf, array in zip(leaves, arrays, strict=True)))
    for array, target in zip(arrays, outs, strict=True):
        assert target.write is not None  # check_outs has seen to it
        target.write(array)
    return out
