"""How much of a store node's memory the workers of a job may take together, and the chunks that go with it (csrc/credit.c)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smlt.collective.plan import ChunkLimit
from smlt.collective.tuning import Tuning
from smlt.errors import ConfigError
from smlt.store.server import ServerInfo, smallest_memory_bytes

#: A worker's part of the window is for its contributions, its aggregates, and what it has asked for: so many equal parts.
PARTS = 3
#: Without being asked, this part of a node's free memory is the window; the rest is for the server's buffers and other jobs.
AUTOMATIC_PART = 0.6
#: Chunks that a window may ask for; smaller ones are more commands than data. Not less than the second unless it was asked for.
CHUNK_BYTES_LEAST, CHUNK_BYTES_LEAST_AUTOMATIC = 4 << 10, 16 << 10
#: A chunk's key, header and the server's own bytes beside it; and what its allocator may round up by.
CHUNK_OVERHEAD_BYTES, ROUNDING = 512, 1.25


def credit_bytes(window_bytes: int, world_size: int) -> int:
    """What may lie at each node of one worker's contributions, and as much again of its aggregates."""
    return window_bytes // world_size // PARTS


def fitting_chunk_bytes(window_bytes: int, world_size: int) -> int:
    """The largest chunk, in bytes on the wire, of which an owner may ask for all contributions at once within its credit."""
    return int(credit_bytes(window_bytes, world_size) / (world_size - 1) / ROUNDING) - CHUNK_OVERHEAD_BYTES


def limit_chunks(usual: int, window_bytes: int, world_size: int, nodes: int) -> ChunkLimit:
    """`usual`, no larger than what the window leaves room for."""
    credit = credit_bytes(window_bytes, world_size)
    usual = min(usual, int(credit / ROUNDING) - CHUNK_OVERHEAD_BYTES)
    return ChunkLimit(usual, min(usual, fitting_chunk_bytes(window_bytes, world_size)), credit * nodes / ROUNDING)


def least_window_bytes(world_size: int) -> int:
    """The smallest window with which so many workers can do a collective of any size."""
    one = int((CHUNK_BYTES_LEAST + CHUNK_OVERHEAD_BYTES) * ROUNDING) + 2
    return PARTS * world_size * (world_size - 1) * one


@dataclass(frozen=True)
class Terms:
    """What the worker who joins first decides for all: the tuning, and the window at each node in bytes (0: none)."""

    tuning: Tuning
    store_window_bytes: int

    def to_json(self) -> str:
        """As a line of JSON."""
        return json.dumps({"tuning": json.loads(self.tuning.to_json()), "store_window_bytes": self.store_window_bytes})

    @classmethod
    def from_json(cls, text: str) -> Terms:
        """The inverse of `to_json`. ConfigError when it is no such thing."""
        try:
            row: dict[str, Any] = json.loads(text)
            return cls(Tuning.from_json(json.dumps(row["tuning"])), int(row["store_window_bytes"]))
        except (ValueError, TypeError, LookupError) as error:
            raise ConfigError(f"what the workers agreed on cannot be read: {error!r}") from error


def check_least_window(asked_mb: float, world_size: int) -> None:
    """ConfigError with the number needed when a window of so many MB (10^6 bytes) is too small; 0 stands for none."""
    least = least_window_bytes(world_size)
    if asked_mb != 0 and not least <= asked_mb * 1e6 < math.inf:
        raise ConfigError(
            f"a store window of {asked_mb:g} MB: {world_size} workers need one of at least {least} bytes ({_megabytes(least)}) "
            "at each store node; 0 stands for none"
        )


def check_window(asked: int, world_size: int, servers: Sequence[ServerInfo]) -> int:
    """`asked`, a window in bytes. ConfigError with the number needed when it is too small, or larger than a node's memory."""
    check_least_window(asked / 1e6, world_size)
    memory = smallest_memory_bytes(servers)
    if memory and asked > memory:
        node = min((s for s in servers if s.maxmemory_bytes), key=lambda s: s.maxmemory_bytes)
        raise ConfigError(
            f"store_window_bytes {asked} is more than the memory of the store's node {node.address}: its maxmemory is {memory} "
            f"bytes ({_megabytes(memory)})"
        )
    return asked


def automatic_window_bytes(world_size: int, servers: Sequence[ServerInfo]) -> int:
    """A window that follows from the nodes' free memory; 0 where that has no limit, or no room for chunks of a fair size."""
    free = min((s.maxmemory_bytes - s.used_memory_bytes for s in servers if s.maxmemory_bytes), default=0)
    window = int(max(free, 0) * AUTOMATIC_PART)
    return window if fitting_chunk_bytes(window, world_size) >= CHUNK_BYTES_LEAST_AUTOMATIC else 0


def check_unbounded(encoded_bytes: int, world_size: int, servers: Sequence[ServerInfo]) -> None:
    """ConfigError when a collective of so many bytes a worker cannot lie in the nodes' memory, and no window bounds it."""
    memory = smallest_memory_bytes(servers)
    needed = encoded_bytes * world_size // max(1, len(servers))
    if memory and needed > memory:
        raise ConfigError(
            f"this collective may need {needed} bytes ({_megabytes(needed)}) at each store node: {encoded_bytes} encoded "
            f"bytes of {world_size} workers on {len(servers)} node(s); a node has a maxmemory of {memory} "
            f"({_megabytes(memory)}). Give it more memory, use more nodes, or set store_window_bytes (at least "
            f"{least_window_bytes(world_size)}), with which any size passes, more slowly"
        )


def _megabytes(count: int) -> str:
    return f"{math.ceil(count / 1e4) / 100:g} MB"  # never less than it is
