"""Buckets: the gradients cut in runs, each all-reduced while backward still computes the next.

Every worker hands its buckets over in the same order, whatever the order in which its own gradients become ready: a bucket
goes when it is complete and all before it have gone. So collectives are numbered alike on all workers. The last bucket is
complete when backward ends; it travels with the step's loss and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from smlt.errors import TaskError

#: Of gradients in memory. 4 MiB of float32 are 2 MiB in fp16: whole chunks of 256 KiB for the shards of 8 workers. Smaller
#: buckets begin earlier but cost more messages; larger ones leave more to do when backward has ended.
BUCKET_MB = 4.0
BUCKET_MB_MAX = 1 << 20
#: The first bucket is smaller, so that the links do not idle while backward begins; the size is DDP's (Li et al., VLDB 2020).
FIRST_BUCKET_MB = 1.0

#: Takes a bucket, as a value for an all-reduce in place.
Send = Callable[[Any], None]


@dataclass(frozen=True)
class Bucket:
    """Elements [start, end) of the flat buffer of a dtype, the gradients of `parameters` (by their place in the plan)."""

    dtype: str
    start: int
    end: int
    parameters: tuple[int, ...]


def plan_buckets(parameters: Sequence[tuple[str, int, int]], bucket_bytes: int, first_bytes: int) -> list[Bucket]:
    """Cut `parameters` (dtype, elements, bytes an element), in the order in which their gradients are expected.

    A bucket is closed when it has reached its size, so a parameter is never cut, and one larger than a bucket fills it. The
    order of the buckets is that in which their last gradients are expected.
    """
    buckets: list[Bucket] = []
    open_: dict[str, tuple[int, list[int]]] = {}  # dtype: the open bucket's start and parameters
    ends: dict[str, int] = {}

    def close(dtype: str) -> None:
        start, members = open_.pop(dtype)
        buckets.append(Bucket(dtype, start, ends[dtype], tuple(members)))

    for index, (dtype, count, element_bytes) in enumerate(parameters):
        start, members = open_.setdefault(dtype, (ends.get(dtype, 0), []))
        members.append(index)
        ends[dtype] = ends.get(dtype, 0) + count
        if (ends[dtype] - start) * element_bytes >= (bucket_bytes if buckets else min(first_bytes, bucket_bytes)):
            close(dtype)
    for dtype in sorted(open_, key=lambda dtype: open_[dtype][1][-1]):
        close(dtype)
    return buckets


class Countdown:
    """Hands buckets over, in order, as soon as the gradients in them are complete.

    The first backward only watches: it shows which parameters receive their gradient in several pieces (reentrant
    checkpointing does that), whose buckets have to wait for the end of backward. Not for use by several threads; autograd
    calls its hooks one after the other.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self._bucket_of = {index: number for number, bucket in enumerate(buckets) for index in bucket.parameters}
        self._held = set(range(len(buckets)))  # these wait for the end
        self._pieces: set[int] = set()  # buckets with gradients that come in pieces
        self._send: Callable[[int], None] | None = None
        self._seen: set[int] = set()
        self._missing: list[set[int]] = []
        self._next = 0

    @property
    def lacking(self) -> list[int]:
        """The parameters that the last backward gave no gradient."""
        return [index for index in self._bucket_of if index not in self._seen]

    def begin(self, send: Callable[[int], None], absent: Collection[int] = ()) -> None:
        """Before backward: `send` will be called with the numbers of buckets. `absent` will receive no gradient."""
        self._send, self._next = send, 0
        self._seen = set()
        self._missing = [set(bucket.parameters).difference(absent) for bucket in self._buckets]

    def ready(self, index: int) -> None:
        """A parameter has received its gradient.

        Raises TaskError when its bucket is gone: the gradient came in more pieces than before, or was not to come.
        """
        number = self._bucket_of.get(index)
        if self._send is None or number is None:
            return
        if number < self._next:
            raise TaskError(
                "a parameter's gradient changed after it was sent: the model computes other parts at each step in a way that "
                "hides them from autograd, such as checkpoint(use_reentrant=True). Train with --bucket-mb 0"
            )
        if index in self._seen:
            self._pieces.add(number)
            self._held.add(number)
            return
        self._seen.add(index)
        self._missing[number].discard(index)
        while self._next < len(self._buckets) and not self._missing[self._next] and self._next not in self._held:
            self._go()

    def finish(self) -> None:
        """After backward: hand over the rest."""
        while self._next < len(self._buckets):
            self._go()
        self._held = set(self._pieces)
        self._send = None

    def cancel(self) -> None:
        """Backward has failed: hand over nothing more."""
        self._send = None

    def _go(self) -> None:
        assert self._send is not None
        self._next += 1
        self._send(self._next - 1)
