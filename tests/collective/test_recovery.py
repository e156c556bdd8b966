"""Lost connections at the moments that matter, one by one (invariant 5): engines driven by hand against a real store."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from by_hand import DOWN, TOKENS, UP, ByHand, finish
from stores import Everywhere

from smlt.collective import _native
from smlt.store.embedded import EmbeddedStore

Make = Callable[[int], list[ByHand]]


@pytest.fixture
def make(store: EmbeddedStore, job: str) -> Iterator[Make]:
    made: list[ByHand] = []

    def workers(world_size: int) -> list[ByHand]:
        made.extend(ByHand(store, job, rank, world_size) for rank in range(world_size))
        return made

    yield workers
    for worker in made:
        worker.close(store)


def gradients(n: int, size: int) -> list[np.ndarray]:
    return [np.random.default_rng(rank).standard_normal(size, dtype=np.float32) for rank in range(n)]


@pytest.mark.parametrize("cut_at", [1, 60, 100, 150, 200, 300, 1000, 4000])
@pytest.mark.parametrize("algorithm", ["one-shot", "hierarchical"])
def test_a_token_cut_off_behind_its_name_is_read_again(make: Make, cut_at: int, algorithm: str) -> None:
    first, second = make(2)
    x = gradients(2, 1000)
    expected = np.mean(x, axis=0)
    assert first.reduce(x[0], algorithm=algorithm) == second.reduce(x[1], algorithm=algorithm) == 1
    second.send(UP)
    second.receive(UP, wait_s=2)  # its token is in the store
    first.send(TOKENS)
    first.receive(TOKENS, limit=cut_at, wait_s=2)
    first.cut()
    finish([first, second], 1)
    np.testing.assert_array_equal(x[0], x[1])
    np.testing.assert_allclose(x[0], expected, atol=1e-6)


@pytest.mark.parametrize("lane", [UP, TOKENS])
@pytest.mark.parametrize("cut_at", range(0, 400, 25))
def test_control_words_and_confirmations_cut_anywhere(make: Make, lane: int, cut_at: int) -> None:
    workers = make(2)
    x = gradients(2, 50_000)
    expected = np.mean(x, axis=0)
    for worker, mine in zip(workers, x, strict=True):
        worker.reduce(mine)
    for _ in range(4):
        for worker in workers:
            worker.move([UP, DOWN] if lane == TOKENS else [DOWN, TOKENS])
            worker.send(lane)
        workers[0].receive(lane, limit=cut_at or None)
        workers[0].cut()
    finish(workers, 1)
    np.testing.assert_array_equal(x[0], x[1])
    np.testing.assert_allclose(x[0], expected, atol=1e-6)


def test_a_chunk_that_is_stored_without_its_token_is_announced_again(make: Make) -> None:
    """The store takes the SET and confirms it; the XADD behind it is lost with the connection."""
    first, second = make(2)
    x = gradients(2, 20_000)
    expected = np.mean(x, axis=0)
    first.reduce(x[0])
    second.reduce(x[1])
    # 40 bytes of header and 40,000 of elements with SET, key and PX around them: the XADD is behind 40,200 bytes.
    second.send(UP, limit=40_170)
    second.receive(UP, wait_s=2)
    second.cut()
    finish([first, second], 1)
    np.testing.assert_array_equal(x[0], x[1])
    np.testing.assert_allclose(x[0], expected, atol=1e-6)


def test_a_hello_that_is_lost_is_said_again(make: Make) -> None:
    root, other = make(2)
    x = [np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)]
    assert root.broadcast(x[0], root=0) == other.broadcast(x[1], root=0) == 1
    root.move()
    assert other.engine.output(UP)  # composed, never sent
    other.cut()
    finish([root, other], 1)
    np.testing.assert_array_equal(x[1], x[0])


def test_a_confirmation_that_comes_last_ends_the_collective(make: Make) -> None:
    """Rank 1 owns nothing and hears that its upload is stored only after the aggregate has come down."""
    owner, other = make(2)
    x = gradients(2, 1000)
    expected = np.mean(x, axis=0)
    owner.reduce(x[0], algorithm="centralised")
    other.reduce(x[1], algorithm="centralised")
    for _ in range(200):
        owner.move()
        other.send(UP)
        other.move([DOWN, TOKENS])
        owner.receive(DOWN, wait_s=0.005)
        if (x[1] == x[0]).all() and owner.status(1) == _native.OK:
            break
    np.testing.assert_allclose(x[1], expected, atol=1e-6)
    assert other.status(1) == _native.ACTIVE
    other.receive(UP, wait_s=2)
    assert other.status(1) == _native.OK


@pytest.mark.parametrize("codec", ["int8", "bf16", "fp16"])
def test_an_in_place_result_half_received_is_not_sent_again_as_a_contribution(make: Make, codec: str) -> None:
    """The memory of a contribution holds part of the result when the connections are lost: the residual must not change."""
    x = gradients(2, 60_000)
    reference = [row.copy() for row in x]
    kept = [np.full(60_000, np.nan, np.float32) for _ in x]
    expected = [np.full(60_000, np.nan, np.float32) for _ in x]
    workers = make(2)
    for worker, mine, residual in zip(workers, reference, expected, strict=True):
        worker.reduce(mine, codec=codec, feedback=(None, residual))
    finish(workers, 1)
    for worker, mine, residual in zip(workers, x, kept, strict=True):
        assert worker.reduce(mine, codec=codec, feedback=(None, residual)) == 2
    first, second = workers
    before = x[1].copy()
    for _ in range(200):  # rank 1 never hears that its upload is stored; of rank 0's aggregate it gets 9,000 bytes
        first.move()
        second.send(UP)
        second.move([TOKENS])
        second.send(DOWN)
        second.receive(DOWN, limit=9000, wait_s=0.005)
        if (x[1][:4000] != before[:4000]).all():
            break
    assert second.status(2) == _native.ACTIVE
    second.cut()
    finish(workers, 2)
    for rank in range(2):
        np.testing.assert_array_equal(x[rank], reference[0])
        np.testing.assert_array_equal(kept[rank], expected[rank])


def begin(worker: ByHand, number: int, size: int) -> np.ndarray:
    """Mostly one-shot; every fifth step is hierarchical, every seventh a broadcast."""
    mine = np.full(size if number % 5 else 100, worker.rank + number, np.float32)
    if number % 7 == 0:
        worker.broadcast(mine, root=number % 2)
    else:
        worker.reduce(mine, algorithm="one-shot" if number % 5 else "hierarchical")
    return mine


@pytest.mark.parametrize(("steps", "size"), [(330, 16_000), (1500, 1)])  # more than is kept in bytes; in steps
def test_tokens_beyond_what_is_kept_are_read_again(make: Make, steps: int, size: int) -> None:
    slow, fast = make(2)
    ahead, results = [], []
    for number in range(steps):
        ahead.append(begin(fast, number, size))
        fast.move([UP])
    for number in range(steps):
        results.append(begin(slow, number, size))
        finish([slow], number + 1)
        slow.engine.retire(number + 1)
        fast.move()
    for number in range(steps):
        finish([fast], number + 1)
        np.testing.assert_array_equal(results[number], ahead[number])


@pytest.mark.parametrize("algorithm", ["one-shot", "hierarchical"])
@pytest.mark.parametrize("slow", [0, 1])
def test_streams_stay_short_though_a_worker_is_always_ahead(
    make: Make, store: EmbeddedStore, algorithm: str, slow: int
) -> None:
    workers, steps, lead = make(2), 1500, 3
    for number in range(steps + lead):
        if number < steps:
            workers[1 - slow].reduce(np.ones(65, np.float32), algorithm=algorithm)
            workers[1 - slow].move()
        if number >= lead:
            workers[slow].reduce(np.ones(65, np.float32), algorithm=algorithm)
            finish(workers, number - lead + 1)
            for worker in workers:
                worker.engine.retire(number - lead + 1)
    with Everywhere(store) as client:
        for stream in ("agg", "in:0", "in:1"):
            assert client.at(workers[0].prefix).xlen(workers[0].prefix + stream) < 1200
        chunks = [key for key in client.scan_iter(count=10_000) if workers[0].prefix.encode() in key and b":a:" in key]
        assert len(chunks) < 50
