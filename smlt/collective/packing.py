"""Arrays packed into memory that tensor libraries take over as it is.

XLA and Eigen, beneath JAX and TensorFlow, use foreign memory without a copy when it begins on a multiple of 64 bytes. NumPy
promises 16. Here each array begins on such a multiple, and those of one dtype lie one behind the other, so that they are
one all-reduce without another copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from smlt.collective.codecs import wire_dtype
from smlt.collective.structure import EXACT_ELEMENTS, Array
from smlt.errors import ConfigError

if TYPE_CHECKING:
    from smlt.collective.two_level import AnyCommunicator

ALIGNMENT_BYTES = 64

#: Shape and dtype of an array.
Spec = tuple[tuple[int, ...], Any]


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros that begin on a multiple of 64 bytes."""
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size_bytes + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    array: Array = raw[start : start + size_bytes].view(dtype).reshape(shape)
    return array


def is_aligned(array: Array) -> bool:
    """Whether a tensor library can take the array over without a copy."""
    return array.ctypes.data % ALIGNMENT_BYTES == 0 and bool(array.flags.c_contiguous)


class Packing:
    """One buffer for each dtype, and a view into it for each array of `specs`.

    float16 and bfloat16 are packed as float32. With `exact`, arrays of up to 64 elements get buffers of their own, for they
    are not compressed (see `smlt.collective.codecs`). The rest of a view's 64 bytes is zero and stays so, but for rounding.

    `buffers`: 1-D arrays by name. `views`: shaped like `specs`, in their order. `places`: for each view the name of its
    buffer and where it begins there. Names hold a digest of what is packed, so
    that workers that pack something else raise MismatchError. Raises ConfigError for a dtype that cannot be reduced.
    """

    def __init__(self, specs: Sequence[Spec], *, exact: bool = False) -> None:
        digest = blake2b(repr([(shape, np.dtype(dtype).name) for shape, dtype in specs]).encode(), digest_size=4).hexdigest()
        counts: dict[str, int] = {}
        self.places: list[tuple[str, int]] = []
        for shape, dtype in specs:
            wire = wire_dtype(np.dtype(dtype))
            if wire is None:
                raise ConfigError(f"cannot reduce dtype {np.dtype(dtype).name}: floats, integers and booleans only")
            name = f"{wire}-{digest}"
            if exact and math.prod(shape) <= EXACT_ELEMENTS:
                name = f"exact-{name}"
            unit = ALIGNMENT_BYTES // np.dtype(wire).itemsize
            self.places.append((name, counts.get(name, 0)))
            counts[name] = counts.get(name, 0) + -(-math.prod(shape) // unit) * unit
        self.buffers = {name: aligned((count,), name.split("-")[-2]) for name, count in counts.items()}
        self.views: list[Array] = [
            self.buffers[name][at : at + math.prod(shape)].reshape(shape)
            for (name, at), (shape, _) in zip(self.places, specs, strict=True)
        ]

    def codecs(self, codec: str) -> dict[str, str]:
        """The codec of each buffer when `codec` is asked for."""
        return {name: "fp32" if name.startswith("exact-") else codec for name in self.buffers}


def reduce_arrays(comm: AnyCommunicator, arrays: Sequence[Array], op: str, codec: str | None) -> list[Array]:
    """All-reduce arrays as one collective; returns aligned arrays of the same shapes and dtypes.

    A single array is read where it lies, several are copied once, into a `Packing`. float16 and bfloat16 are copied once
    more, on their way back. Errors as for `Communicator.allreduce`.
    """
    if not arrays:
        return []
    codec = comm.codec if codec is None else codec
    if len(arrays) == 1 and wire_dtype(arrays[0].dtype) == arrays[0].dtype.name:
        out = aligned(arrays[0].shape, arrays[0].dtype)
        if comm.world_size == 1:
            out[...] = arrays[0]
            return [out]
        comm.allreduce(arrays[0], op, codec, out=out)
        return [out]
    if any(array.dtype.kind == "b" for array in arrays) and op not in ("min", "max"):
        raise ConfigError(f'booleans take the operations "min" (all) and "max" (any), not {op!r}')
    packing = Packing([(array.shape, array.dtype) for array in arrays], exact=True)
    for view, array in zip(packing.views, arrays, strict=True):
        view[...] = array
    comm.allreduce(packing.buffers, op, packing.codecs(codec), out=packing.buffers)
    return [view.astype(array.dtype, copy=False) for view, array in zip(packing.views, arrays, strict=True)]
