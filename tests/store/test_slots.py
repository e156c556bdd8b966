"""Which slots the tags of a job fall on, and how they are spread over a cluster's primaries."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import redis.crc
from hypothesis import given
from hypothesis import strategies as st

from smlt.store.slots import SLOTS, Range, SlotMap, choose_places, slot_of

JOBS = st.text("abcXYZ019_-", min_size=1, max_size=64)


@given(JOBS, st.integers(0, 63))
def test_a_tag_s_slot_is_that_of_its_keys(job: str, j: int) -> None:
    assert slot_of(f"{job}.{j}") == redis.crc.key_slot(f"smlt:{{{job}.{j}}}:x".encode())


@given(JOBS, st.integers(1, 7), st.integers(1, 20))
def test_groups_go_round_the_primaries_and_the_control_plane_counts_as_one(job: str, primaries: int, groups: int) -> None:
    cuts = [SLOTS * at // primaries for at in range(primaries + 1)]
    slots = SlotMap([Range(cuts[at], cuts[at + 1] - 1, ("host", at)) for at in range(primaries)])
    places = choose_places(job, slots, groups)
    assert places[0] == f"{job}.0"
    assert [place.partition(".")[2].partition("-")[0] for place in places] == [str(j) for j in range(groups)]
    load = Counter(slots.primary_of(slot_of(place)) for place in places)
    assert max(load.values()) - min([*load.values(), 0 if len(load) < primaries else SLOTS]) <= 1
    assert choose_places(job, slots, None) == choose_places(job, slots, primaries)
    assert choose_places(job, slots, groups) == places


def test_groups_of_one_primary_are_spread_over_its_slots() -> None:
    """A cluster that shows itself as one node (ElastiCache serverless) has them on many."""
    slots = [slot_of(place) for place in choose_places("job", SlotMap([Range(0, SLOTS - 1, ("host", 1))]), 4)]
    assert {slot * 4 // SLOTS for slot in slots[1:]} == {1, 2, 3}


def test_slots_that_are_scattered_or_few() -> None:
    few = SlotMap([Range(5, 5, ("a", 1)), Range(0, 4, ("b", 1)), Range(6, SLOTS - 1, ("b", 1))])
    places = choose_places("job", few, 4)
    owners = Counter(few.primary_of(slot_of(place)) for place in places)
    assert owners == {("a", 1): 2, ("b", 1): 2}


def test_a_reply_is_read_as_it_is_documented() -> None:
    reply = [
        [0, 99, [b"", 7000, b"id"], [b"10.0.0.2", 7001, b"id2", [b"hostname", b"x"]]],
        [100, SLOTS - 1, [b"?", 7002, b"id"]],  # whose address the cluster does not know
    ]
    slots = SlotMap.parse(reply, ("asked", 1))
    assert (slots.primary_of(5), slots.primary_of(100)) == (("asked", 7000), None)
    assert slots.addresses() == [("asked", 7000), ("10.0.0.2", 7001)]
    assert slots.covered() == 100


@pytest.mark.parametrize("reply", [b"OK", [b"x"], [[0]], [[0, SLOTS, [b"a", 1]]], [[9, 3, [b"a", 1]]], [[0, 1, None]], 7])
def test_what_is_no_slot_map_is_refused(reply: Any) -> None:
    with pytest.raises(ValueError, match=r"slots|unpack|SLOTS|int"):
        SlotMap.parse(reply, ("asked", 1))
