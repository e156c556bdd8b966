"""Every algorithm with every codec: the mean, the same bits for all, disagreement told, and nothing left to grow."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from groups import Group
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import Everywhere

from smlt import Communicator
from smlt.collective.codecs import BF16_RELATIVE_ERROR, FP16_CHUNK_ERROR, FP16_RELATIVE_ERROR, INT8_BLOCK_ERROR
from smlt.collective.structure import EXACT_ELEMENTS
from smlt.errors import MismatchError
from smlt.store.embedded import EmbeddedStore

ALGORITHMS = ["auto", "one-shot", "hierarchical", "centralised"]
CODECS = ["fp32", "fp16", "bf16", "int8"]
CHUNK_BYTES = 1032  # four int8 blocks with their scales, 516 halves


@pytest.fixture(scope="module")
def groups(store: EmbeddedStore) -> Iterator[Callable[[int, str], Group]]:
    """Groups by (world size, algorithm), made once: random cases follow each other on the same connections."""
    made: dict[tuple[int, str], Group] = {}

    def get(n: int, algorithm: str) -> Group:
        if (n, algorithm) not in made:
            job = f"algorithm-{uuid.uuid4().hex[:8]}"
            made[n, algorithm] = Group(store.url, job, n, chunk_bytes=CHUNK_BYTES, algorithm=algorithm)
        return made[n, algorithm]

    yield get
    for group in made.values():
        group.close()


def one_error(codec: str, x: np.ndarray) -> np.ndarray:
    """The documented bound of one encoding of `x`, or of smaller values beside it."""
    largest = np.abs(x).max(initial=0)
    return {
        "fp32": 0 * np.abs(x),
        "fp16": np.maximum(FP16_RELATIVE_ERROR * np.abs(x), FP16_CHUNK_ERROR * largest),
        "bf16": BF16_RELATIVE_ERROR * np.abs(x),
        "int8": INT8_BLOCK_ERROR * largest + 0 * np.abs(x),
    }[codec]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 5),
    algorithm=st.sampled_from(ALGORITHMS),
    codec=st.sampled_from(CODECS),
    op=st.sampled_from(["mean", "sum"]),
    size=st.one_of(
        st.integers(0, 6), st.sampled_from([63, 64, 65, 257, 515, 516, 517, 1024, 1025, 5_000]), st.integers(0, 4_000)
    ),
)
def test_the_result_is_within_the_bound_and_the_same_for_all(
    groups: Callable[[int, str], Group], seed: int, n: int, algorithm: str, codec: str, op: str, size: int
) -> None:
    rng = np.random.default_rng(seed)
    inputs = [(rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32) for _ in range(n)]
    workers = groups(n, algorithm)
    results = workers.run(lambda comm: comm.allreduce(inputs[comm.rank], op=op, codec=codec))
    assert all(result.tobytes() == results[0].tobytes() for result in results)
    if size <= EXACT_ELEMENTS:
        codec = "fp32"
    exact = np.sum(inputs, axis=0, dtype=np.float64)
    bound = np.sum([one_error(codec, x.astype(np.float64)) for x in inputs], axis=0)
    bound += 1.1 * one_error(codec, exact + bound) + n * 2.0**-22 * np.sum(np.abs(inputs), axis=0)
    scale = n if op == "mean" else 1
    assert (np.abs(results[0] - exact / scale) <= bound / scale).all()
    again = workers.run(lambda comm: comm.allreduce(inputs[comm.rank], op=op, codec=codec))
    assert again[0].tobytes() == results[0].tobytes()


Call = Callable[[Communicator], Any]
FLOATS = np.ones(3_000, np.float32)
OTHERS: dict[str, Call] = {
    "length": lambda comm: comm.allreduce(np.ones(3_001, np.float32)),
    "small length": lambda comm: comm.allreduce(np.ones(10, np.float32)),
    "dtype": lambda comm: comm.allreduce(np.ones(3_000)),
    "codec": lambda comm: comm.allreduce(FLOATS, codec="int8"),
    "operation": lambda comm: comm.allreduce(FLOATS, op="max"),
    "structure": lambda comm: comm.allreduce([FLOATS]),
    "collective": lambda comm: comm.broadcast(FLOATS),
    "barrier": lambda comm: comm.barrier(),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("algorithm", ["one-shot", "hierarchical"])
def test_who_calls_something_else_is_named_and_all_go_on(group: Callable[..., Group], algorithm: str, other: str) -> None:
    workers = group(3, algorithm=algorithm)
    for odd in (1, 0):
        outcomes = workers.attempt(lambda c, odd=odd: OTHERS[other](c) if c.rank == odd else c.allreduce(FLOATS))
        for outcome in outcomes:
            assert isinstance(outcome.error, MismatchError)
            assert f"rank {odd or 1} called" in str(outcome.error) or f"rank {odd or 2} called" in str(outcome.error)
        assert workers.run(lambda comm: comm.allreduce(comm.rank, op="sum")) == [3, 3, 3]


def test_workers_of_other_algorithms_are_told(store: EmbeddedStore, job: str) -> None:
    with (
        Communicator(store.url, job=job, rank=0, world_size=2, algorithm="one-shot", timeout_s=20) as one,
        Communicator(store.url, job=job, rank=1, world_size=2, algorithm="hierarchical", timeout_s=20) as other,
    ):
        works = [comm.allreduce_async(FLOATS) for comm in (one, other)]
        for work in works:
            assert isinstance(work.exception(), MismatchError)


@pytest.mark.parametrize("algorithm", ["one-shot", "hierarchical", "centralised"])
def test_what_lies_in_the_store_does_not_grow(
    store: EmbeddedStore, group: Callable[..., Group], job: str, algorithm: str
) -> None:
    workers = group(3, algorithm=algorithm)
    one = workers.members[0]
    values = np.ones(2_000, np.float32)

    def measure() -> tuple[int, int]:
        """Keys, and bytes in all streams."""
        with Everywhere(store) as client:
            keys = list(client.scan_iter(match=f"smlt:{{{job}.*"))
            streams = [key for key in keys if client.at(key).type(key) == b"stream"]
            return len(keys), sum(client.at(key).memory_usage(key) or 0 for key in streams)

    def work(comm: Communicator, steps: int) -> None:
        if comm is one:  # runs ahead, as far as it can without the others
            for handle in [comm.allreduce_async(values) for _ in range(steps)]:
                handle.wait()
        else:
            for _ in range(steps):
                comm.allreduce(values)

    workers.run(lambda comm: work(comm, 100))
    keys, size = measure()
    for _ in range(5):
        workers.run(lambda comm: work(comm, 100))
    later = measure()
    assert later[0] <= keys + 20  # aggregates of the last steps
    # What has been read is trimmed 64 KiB at a time, by nodes, and who is late has more to read. Untrimmed it would be 12 MB.
    assert later[1] <= size + 4_000_000
