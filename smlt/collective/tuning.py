"""Which algorithm a reduction takes: from a model of round trips, commands and bytes (an alpha-beta model).

The constants describe the way between a worker and the store. `smlt doctor --tune` measures them and keeps them in a file;
without it, round figures for a unix socket or loopback, or for functions in a data centre, do. All workers must
choose alike: the first one to join writes its constants into the roster, and all take those.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from smlt.errors import ConfigError
from smlt.store.url import addresses, is_local

ALGORITHMS = ("auto", "one-shot", "hierarchical", "centralised")

#: A chunk's content on the wire, at most: an encoded chunk, its source and the accumulator fit in a core's cache together.
CHUNK_BYTES = 256 * 1024
#: What the model chooses is no smaller.
CHUNK_BYTES_TUNED_MIN = 64 * 1024
#: A chunk's time on the link (`chunk_bytes`).
CHUNK_S = 1e-3
#: How much of the link's time may be under way each way (`window_bytes`), and its limits.
WINDOW_S = 8e-3
WINDOW_BYTES_MIN, WINDOW_BYTES_MAX = 512 << 10, 4 << 20
#: Encoded bytes that a worker adds or encodes (`python -m bench.kernels`, a round figure).
COMPUTE_BYTES_PER_S = 4e9
#: Of numbers of shards that take as long, the largest: adding is shared by more workers.
GOOD_ENOUGH = 1.01
#: What is nearly as busy as the busiest delays it: the exponent of the norm of their times (a maximum would be infinite).
NOT_AT_ONCE = 3
#: Bytes that a node's thread moves in and out, when its network is slower.
THREAD_BYTES_PER_S = 3e9
#: Bytes of command, token and reply around a chunk on its way.
OVERHEAD_BYTES = 400


def check_algorithm(algorithm: str) -> str:
    """Return `algorithm` if it is one; ConfigError otherwise."""
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    return algorithm


@dataclass(frozen=True)
class Tuning:
    """What a message costs between a worker and the store.

    Parameters
    ----------
    round_trip_s
        From a command to its reply when nothing else is under way, in seconds.
    command_s
        Time that the store's thread spends on a small command, in seconds.
    link_bytes_per_s
        What one worker's link carries, each way.
    store_bytes_per_s
        What the store takes in and gives out, all workers together.
    """

    round_trip_s: float
    command_s: float
    link_bytes_per_s: float
    store_bytes_per_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"tuning: {field.name} {value!r} is no positive number")

    def to_json(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Tuning:
        """The inverse of `to_json`. ConfigError when it is no such thing."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"tuning: {error}") from error


#: Round figures: a Valkey on this machine that shares its cores with the workers, and functions of 600 Mbit/s beside a
#: store of 10 Gbit/s.
LOCAL = Tuning(round_trip_s=60e-6, command_s=5e-6, link_bytes_per_s=2e9, store_bytes_per_s=3e9)
NETWORK = Tuning(round_trip_s=500e-6, command_s=6e-6, link_bytes_per_s=75e6, store_bytes_per_s=1.25e9)


def cache_path() -> Path:
    """The file with measured constants: $SMLT_TUNING, else below $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("SMLT_TUNING"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smlt" / "tuning.json"


def _place(url: str) -> str:
    """What the constants depend on: the host and port of the store's first node; all sockets of this machine are alike."""
    return "local" if is_local(url) else f"{urlsplit(url).scheme}://{addresses(url)[0]}"


def load(url: str) -> Tuning:
    """The constants for the store at `url`: measured ones when there are any, else round figures.

    ConfigError when the file cannot be read.
    """
    path = cache_path()
    try:
        measured = json.loads(path.read_text())
    except FileNotFoundError:
        measured = {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it, or measure again with smlt doctor --tune") from error
    if isinstance(measured, dict) and (found := measured.get(_place(url))):
        return Tuning.from_json(json.dumps(found))
    return LOCAL if is_local(url) else NETWORK


def save(url: str, tuning: Tuning) -> Path:
    """Keep measured constants for the store at `url`; returns the file."""
    path = cache_path()
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    kept[_place(url)] = asdict(tuning)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(kept, indent=1))
    fresh.replace(path)
    return path


# ---- the model: `n` workers, an encoded value of `size` bytes ----


def one_shot_s(tuning: Tuning, n: int, size: int) -> float:
    """Everybody sends all of it and reads everybody's: one way through one node of the store, n times the bytes down."""
    message = size + OVERHEAD_BYTES
    link = n * message / tuning.link_bytes_per_s
    store = n * (n + 1) * message / tuning.store_bytes_per_s + n * (n + 1) * tuning.command_s
    return 2 * tuning.round_trip_s + max(link, store)


def hierarchical_s(tuning: Tuning, n: int, shards: int, size: int, nodes: int = 1) -> float:
    """`shards` owners aggregate a part each: two ways through the store, whose `nodes` share the chunks.

    Four phases: everyone sends to the owners, they fetch and add, they publish, everyone fetches what they have
    published. A shard of one chunk goes through them one after the other. With more chunks the phases overlap: then
    only the first chunks wait for each phase, and what is busiest over all of them counts.
    """
    rounds = max(1, math.ceil(size / (shards * chunk_bytes(tuning, CHUNK_BYTES_TUNED_MIN, CHUNK_BYTES))))
    shard = size / shards + OVERHEAD_BYTES * rounds
    chunks, everything, k = shards * rounds, shards * shard, min(nodes, shards * rounds)
    rate = tuning.store_bytes_per_s * k
    byte_s = 1 / (max(tuning.store_bytes_per_s, THREAD_BYTES_PER_S) * k)
    command_s = tuning.command_s / k
    # Bytes of the busiest worker's link, bytes and commands of the store; the store's link works both ways at once.
    phases = (
        (everything, n * everything, 3 * n * chunks),
        ((n - 1) * shard, (n - 1) * everything, n * chunks),
        (shard, everything, 3 * chunks),
        ((shards - 1) * shard, (n - 1) * everything, 3 * n * chunks),
    )
    limits = [(link / tuning.link_bytes_per_s, net / rate, net * byte_s + calls * command_s) for link, net, calls in phases]
    up, gather, publish, spread = limits
    serial = sum(max(limit) for limit in limits) + (n + 1) * shard / COMPUTE_BYTES_PER_S
    thread = sum(limit[2] for limit in limits)
    busy = (gather[0] + spread[0], up[0] + publish[0], gather[1] + spread[1], up[1] + publish[1], thread)
    overlapped: float = sum(seconds**NOT_AT_ONCE for seconds in busy) ** (1 / NOT_AT_ONCE)
    return 4 * tuning.round_trip_s + overlapped + max(0.0, serial - overlapped) / rounds


def _numbers_of_shards(n: int, nodes: int) -> list[int]:
    """What may be chosen: as many for one node as for another, where there are enough."""
    return [m for m in range(1, n + 1) if m < nodes or m % nodes == 0]


@lru_cache(maxsize=1024)
def choose(tuning: Tuning, algorithm: str, n: int, size: int, one_shot_limit: int, nodes: int = 1) -> tuple[str, int]:
    """The algorithm for `size` encoded bytes over `n` workers and a store of `nodes`; its number of shards (0: one-shot).

    `algorithm` is one of ALGORITHMS; one-shot is for values of at most `one_shot_limit` bytes, else hierarchical steps in.
    """
    if algorithm == "centralised":
        return "hierarchical", 1
    taking = {m: hierarchical_s(tuning, n, m, size, nodes) for m in _numbers_of_shards(n, nodes)}
    shards = max(m for m, seconds in taking.items() if seconds <= GOOD_ENOUGH * min(taking.values()))
    if size > one_shot_limit or algorithm == "hierarchical":
        return "hierarchical", shards
    if algorithm == "one-shot" or one_shot_s(tuning, n, size) < hierarchical_s(tuning, n, shards, size, nodes):
        return "one-shot", 0
    return "hierarchical", shards


def chunk_bytes(tuning: Tuning, smallest: int, largest: int) -> int:
    """The size of a chunk on the wire: the power of two that takes about a millisecond on the link, within the limits.

    Smaller ones cost the store commands. Larger ones cost time at both ends: nothing comes down before the first
    chunk is complete at its owner, and the last one goes up and down when all else is done.
    """
    fitting = 1 << int(math.log2(max(1, tuning.link_bytes_per_s * CHUNK_S)))
    return max(smallest, min(largest, fitting))


def window_bytes(tuning: Tuning) -> int:
    """How many bytes a worker keeps under way in each direction; csrc/aggregate.c parts them among several store nodes.

    Enough to fill the link while a reply is on its way; no more, because tokens and commands wait behind them in the
    network's queues: with 4 MB under way on a link of 600 Mbit/s, for 50 ms.
    """
    wanted = tuning.link_bytes_per_s * (WINDOW_S + 2 * tuning.round_trip_s)
    return int(max(WINDOW_BYTES_MIN, min(WINDOW_BYTES_MAX, wanted)))
