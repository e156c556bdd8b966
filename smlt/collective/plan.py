"""How a collective is cut: segments into shards, one shard an owner, shards into chunks.

A segment is a run of elements of one dtype and codec. All segments of a reduction, laid end to end in wire bytes, are
cut in m nearly equal shards; shard i is owned (aggregated and published) by rank i. `smlt.collective.tuning` chooses m,
or the one-shot algorithm, which has no owners. Plans depend on nothing but their arguments, so every worker cuts
alike; they are cached, for a training run repeats one plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from smlt.collective import _native
from smlt.collective.codecs import block_elements, wire_bytes, wire_size
from smlt.collective.tuning import CHUNK_BYTES as CHUNK_BYTES  # who cuts asks here
from smlt.collective.tuning import CHUNK_BYTES_TUNED_MIN as CHUNK_BYTES_TUNED_MIN
from smlt.collective.tuning import Tuning, choose

CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 64, 8 << 20
CHUNK_ELEMENTS = 131_072
#: Beside each chunk of a one-shot contribution (csrc/one_shot.c).
PART_HEADER_BYTES = 4


@dataclass(frozen=True)
class SegmentType:
    """What the workers must agree on for a segment: wire dtype, codec, number of elements."""

    dtype: str
    codec: str
    count: int


@dataclass(frozen=True)
class ChunkLimit:
    """How large a chunk may be, in bytes on the wire: `usual`, but in a reduction of more bytes than `bound_from`, `bounded`.

    There a worker that asks for all contributions to a chunk at once must keep to its credit (`smlt.collective.window`).
    """

    usual: int
    bounded: int
    bound_from: float = math.inf

    def of(self, segments: Sequence[SegmentType]) -> int:
        """For a reduction of `segments`."""
        size = sum(wire_size(kind.dtype, kind.codec, kind.count) for kind in segments)
        return self.bounded if size > self.bound_from else self.usual


def _limit(chunks: int | ChunkLimit, segments: Sequence[SegmentType]) -> int:
    return chunks if isinstance(chunks, int) else chunks.of(segments)


Row = tuple[int, ...]  # segment, owner, source, target, count[, the one reader]


def _chunks(segment: int, kind: SegmentType, owner: int, start: int, end: int, chunk_bytes: int) -> list[Row]:
    """Elements [start, end) of a segment in equal chunks within the limits."""
    count = end - start
    block = block_elements(kind.dtype, kind.codec)
    limit = min(chunk_bytes // wire_bytes(kind.dtype, kind.codec), CHUNK_ELEMENTS)
    while wire_size(kind.dtype, kind.codec, limit) > chunk_bytes:
        limit -= 1 if limit <= block else block
    pieces = -(-count // limit)
    even = -(-count // pieces)
    if pieces > 1 and -(-even // block) * block <= limit:
        even = -(-even // block) * block  # whole blocks
    cuts = [*range(start, end, even), end]
    return [(segment, owner, a, a, b - a) for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class Plan:
    """A collective's algorithm (`_native.COPY`, HIERARCHICAL or ONE_SHOT) and its chunks."""

    algorithm: int
    table: _native.ChunkTable


@lru_cache(maxsize=256)
def reduce_plan(
    segments: tuple[SegmentType, ...],
    world_size: int,
    chunks: int | ChunkLimit,
    tuning: Tuning,
    algorithm: str = "auto",
    nodes: int = 1,
) -> Plan:
    """How to reduce `segments` over `world_size` workers through `nodes` store nodes."""
    chunk_bytes = _limit(chunks, segments)
    size = sum(wire_size(s.dtype, s.codec, s.count) for s in segments)
    headers = PART_HEADER_BYTES * len(segments)
    fits = all(wire_size(s.dtype, s.codec, s.count) <= chunk_bytes and s.count <= CHUNK_ELEMENTS for s in segments)
    limit = _native.ONE_SHOT_BYTES_MAX - headers if fits else -1
    name, shards = choose(tuning, algorithm, world_size, size, limit, nodes)
    if name == "one-shot":
        rows = [(index, 0, 0, 0, segment.count) for index, segment in enumerate(segments)]
        return Plan(_native.ONE_SHOT, _native.ChunkTable(rows))
    return Plan(_native.HIERARCHICAL, _native.ChunkTable(_shard_rows(segments, shards, chunk_bytes)))


def _shard_rows(segments: tuple[SegmentType, ...], shards: int, chunk_bytes: int) -> list[Row]:
    sizes = [wire_bytes(s.dtype, s.codec) for s in segments]
    total = sum(size * s.count for size, s in zip(sizes, segments, strict=True))
    rows: list[Row] = []
    for shard in range(shards):
        low, high, offset = total * shard // shards, total * (shard + 1) // shards, 0
        for index, (size, segment) in enumerate(zip(sizes, segments, strict=True)):
            # The elements whose first byte lies in the shard: each element is in just one.
            start = min(max(-(-(low - offset) // size), 0), segment.count)
            end = min(max(-(-(high - offset) // size), 0), segment.count)
            if start < end:
                rows += _chunks(index, segment, shard, start, end, chunk_bytes)
            offset += size * segment.count
    if not rows or rows[0][1] != 0:  # nothing to send (a barrier): rank 0 still hears from everyone
        rows.insert(0, (0, 0, 0, 0, 0))
    return rows


@lru_cache(maxsize=256)
def broadcast_plan(segments: tuple[SegmentType, ...], root: int, chunk_bytes: int) -> Plan:
    """How to broadcast `segments`: all chunks owned by `root`."""
    rows: list[Row] = []
    for index, segment in enumerate(segments):
        if segment.count:
            rows += _chunks(index, segment, root, 0, segment.count, chunk_bytes)
    return Plan(_native.COPY, _native.ChunkTable(rows or [(0, root, 0, 0, 0)]))


@lru_cache(maxsize=256)
def allgather_plan(segments: tuple[SegmentType, ...], world_size: int, chunk_bytes: int) -> Plan:
    """How to gather `segments`: each rank's part, owned by it, at its place in the result."""
    rows: list[Row] = []
    for rank in range(world_size):
        before = len(rows)
        for index, segment in enumerate(segments):
            if segment.count:
                for _, _, source, _, count in _chunks(index, segment, rank, 0, segment.count, chunk_bytes):
                    rows.append((index, rank, source, rank * segment.count + source, count))
        if len(rows) == before:
            rows.append((0, rank, 0, 0, 0))
    return Plan(_native.COPY, _native.ChunkTable(rows))


@dataclass(frozen=True)
class Part:
    """A run of elements that goes from `owner` to `reader`, or to everyone (-1); segments are of the plan that it is in."""

    segment: int
    type: SegmentType
    owner: int
    reader: int = -1


def _part_rows(parts: Sequence[Part], chunk_bytes: int) -> list[Row]:
    rows: list[Row] = []
    for part in sorted(parts, key=lambda part: part.owner):
        if part.type.count:
            chunks = _chunks(part.segment, part.type, part.owner, 0, part.type.count, chunk_bytes)
            rows += [(*chunk, part.reader) for chunk in chunks]
    return rows


@lru_cache(maxsize=256)
def exchange_plan(parts: tuple[Part, ...], chunk_bytes: int) -> Plan:
    """How to copy `parts`, each a whole segment on its owner and on who reads it. What stays with its owner is no part."""
    return Plan(_native.COPY, _native.ChunkTable(_part_rows(parts, chunk_bytes) or [(0, 0, 0, 0, 0)]))


@lru_cache(maxsize=256)
def reduce_scatter_plan(segments: tuple[SegmentType, ...], chunks: int | ChunkLimit) -> Plan:
    """How to reduce `segments`, one for each rank, who alone receives the result."""
    parts = [Part(rank, kind, rank, rank) for rank, kind in enumerate(segments)]
    rows = _part_rows(parts, _limit(chunks, segments))
    if not rows or rows[0][1] != 0:  # rank 0 hears from everyone
        rows.insert(0, (0, 0, 0, 0, 0))
    return Plan(_native.HIERARCHICAL, _native.ChunkTable(rows))


@lru_cache(maxsize=256)
def reduce_to_plan(
    segment: SegmentType,
    root: int,
    rank: int,
    world_size: int,
    chunks: int | ChunkLimit,
    tuning: Tuning,
    algorithm: str = "auto",
    nodes: int = 1,
) -> tuple[Plan, int]:
    """How to reduce `segment` for `root` alone; how many elements of its own shard `rank` needs room for.

    As in `reduce_plan` several workers aggregate a shard each, so that not all contributions go down one link.
    """
    whole = reduce_plan((segment,), world_size, chunks, tuning, algorithm, nodes)
    if whole.algorithm == _native.ONE_SHOT:
        return whole, segment.count
    _, shards = choose(tuning, algorithm, world_size, wire_size(segment.dtype, segment.codec, segment.count), -1, nodes)
    rows, room = [], 0
    for index, owner, source, target, count in _shard_rows((segment,), shards, _limit(chunks, (segment,))):
        if owner == rank != root:
            target, room = room, room + count
        rows.append((index, owner, source, target, count, root))
    return Plan(_native.HIERARCHICAL, _native.ChunkTable(rows)), room
