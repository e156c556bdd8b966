"""How gradients are averaged: SMLT's own ways and those of others, a file each.

A strategy is made for a cluster and a gradient; `begin(rank)` says that a worker calls the all-reduce, and `done(rank)` is
called when that worker has the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from smlt.collective.codecs import wire_size

Done = Callable[[int], None]


@dataclass(frozen=True)
class Gradient:
    """What is averaged: so many float32, and what they travel as."""

    floats: int
    codec: str = "fp16"

    @property
    def wire_bytes(self) -> int:
        """Encoded, of one worker."""
        return wire_size("float32", self.codec, self.floats)


class Strategy(Protocol):
    """One all-reduce."""

    def begin(self, rank: int) -> None:
        """Worker `rank` calls it now."""
