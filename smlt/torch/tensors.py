"""PyTorch's tensors as the runs of elements that the native code reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smlt.collective.plan import SegmentType
from smlt.collective.structure import Array, Segment
from smlt.errors import ConfigError

#: Integers of the same width: elements that are moved and not looked at.
_MOVED_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
#: What is added up in float32.
HALVES = (torch.float16, torch.bfloat16)
NOTHING: Array = np.empty(0, np.uint8)


def check_tensor(tensor: torch.Tensor, what: str) -> None:
    """ConfigError unless the tensor is a dense one on the CPU."""
    if tensor.device.type != "cpu":
        raise ConfigError(
            f'{what}: the tensor is on {tensor.device}, and the backend "smlt" moves CPU tensors: call .cpu() first, or use '
            "another backend for this device"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConfigError(f"{what}: sparse and quantized tensors cannot be sent; make them dense first")


def dtype_name(tensor: torch.Tensor) -> str:
    """float32, bfloat16, ..."""
    return str(tensor.dtype).removeprefix("torch.")


@dataclass
class Run:
    """A tensor's elements in one contiguous run, and what to do for the tensor when the run has been written."""

    array: Array
    give: Callable[[], None] | None


def _staged(tensor: torch.Tensor, copy: torch.Tensor) -> Run:
    def give() -> None:
        tensor.copy_(copy.view_as(tensor))

    return Run(copy.numpy(), give)


def moved(tensor: torch.Tensor, *, read: bool = True) -> Run:
    """The elements as they are, as integers. Not read, a run is there to be written only."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    plain = plain.resolve_neg()
    width = _MOVED_AS[plain.element_size()]
    if plain.is_contiguous():
        return Run(plain.reshape(-1).view(width).numpy(), None)
    copy = plain.contiguous() if read else torch.empty(plain.shape, dtype=plain.dtype)
    flat = copy.reshape(-1)
    return Run(flat.view(width).numpy(), lambda: _write(plain, copy))


def _write(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    tensor.copy_(copy)


def added(tensor: torch.Tensor, *, read: bool = True) -> Run:
    """The elements as numbers that can be added: half precision in a copy of float32, booleans as uint8."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    plain = plain.resolve_neg()
    if plain.dtype in HALVES:
        copy = plain.float().reshape(-1) if read else torch.empty(plain.numel(), dtype=torch.float32)
        return _staged(plain, copy)
    if plain.dtype == torch.bool:
        plain = plain.view(torch.uint8) if plain.dim() else plain.reshape(1).view(torch.uint8)
    if plain.is_contiguous():
        return Run(plain.reshape(-1).numpy(), None)
    copy = plain.contiguous().reshape(-1) if read else torch.empty(plain.numel(), dtype=plain.dtype)
    return _staged(plain, copy)


def segment(source: Array | None, target: Array | None, codec: str = "fp32") -> Segment:
    """A segment of a collective; None where this worker reads or writes nothing."""
    known = source if source is not None else target
    assert known is not None
    kind = SegmentType(known.dtype.name, codec, known.size)
    return Segment(kind, [], known if source is None else source, NOTHING.view(known.dtype) if target is None else target)


def options_flag(options: Any, name: str, default: bool) -> bool:
    """A flag of c10d's options, which older releases do not have."""
    return bool(getattr(options, name, default))
