"""PyTorch's tensors as the runs of elements that the native code reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from smlt.collective.codecs import dtype_name as numpy_name
from smlt.collective.plan import SegmentType
from smlt.collective.structure import Array, Segment
from smlt.errors import ConfigError

#: Integers of the same width: elements that are moved and not looked at.
_MOVED_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: What is added up in float32.
HALVES = (torch.float16, torch.bfloat16)


def check_tensor(tensor: torch.Tensor, what: str) -> None:
    """ConfigError unless the tensor is a dense one on the CPU."""
    if tensor.device.type != "cpu":
        raise ConfigError(
            f'{what}: the tensor is on {tensor.device}, and the backend "smlt" moves CPU tensors: call .cpu() first, or use '
            "another backend for this device"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConfigError(f"{what}: sparse and quantized tensors cannot be sent; make them dense first")


def check_alike(tensors: list[torch.Tensor], like: torch.Tensor, what: str) -> None:
    """ConfigError unless all tensors have the dtype and the number of elements of `like`."""
    for index, tensor in enumerate(tensors):
        if tensor.dtype != like.dtype or tensor.numel() != like.numel():
            raise ConfigError(f"{what}: tensor {index} is {describe(tensor)}, where {describe(like)} belongs")


def dtype_name(tensor: torch.Tensor) -> str:
    """float32, bfloat16, ..."""
    return str(tensor.dtype).removeprefix("torch.")


def describe(tensor: torch.Tensor) -> str:
    """float32[64, 10]"""
    return f"{dtype_name(tensor)}{list(tensor.shape)}"


@dataclass
class Run:
    """A tensor's elements in one contiguous run, and what to do for the tensor when the run has been written to.

    `codec`: what holds every element exactly.
    """

    array: Array
    give: Callable[[], object] | None = None
    codec: str = "fp32"


class _Memory:
    """A tensor's memory for NumPy. `Tensor.numpy()` would forbid its storage to be resized, which FSDP does."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.tensor = flat  # held as long as the array that looks at it
        dtype = np.dtype(str(flat.dtype).removeprefix("torch."))
        # NumPy takes no null pointer, which an empty tensor may have.
        data = (flat.data_ptr() or _EMPTY.ctypes.data, False)
        self.__array_interface__ = {"data": data, "shape": tuple(flat.shape), "typestr": dtype.str, "version": 3}


_EMPTY = np.empty(1)


def _array(flat: torch.Tensor) -> Array:
    return np.asarray(_Memory(flat))


def _flat(plain: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(plain) if plain.is_complex() else plain).reshape(-1)


def _run_of(tensor: torch.Tensor, read: bool) -> tuple[torch.Tensor, Callable[[], object] | None]:
    """The elements in order: the tensor's own memory where it lies so, else a copy, which `give` writes back."""
    plain = tensor.detach()
    if plain.is_contiguous() and not plain.is_conj() and not plain.is_neg():
        return _flat(plain), None
    copy = torch.empty(plain.shape, dtype=plain.dtype)
    if read:
        copy.copy_(plain)
    return _flat(copy), lambda: plain.copy_(copy)


def moved(tensor: torch.Tensor, *, read: bool = True) -> Run:
    """The elements as they are, seen as integers. Without `read` they are there to be written only."""
    flat, give = _run_of(tensor, read)
    return Run(_array(flat.view(_MOVED_AS[flat.element_size()])), give)


def added(tensor: torch.Tensor, *, read: bool = True) -> Run:
    """The elements as numbers that can be reduced: half precision in a copy of float32, booleans as uint8."""
    if tensor.dtype not in HALVES:
        flat, give = _run_of(tensor, read)
        return Run(_array(flat.view(torch.uint8) if flat.dtype == torch.bool else flat), give)
    plain = tensor.detach()
    copy = torch.empty(plain.shape, dtype=torch.float32)
    if read:
        copy.copy_(plain)
    codec = "bf16" if plain.dtype == torch.bfloat16 else "fp32"
    return Run(copy.reshape(-1).numpy(), lambda: plain.copy_(copy), codec)


def nothing(dtype: np.dtype) -> Array:
    """Where this worker neither reads nor writes."""
    return np.empty(0, dtype)


def room(count: int, dtype: np.dtype) -> Array:
    """For results that nobody looks at."""
    return np.empty(count, dtype)


def segment(kind: SegmentType, source: Array | None, target: Array | None) -> Segment:
    """A segment of a collective; None where this worker reads or writes nothing."""
    dtype = np.dtype(kind.dtype)
    return Segment(kind, [], nothing(dtype) if source is None else source, nothing(dtype) if target is None else target)


def type_of(run: Run, codec: str | None = None) -> SegmentType:
    """What the workers must agree on for a run."""
    return SegmentType(numpy_name(run.array.dtype), codec or run.codec, run.array.size)


def apart(source: Array, targets: list[Array]) -> Array:
    """`source`, or a copy of it where it shares memory with a target: results come while other elements are still read."""
    return source.copy() if any(np.may_share_memory(source, target) for target in targets) else source
