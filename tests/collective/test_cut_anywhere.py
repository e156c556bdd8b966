"""Networks that split, reset and garble at any byte: the result is right, or the error is one of ours, and a wait ends."""

from __future__ import annotations

import random

import numpy as np
import pytest
from groups import in_parallel
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from proxy import Connection, End, Proxy
from stores import KIND

from smlt import Communicator
from smlt.store.embedded import EmbeddedStore


def reduce_twice(store: EmbeddedStore, proxy: Proxy, job: str, size: int, *, chunk_bytes: int = 16 * 1024) -> None:
    """Rank 0 behind the proxy, rank 1 beside it; one collective in place, one not."""
    comms = [
        Communicator(url, job=job, rank=rank, world_size=2, timeout_s=30, chunk_bytes=chunk_bytes)
        for rank, url in enumerate((proxy.url, store.url))
    ]
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)

    def call(comm: Communicator) -> bytes:
        mine = x * (comm.rank + 1)
        comm.allreduce(mine, codec="fp32", out=mine)
        np.testing.assert_allclose(mine, x * 1.5, rtol=1e-6)
        return mine.tobytes() + comm.allreduce(x * (comm.rank + 1), codec="int8").tobytes()

    outcomes = in_parallel([lambda comm=comm: call(comm) for comm in comms])  # type: ignore[misc]
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert outcomes[0].value == outcomes[1].value
    proxy.on_connect, proxy.on_lane = lambda connection: None, lambda connection, lane: None
    in_parallel([comm.close for comm in comms])


@pytest.mark.parametrize("way", ["up", "down", "both"])
@pytest.mark.parametrize("size", [50, 3000], ids=["one-shot", "hierarchical"])
def test_bytes_may_come_one_by_one(store: EmbeddedStore, job: str, way: str, size: int) -> None:
    with Proxy(store) as proxy:

        def slice_all(connection: Connection) -> None:
            if connection.number > 0:  # the first is the control plane's
                for direction in [connection.up, connection.down] if way == "both" else [getattr(connection, way)]:
                    direction.piece = 1

        proxy.on_connect = slice_all
        reduce_twice(store, proxy, job, size if size < 1000 else 20_000)


@pytest.mark.parametrize("seed", range(4))
def test_bytes_may_come_in_any_pieces(store: EmbeddedStore, job: str, seed: int) -> None:
    with Proxy(store, seed=seed) as proxy:

        def slice_all(connection: Connection) -> None:
            connection.up.piece = connection.down.piece = "random"

        proxy.on_connect = slice_all
        reduce_twice(store, proxy, job, 200_000)


@pytest.mark.parametrize("end", ["reset", "close"])
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("lane", range(3))
def test_a_lane_that_ends_every_few_bytes(store: EmbeddedStore, job: str, lane: int, way: str, end: End) -> None:
    """Each connection of the lane lives for some more bytes than the one before, from the first behind its handshake."""
    with Proxy(store) as proxy:
        bulk = (lane, way) in ((0, "up"), (1, "down"))
        lived, more = 15 if way == "down" else 200, 1777 if bulk else 37

        def on_lane(connection: Connection, which: int) -> None:
            nonlocal lived
            if which == lane and lived < 200 + 15 * more:
                lived += more
                getattr(connection, way).at(lived, end)

        proxy.on_lane = on_lane
        reduce_twice(store, proxy, job, 40_000)


@settings(max_examples=25, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), size=st.sampled_from([10, 2000, 60_000]))
def test_connections_that_end_at_any_byte(store: EmbeddedStore, seed: int, size: int) -> None:
    note(f"seed {seed}")
    chance = random.Random(seed)
    with Proxy(store, seed=seed) as proxy:
        ends = chance.randint(1, 10)

        def end(connection: Connection) -> None:
            nonlocal ends
            if ends > 0 and chance.random() < 0.7:
                ends -= 1
                direction = chance.choice([connection.up, connection.down])
                direction.at(int(chance.expovariate(1 / 4000)) + 150, chance.choice(["reset", "close"]))

        def on_connect(connection: Connection) -> None:
            if connection.number > 0 and not KIND:
                end(connection)
            if chance.random() < 0.3:
                connection.down.piece = chance.choice([1, 7, "random"])

        proxy.on_connect = on_connect
        if KIND:  # whose control plane opens connections one after the other: ten that end make it give up
            proxy.on_lane = lambda connection, lane: end(connection)
        reduce_twice(store, proxy, f"cut-{seed}-{size}", size)
