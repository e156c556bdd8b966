"""The slot map of a Valkey or Redis Cluster: which primary serves which of its 16384 slots.

https://valkey.io/topics/cluster-spec and https://valkey.io/commands/cluster-slots describe what is read here.
"""

from __future__ import annotations

import binascii
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SLOTS = 16384
Address = tuple[str, int]
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def slot_of(tag: str) -> int:
    """The slot of the keys with this hash tag, which is given without its braces: CRC-16/XMODEM modulo 16384."""
    return binascii.crc_hqx(tag.encode(), 0) % SLOTS


@dataclass(frozen=True)
class Range:
    """Slots `first` to `last`, and who has them."""

    first: int
    last: int
    primary: Address
    replicas: tuple[Address, ...] = ()


class SlotMap:
    """Who serves which slot, as one node of the cluster told it."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self.ranges = sorted(ranges, key=lambda part: part.first)

    @classmethod
    def parse(cls, reply: Any, asked: Address) -> SlotMap:
        """The map in a reply to CLUSTER SLOTS, raw, of the node at `asked`. ValueError when it is no such reply."""
        try:
            ranges = []
            for first, last, primary, *replicas in reply:
                if not 0 <= int(first) <= int(last) < SLOTS:
                    raise ValueError(f"slots {first} to {last}")
                others = [_address(replica, asked) for replica in replicas]
                at = _address(primary, asked)
                if at is not None:
                    ranges.append(Range(int(first), int(last), at, tuple(other for other in others if other is not None)))
            return cls(ranges)
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"no reply to CLUSTER SLOTS: {error!r}") from error

    def primary_of(self, slot: int) -> Address | None:
        """Who serves `slot`, None when nobody does."""
        return next((part.primary for part in self.ranges if part.first <= slot <= part.last), None)

    def primaries(self) -> list[Address]:
        """The primaries that have slots, in the order of the first slot of each."""
        return list(dict.fromkeys(part.primary for part in self.ranges))

    def addresses(self) -> list[Address]:
        """Every node in the map, replicas too."""
        return list(dict.fromkeys(at for part in self.ranges for at in (part.primary, *part.replicas)))

    def slots_of(self, primary: Address) -> list[int]:
        """The slots of a primary, in order."""
        return [slot for part in self.ranges if part.primary == primary for slot in range(part.first, part.last + 1)]

    def covered(self) -> int:
        """How many slots are served."""
        return sum(part.last - part.first + 1 for part in self.ranges)


def _address(node: Any, asked: Address) -> Address | None:
    """Host and port of a node; None when the cluster does not know the host (https://valkey.io/commands/cluster-slots)."""
    host = node[0].decode() if isinstance(node[0], bytes) else node[0]
    if host == "?":
        return None
    return (host or asked[0], int(node[1]) or asked[1])


def choose_places(job: str, slots: SlotMap, groups: int | None) -> list[str]:
    """A place (hash tag without braces) for each of `groups` groups, by default one for each primary.

    They go round the primaries, beginning with the one that serves "{J.0}", whose name is fixed. Several on one primary are
    spread over its slots: a cluster that grows takes them apart, and so does one that shows itself as a single node.
    """
    primaries = slots.primaries()
    count = groups or max(1, len(primaries))
    control = f"{job}.0"
    at = slots.primary_of(slot_of(control))
    first = primaries.index(at) if at in primaries else 0
    places = [control]
    for j in range(1, count):
        turn, ahead = divmod(j, len(primaries))
        own = slots.slots_of(primaries[(first + ahead) % len(primaries)])
        sharing = len(range(ahead, count, len(primaries)))  # groups on that primary
        wanted = set(own[len(own) * turn // sharing : len(own) * (turn + 1) // sharing] or own)
        salts = (_base36(number) for number in itertools.count())
        places.append(next(tag for tag in (f"{job}.{j}-{salt}" for salt in salts) if slot_of(tag) in wanted))
    return places


def _base36(number: int) -> str:
    text = ""
    while True:
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
        if not number:
            return text
