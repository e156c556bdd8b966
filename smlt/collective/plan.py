"""How a collective is cut: segments into shards, one shard an owner, shards into chunks.

A segment is a run of elements of one dtype and codec. All segments of a collective, laid end to end in wire bytes, are
cut in m nearly equal shards; shard i is owned (aggregated and published) by rank i. m is the world size, less when the
shards would be so small that a message costs more than its content. Plans depend on nothing but their arguments, so
every worker cuts alike; they are cached, for a training run repeats one plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from smlt.collective import _native
from smlt.collective.codecs import wire_bytes

#: A chunk's content on the wire. Smaller chunks cost commands, larger ones cost overlap and cache (docs/architecture.md).
CHUNK_BYTES = 256 * 1024
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 64, 8 << 20
CHUNK_ELEMENTS = 131_072
#: Below this a shard is not worth an owner of its own.
SHARD_BYTES_MIN = 16 * 1024


@dataclass(frozen=True)
class SegmentType:
    """What the workers must agree on for a segment: wire dtype, codec, number of elements."""

    dtype: str
    codec: str
    count: int


Row = tuple[int, int, int, int, int]  # segment, owner, source, target, count


def _chunks(segment: int, owner: int, start: int, end: int, element_bytes: int, chunk_bytes: int) -> list[Row]:
    """Elements [start, end) of a segment in equal chunks within the limits."""
    count = end - start
    limit = min(chunk_bytes // element_bytes, CHUNK_ELEMENTS)
    pieces = -(-count // limit)
    cuts = [start + count * i // pieces for i in range(pieces + 1)]
    return [(segment, owner, a, a, b - a) for a, b in pairwise(cuts)]


@lru_cache(maxsize=256)
def reduce_table(segments: tuple[SegmentType, ...], world_size: int, chunk_bytes: int) -> _native.ChunkTable:
    """The chunks of an all-reduce of `segments` over `world_size` workers."""
    sizes = [wire_bytes(s.dtype, s.codec) for s in segments]
    total = sum(size * s.count for size, s in zip(sizes, segments, strict=True))
    shards = max(1, min(world_size, -(-total // min(SHARD_BYTES_MIN, chunk_bytes))))
    rows: list[Row] = []
    for shard in range(shards):
        low, high, offset = total * shard // shards, total * (shard + 1) // shards, 0
        for index, (size, segment) in enumerate(zip(sizes, segments, strict=True)):
            # The elements whose first byte lies in the shard: each element is in just one.
            start = min(max(-(-(low - offset) // size), 0), segment.count)
            end = min(max(-(-(high - offset) // size), 0), segment.count)
            if start < end:
                rows += _chunks(index, shard, start, end, size, chunk_bytes)
            offset += size * segment.count
    if not rows or rows[0][1] != 0:  # nothing to send (a barrier): rank 0 still hears from everyone
        rows.insert(0, (0, 0, 0, 0, 0))
    return _native.ChunkTable(rows)


@lru_cache(maxsize=256)
def broadcast_table(segments: tuple[SegmentType, ...], root: int, chunk_bytes: int) -> _native.ChunkTable:
    """The chunks of a broadcast: all owned by `root`."""
    rows: list[Row] = []
    for index, segment in enumerate(segments):
        if segment.count:
            size = wire_bytes(segment.dtype, segment.codec)
            rows += _chunks(index, root, 0, segment.count, size, chunk_bytes)
    return _native.ChunkTable(rows or [(0, root, 0, 0, 0)])


@lru_cache(maxsize=256)
def allgather_table(segments: tuple[SegmentType, ...], world_size: int, chunk_bytes: int) -> _native.ChunkTable:
    """The chunks of an all-gather: each rank's part, owned by it, at its place in the result."""
    rows: list[Row] = []
    for rank in range(world_size):
        before = len(rows)
        for index, segment in enumerate(segments):
            if segment.count:
                size = wire_bytes(segment.dtype, segment.codec)
                for _, _, source, _, count in _chunks(index, rank, 0, segment.count, size, chunk_bytes):
                    rows.append((index, rank, source, rank * segment.count + source, count))
        if len(rows) == before:
            rows.append((0, rank, 0, 0, 0))
    return _native.ChunkTable(rows)
