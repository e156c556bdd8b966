"""What can be chosen: a number of workers and the memory of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from smlt.errors import ConfigError


@dataclass(frozen=True, order=True)
class Choice:
    """So many workers with so many MB each."""

    workers: int
    memory_mb: int

    def __str__(self) -> str:
        return f"{self.workers} x {self.memory_mb} MB"


@dataclass(frozen=True)
class Space:
    """The integer grid of choices. `workers` and `memory_mb`: ascending, the values that each may have."""

    workers: tuple[int, ...]
    memory_mb: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values in (("workers", self.workers), ("memory_mb", self.memory_mb)):
            if not values or values[0] < 1 or any(b <= a for a, b in pairwise(values)):
                raise ConfigError(f"a search space needs ascending positive {name}, not {values}")

    def __iter__(self) -> Iterator[Choice]:
        return (Choice(workers, memory) for workers in self.workers for memory in self.memory_mb)

    def __len__(self) -> int:
        return len(self.workers) * len(self.memory_mb)
