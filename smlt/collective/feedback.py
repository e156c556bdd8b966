"""Error feedback: what a lossy codec cut off in one step is added to the next, so that over the steps nothing is lost.

Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from smlt.collective.codecs import wire_codec
from smlt.collective.plan import SegmentType
from smlt.errors import ConfigError

Array = npt.NDArray[Any]
#: What earlier encodings lost (None: nothing yet), and where to put what this one loses.
Residual = tuple[Array | None, Array | None]


class ErrorFeedback:
    """What the encodings of one gradient have lost so far, on one worker.

    Make one for each buffer that is all-reduced again and again, and give it to each call:

    >>> feedback = smlt.ErrorFeedback()  # doctest: +SKIP
    >>> comm.allreduce(gradient, codec="int8", out=gradient, feedback=feedback)  # doctest: +SKIP

    It takes two buffers of the gradient's size: a step that fails leaves the one before as it was. `state_dict` belongs
    in the worker's checkpoint; each worker has its own.
    """

    def __init__(self) -> None:
        self._types: list[SegmentType] | None = None
        self._residuals: list[Array | None] = []
        self._next: list[Array | None] = []
        self._busy = threading.Lock()
        self._undoable: list[bool] | None = None  # for each residual: there was one before

    def undo(self) -> None:
        """Take back the last completed step: the residuals are what they were before it, for a step that is redone.

        One level: ConfigError when no step has been completed since the last `undo` or `load_state_dict`, or when another
        collective has been begun with it since, and while one is under way.
        """
        if not self._busy.acquire(blocking=False):
            raise ConfigError("this error feedback is in use by a collective under way: nothing can be taken back")
        try:
            if self._undoable is None:
                raise ConfigError(
                    "this error feedback has no completed step to take back: one level is kept, until the next call"
                )
            for index, had_one in enumerate(self._undoable):
                current, before = self._residuals[index], self._next[index]
                self._residuals[index], self._next[index] = before if had_one else None, current
            self._undoable = None
        finally:
            self._busy.release()

    def state_dict(self) -> dict[str, Array]:
        """The residuals by name; empty before the first step."""
        return {str(index): array.copy() for index, array in enumerate(self._residuals) if array is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. They must fit the next gradient: ConfigError there, if not."""
        arrays = {int(name): np.array(array) for name, array in state.items()}
        self._types = self._undoable = None
        self._residuals = [arrays.get(index) for index in range(max(arrays, default=-1) + 1)]
        self._next = []

    def begin(self, types: list[SegmentType]) -> list[Residual]:
        """For the communicator: the buffers for a collective of these segments. ConfigError when they do not fit."""
        if not self._busy.acquire(blocking=False):
            raise ConfigError("this error feedback is in use by a collective under way: make one for each buffer")
        try:
            return self._buffers(types)
        except BaseException:
            self._busy.release()
            raise

    def _buffers(self, types: list[SegmentType]) -> list[Residual]:
        if self._types is not None and self._types != types:
            raise ConfigError("error feedback belongs to one buffer: its dtypes, sizes and codecs may not change")
        if not self._next:
            lossy = [wire_codec(t.dtype, t.codec) != wire_codec(t.dtype, "fp32") for t in types]
            self._residuals += [None] * (len(types) - len(self._residuals))
            self._next = [np.empty(t.count, t.dtype) if keep else None for t, keep in zip(types, lossy, strict=True)]
            for kept, fresh in zip(self._residuals, self._next, strict=False):
                if kept is not None and (fresh is None or kept.shape != fresh.shape or kept.dtype != fresh.dtype):
                    self._next = []
                    raise ConfigError("the error feedback's state does not fit this gradient")
            self._types = types
        self._undoable = None  # where the residual before lies, this collective will write
        return list(zip(self._residuals, self._next, strict=True))

    def end(self, *, complete: bool) -> None:
        """For the communicator: the collective has ended; when it is `complete`, what it lost counts."""
        if complete:
            self._undoable = [before is not None for before in self._residuals]
            for index, fresh in enumerate(self._next):
                if fresh is not None:
                    before = self._residuals[index]
                    self._residuals[index], self._next[index] = fresh, np.empty_like(fresh) if before is None else before
        self._busy.release()
