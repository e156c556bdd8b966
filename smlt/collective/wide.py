"""Means of integers over several levels: sums in integers that cannot overflow, divided once, at the end."""

from __future__ import annotations

import numpy as np

from smlt.collective import _shared
from smlt.collective.codecs import WIRE_DTYPES
from smlt.collective.plan import SegmentType
from smlt.collective.structure import Array, Segment

_LOW_BITS = 32
_LOW_MASK = (1 << _LOW_BITS) - 1


class WideMean:
    """The elements of an integer segment as int64 to be summed up: `segment`, reduced in place with "sum".

    Integers of up to 32 bits are summed as they are. Those of 64 bits go as two halves, each in an int64: sums of 65,535
    workers' halves stay below 2**63.
    """

    def __init__(self, narrow: Segment) -> None:
        source, self._halved = narrow.source, narrow.source.dtype.itemsize == 8
        sums = np.empty((2, source.size) if self._halved else source.shape, np.int64)
        if self._halved:
            sums[0] = source & source.dtype.type(_LOW_MASK)
            sums[1] = source >> source.dtype.type(_LOW_BITS)
        else:
            sums[...] = source
        flat = sums.reshape(-1)
        self.segment = Segment(SegmentType("int64", "fp32", flat.size), [], flat, flat)

    def finish(self, target: Array, divisor: int) -> None:
        """The sums over `divisor`, rounded to nearest, ties to even, into `target` of the narrow segment."""
        sums = self.segment.target
        if self._halved:
            low, high = sums.reshape(2, -1)
            high = high + (low >> _LOW_BITS)
            words = np.empty((low.size, 2), np.int64)  # of 128 bits, as __int128 lies in memory
            words[:, 0] = (high << _LOW_BITS) | (low & _LOW_MASK)
            words[:, 1] = high >> _LOW_BITS
            sums = words.reshape(-1)
        _shared.finish_mean(sums, target, WIRE_DTYPES[target.dtype.name], divisor)
