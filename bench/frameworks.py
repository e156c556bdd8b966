"""What an all-reduce of a framework's tensors takes, beside that of NumPy arrays.

    python -m bench.frameworks [--workers 2] [--floats 11000000] [--tensors 62] [--codec fp16] [--rounds 9] [--json]

The frameworks that can be imported take part: TensorFlow and JAX in one environment, MXNet in one of its own (`.ci/frameworks`
makes both). All reduce the same floats, as one tensor and as `--tensors` of them (ResNet-18 has 62), one after the other in
each round, on an embedded store over its unix socket. A round's time is the slowest worker's. Medians in milliseconds, and
their ratios to NumPy's for one array in place (`out` is the gradient itself). What NumPy takes with the result in new memory
tells which part of a framework's ratio is that. `compiled`: inside `tf.function`, under `jax.jit`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from smlt import Communicator
from smlt.collective.codecs import CODECS
from smlt.store.embedded import EmbeddedStore

Reduction = Callable[[], Any]


def numpy_ways(comm: Communicator, arrays: list[np.ndarray[Any, Any]]) -> Iterator[tuple[str, Reduction]]:
    gradients = {str(index): array.copy() for index, array in enumerate(arrays)}
    yield "numpy, in place", lambda: comm.allreduce(gradients, out=gradients)
    yield "numpy", lambda: comm.allreduce(gradients)


def tensorflow_ways(comm: Communicator, arrays: list[np.ndarray[Any, Any]]) -> Iterator[tuple[str, Reduction]]:
    import tensorflow as tf

    import smlt.tensorflow

    tf.config.threading.set_intra_op_parallelism_threads(1)
    gradients = [tf.constant(array) for array in arrays]
    yield "tensorflow", lambda: smlt.tensorflow.allreduce(gradients, comm=comm)
    compiled = tf.function(lambda values: smlt.tensorflow.allreduce(values, comm=comm))
    yield "tensorflow, compiled", lambda: compiled(gradients)


def jax_ways(comm: Communicator, arrays: list[np.ndarray[Any, Any]]) -> Iterator[tuple[str, Reduction]]:
    import jax

    import smlt.jax

    gradients = [jax.numpy.array(array) for array in arrays]
    yield "jax", lambda: smlt.jax.allreduce(gradients, comm=comm)
    compiled = jax.jit(lambda values: smlt.jax.allreduce(values, comm=comm))
    yield "jax, compiled", lambda: jax.block_until_ready(compiled(gradients))


def mxnet_ways(comm: Communicator, arrays: list[np.ndarray[Any, Any]]) -> Iterator[tuple[str, Reduction]]:
    import mxnet

    import smlt.mxnet

    gradients = [mxnet.nd.array(array, dtype=array.dtype) for array in arrays]
    yield "mxnet", lambda: smlt.mxnet.allreduce(gradients, comm=comm)


WAYS = {"numpy": numpy_ways, "tensorflow": tensorflow_ways, "jax": jax_ways, "mxnet": mxnet_ways}


#: How many ways each gives.
YIELDS = {numpy_ways: 2, tensorflow_ways: 2, jax_ways: 2, mxnet_ways: 1}


def here() -> list[Callable[..., Iterator[tuple[str, Reduction]]]]:
    """Those of the frameworks that can be imported."""
    return [ways for name, ways in WAYS.items() if importlib.util.find_spec(name) is not None]


def worker(rank: int, options: argparse.Namespace, url: str, start: Any, results: Any) -> None:
    flat = np.random.default_rng(rank).standard_normal(options.floats, np.float32)
    with Communicator(url, job="frameworks", rank=rank, world_size=options.workers, codec=options.codec) as comm:
        reductions: dict[tuple[str, int], Reduction] = {}
        for tensors in (1, options.tensors):
            arrays = np.array_split(flat, tensors)
            for ways in here():
                reductions |= {(way, tensors): reduction for way, reduction in ways(comm, arrays)}
        for reduction in reductions.values():  # compiles, and opens what is opened once
            reduction()
        for turn in range(options.rounds):
            for key, reduction in reductions.items():
                start.wait()
                began = time.perf_counter()
                reduction()
                results.put((key, turn, time.perf_counter() - began))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way and number of tensors: the slowest worker's median time, and its ratio to NumPy's of one array."""
    n = options.workers
    context = mp.get_context("spawn")  # TensorFlow and JAX cannot be forked
    start, results = context.Barrier(n), context.Queue()
    with EmbeddedStore() as store:
        processes = [context.Process(target=worker, args=(rank, options, store.url, start, results)) for rank in range(n)]
        for process in processes:
            process.start()
        slowest: dict[tuple[str, int], list[float]] = {}
        for _ in range(n * options.rounds * 2 * sum(YIELDS[ways] for ways in here())):
            key, turn, seconds = results.get(timeout=300)
            times = slowest.setdefault(key, [0.0] * options.rounds)
            times[turn] = max(times[turn], seconds)
        for process in processes:
            process.join()
    medians = {key: statistics.median(times) for key, times in slowest.items()}
    return [
        {"way": way, "tensors": tensors, "ms": 1e3 * seconds, "ratio": seconds / medians["numpy, in place", 1]}
        for (way, tensors), seconds in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--floats", type=int, default=11_000_000)
    parser.add_argument("--tensors", type=int, default=62)
    parser.add_argument("--codec", choices=list(CODECS), default="fp16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    rows = measure(options)
    if options.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print(f"{options.workers} workers, {options.floats:,} floats, {options.codec}, medians of {options.rounds} rounds")
    for row in rows:
        print(f"{row['tensors']:>4} tensors  {row['way']:<24} {row['ms']:7.1f} ms  {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
