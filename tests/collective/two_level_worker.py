"""The workers of test_two_level.py: a process each, forked from one that has imported all.

Each takes part in what the first argument names, in its place of the list that the second is, and prints what came of it
as lines of JSON with its rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

import smlt
from smlt.collective.shared_group import BLOCK_BYTES, BLOCKS
from smlt.collective.two_level import TwoLevelCommunicator
from smlt.errors import MismatchError, SmltError, WorkerLostError

BLOCK_FLOATS = BLOCK_BYTES // 4
#: Around the borders of a share, a block, the whole ring.
SIZES = (0, 1, 63, 64, 65, 257, BLOCK_FLOATS - 1, BLOCK_FLOATS, BLOCK_FLOATS + 1, BLOCKS * BLOCK_FLOATS + 77)
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def floats(rank: int, size: int, dtype: str = "float32") -> Any:
    return np.random.default_rng(1000 * size + rank).standard_normal(size).astype(dtype) * np.dtype(dtype).type(10.0**rank)


def integers(rank: int, dtype: str) -> Any:
    """All magnitudes that the dtype has, and its ends."""
    info = np.iinfo(dtype)
    found = np.random.default_rng(rank).integers(info.min, info.max, 1001, dtype=dtype, endpoint=True)
    found[:2] = info.min, info.max
    return found


def special(rank: int) -> Any:
    """What overflows in a sum and not in a mean, NaN and Inf on one worker alone, and next to nothing."""
    x = np.full(200, 3e38, np.float32)
    x[10:20], x[20:30], x[30:40] = 1e-38, np.inf if rank == 1 else 1, np.nan if rank == 2 else 1
    return x


def exchanges(comm: TwoLevelCommunicator) -> Iterator[tuple[str, Any]]:
    """Everything a communicator does; what each gives, by name."""
    rank = comm.rank
    for size in SIZES:
        for codec in ("fp32", "fp16"):
            yield f"mean {size} {codec}", comm.allreduce(floats(rank, size), codec=codec)
    for op in ("sum", "min", "max"):
        yield f"{op} float64", comm.allreduce(floats(rank, 1000, "float64"), op, codec="fp32")
    for dtype in INTEGERS:
        for op in ("mean", "sum", "min", "max"):
            yield f"{op} {dtype}", comm.allreduce(integers(rank, dtype), op)
    yield "special", comm.allreduce(special(rank), codec="fp32")
    yield "int8 codec", comm.allreduce(floats(0, 1000), codec="int8")
    yield "half", comm.allreduce(floats(rank, 100).astype(np.float16))
    nested = {"b": [floats(rank, 300), rank], "a": (np.bool_(rank == 1), None, float(rank))}
    yield "nested", comm.allreduce(nested, "max")
    yield "numbers", comm.allreduce({"loss": 0.5 * rank, "count": rank})
    x = floats(rank, 2 * BLOCK_FLOATS + 5)
    comm.allreduce(x, out=x, codec="fp32")
    yield "in place", x
    for root in range(comm.world_size):
        yield f"broadcast {root}", comm.broadcast({"w": floats(rank, 1000), "n": rank}, root)
    yield "gathered", comm.allgather([floats(rank, BLOCK_FLOATS + 3), np.int16(rank)])
    works = [comm.allreduce_async(floats(rank, size)) for size in (1000, 5, 200_000)]
    last = comm.allreduce(np.float32(rank))
    yield "asynchronous", [work.wait() for work in works] + [last]
    feedback = smlt.ErrorFeedback()
    yield "feedback", [comm.allreduce(floats(3, 500), codec="int8", feedback=feedback) for _ in range(3)]
    comm.barrier()


def digest(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"{key}:{digest(value[key])}" for key in sorted(value))
    if isinstance(value, (list, tuple)):
        return "".join(map(digest, value))
    array = np.asarray(value) if value is not None else np.zeros(0)
    return f"{type(value).__name__}{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


def mean_bound(xs: list[Any], codec: str, machines: int) -> Any:
    """What a mean may err by: see smlt.collective.codecs. Sums of float32 are rounded; fp16 encodes twice."""
    exact = np.sum(np.abs(np.array(xs, np.float64)), axis=0) / len(xs)
    rounded = (len(xs) + 2) * 2.0**-24 * exact
    if codec == "fp32" or machines == 1 or xs[0].size <= 64:
        return rounded
    return rounded + 2 * (2.0**-11 * exact + 2.0**-39 * max(exact, default=0)) * 1.01


def check(kept: dict[str, Any], n: int, machines: int) -> None:
    for size in SIZES:
        xs = [floats(rank, size) for rank in range(n)]
        exact = np.mean(np.array(xs, np.float64), axis=0)
        for codec in ("fp32", "fp16"):
            assert (np.abs(kept[f"mean {size} {codec}"] - exact) <= mean_bound(xs, codec, machines)).all(), (size, codec)
    for dtype in INTEGERS:
        xs = [integers(rank, dtype) for rank in range(n)]
        exact = [round(Fraction(sum(column), n)) for column in zip(*(x.tolist() for x in xs), strict=True)]
        assert kept[f"mean {dtype}"].tolist() == exact, dtype
        assert kept[f"mean {dtype}"].dtype == dtype
        assert (kept[f"sum {dtype}"] == np.sum(np.array(xs), axis=0, dtype=dtype)).all()
        assert (kept[f"max {dtype}"] == np.max(np.array(xs), axis=0)).all()
    doubles = np.array([floats(rank, 1000, "float64") for rank in range(n)])
    assert (kept["min float64"] == doubles.min(axis=0)).all()
    assert np.allclose(kept["sum float64"], doubles.sum(axis=0), rtol=1e-13)
    special = kept["special"]
    assert np.allclose(special[:10], 3e38)  # the sum would be Inf
    assert np.allclose(special[10:20], 1e-38)
    assert np.isposinf(special[20:30]).all()
    assert np.isnan(special[30:40]).all()
    assert kept["nested"]["a"] == (True, None, n - 1.0)
    assert kept["numbers"] == {"loss": 0.5 * (n - 1) / 2, "count": (n - 1) / 2}
    for root in range(n):
        assert (kept[f"broadcast {root}"]["w"] == floats(root, 1000)).all()
        assert kept[f"broadcast {root}"]["n"] == root
    rows, numbers = kept["gathered"]
    assert all((row == floats(rank, row.size)).all() for rank, row in enumerate(rows))
    assert numbers.tolist() == list(range(n))
    assert np.abs(np.mean(kept["feedback"], axis=0) - floats(3, 500)).max() < np.abs(floats(3, 500)).max() / 300
    assert kept["asynchronous"][-1] == (n - 1) / 2


def every_exchange(comm: TwoLevelCommunicator) -> dict[str, Any]:
    kept = dict(exchanges(comm))
    again = {name: digest(value) for name, value in exchanges(comm)}
    if comm.rank == 0:
        check(kept, comm.world_size, comm.machines)
    return {"digests": {name: digest(value) for name, value in kept.items()}, "again": again}


def disagreement(comm: TwoLevelCommunicator) -> dict[str, Any]:
    """First two workers of a machine call different things, then the machines do; then all agree."""
    texts = []
    for odd in ((1,), (0, 1)):
        try:
            comm.allreduce(np.ones(4 if comm.rank in odd else 5_000_000, np.float32))
        except MismatchError as error:
            texts.append(str(error))
    try:
        comm.broadcast(np.ones(3), root=3) if comm.rank == 0 else comm.allreduce(np.ones(3))
    except MismatchError as error:
        texts.append(str(error))
    return {"texts": texts, "after": comm.allreduce(1.0, "sum")}


def lost(comm: TwoLevelCommunicator) -> dict[str, Any]:
    """Reduce until somebody is killed, or interrupted: that one leaves with its KeyboardInterrupt."""
    say(comm.rank, {"ready": comm.allreduce(1, "sum"), "pid": os.getpid()})
    try:
        while True:
            comm.allreduce(np.ones(300_000, np.float32))
    except WorkerLostError as error:
        ended = {"error": "WorkerLostError", "ranks": error.ranks, "text": str(error)}
    except SmltError as error:
        ended = {"error": type(error).__name__, "text": str(error)}
    return {**ended, "usable": comm.usable}


def say(rank: int, what: dict[str, Any]) -> None:
    os.write(1, json.dumps({"rank": rank, **what}).encode() + b"\n")  # one write: lines do not mix


def work(place: dict[str, Any]) -> None:
    scenarios = {"every_exchange": every_exchange, "disagreement": disagreement, "lost": lost}
    try:
        with TwoLevelCommunicator(**place) as comm:
            say(comm.rank, scenarios[sys.argv[1]](comm))
    except KeyboardInterrupt:
        say(place["rank"], {"error": "KeyboardInterrupt"})


def main() -> int:
    children = []
    for place in json.loads(sys.argv[2]):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                work(place)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(pid)
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) > 0 for pid in children)


if __name__ == "__main__":
    sys.exit(main())
