"""pytest-benchmark suite of the aggregation: all-reduces through an embedded store.

pytest bench/test_aggregation.py --benchmark-columns=median,iqr,rounds

Workers are threads here (the collective holds no GIL); `bench.compare` uses processes, and peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest

from smlt import Communicator, ErrorFeedback
from smlt.collective.codecs import CODECS
from smlt.store.embedded import EmbeddedStore


@pytest.fixture(scope="module")
def store() -> Iterator[EmbeddedStore]:
    with EmbeddedStore() as server:
        yield server


@contextmanager
def on_all(store: EmbeddedStore, workers: int, call: Callable[[Communicator], Any], **settings: Any) -> Iterator[Any]:
    """A function that has every worker make the call, and returns when all have."""
    with ThreadPoolExecutor(workers) as pool, ExitStack() as stack:
        comms = [Communicator(store.url, job="bench", rank=rank, world_size=workers, **settings) for rank in range(workers)]
        stack.callback(lambda: list(pool.map(Communicator.close, comms)))
        yield lambda: list(pool.map(call, comms))


def measure(benchmark: Any, run: Callable[[], Any], floats: int) -> None:
    benchmark.pedantic(run, rounds=7 if floats > 1_000_000 else 50, warmup_rounds=2)
    benchmark.extra_info["GB/s of float32 a worker"] = 4 * floats / benchmark.stats["median"] / 1e9


@pytest.mark.parametrize("floats", [1_000, 100_000, 11_000_000])
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("codec", list(CODECS))
def test_allreduce(benchmark: Any, store: EmbeddedStore, workers: int, floats: int, codec: str) -> None:
    gradients = [np.ones(floats, np.float32) for _ in range(workers)]
    with on_all(store, workers, lambda c: c.allreduce(gradients[c.rank], codec=codec, out=gradients[c.rank])) as run:
        measure(benchmark, run, floats)


@pytest.mark.parametrize("algorithm", ["one-shot", "hierarchical", "centralised"])
@pytest.mark.parametrize("floats", [100, 10_000])
def test_algorithm(benchmark: Any, store: EmbeddedStore, floats: int, algorithm: str) -> None:
    gradients = [np.ones(floats, np.float32) for _ in range(4)]
    with on_all(store, 4, lambda c: c.allreduce(gradients[c.rank]), algorithm=algorithm) as run:
        measure(benchmark, run, floats)


def test_with_error_feedback(benchmark: Any, store: EmbeddedStore) -> None:
    gradients, feedback = [np.ones(11_000_000, np.float32) for _ in range(4)], [ErrorFeedback() for _ in range(4)]

    def call(comm: Communicator) -> None:
        gradient = gradients[comm.rank]
        comm.allreduce(gradient, codec="int8", out=gradient, feedback=feedback[comm.rank])

    with on_all(store, 4, call) as run:
        measure(benchmark, run, 11_000_000)


@pytest.mark.parametrize("arrays", [1, 100])
def test_fused_small_tensors(benchmark: Any, store: EmbeddedStore, arrays: int) -> None:
    value = {str(number): np.ones(10_000 // arrays, np.float32) for number in range(arrays)}
    with on_all(store, 4, lambda c: c.allreduce(value)) as run:
        measure(benchmark, run, 10_000)
