"""The all-reduces that `bench.compare` measures: SMLT, and what others do or would do.

A peer is a context manager: it connects, then yields a function that does one all-reduce (the mean) of the place's gradient
and returns it, float32. Peers that go through the store delete their keys as they go, as SMLT does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import redis

from bench.limit import raw_limit
from smlt import Communicator
from smlt.collective.codecs import CODECS

Floats = npt.NDArray[np.float32]
POLL_S = 0.0005


@dataclass(frozen=True)
class Place:
    """Where a peer runs: worker `rank` of `n`; the store as seen from there; a folder and an interface to reach the others."""

    rank: int
    n: int
    gradient: Floats
    url: str
    folder: Path
    interface: str


@dataclass(frozen=True)
class Peer:
    """`open` as above. `tolerance`: how far a result may be from NumPy's, None for no result at all."""

    open: Callable[[Place], AbstractContextManager[Callable[[], Floats | None]]]
    tolerance: float | None
    missing: Callable[[], str] = lambda: ""  # why it cannot run here


@contextmanager
def smlt_peer(place: Place, codec: str) -> Iterator[Callable[[], Floats]]:
    """SMLT's own, into an array that is there already."""
    out = np.empty_like(place.gradient)
    with Communicator(place.url, job=f"compare-{codec}", rank=place.rank, world_size=place.n) as comm:
        yield lambda: comm.allreduce(place.gradient, codec=codec, out=out)


@contextmanager
def redis_py(place: Place, wire: npt.DTypeLike) -> Iterator[Callable[[], Floats]]:
    """What an expert writes with redis-py, hiredis and NumPy: shards with MSET, MGET and a short poll."""
    client, rank, n, gradient = redis.Redis.from_url(place.url), place.rank, place.n, place.gradient
    cut, steps, prefix = _cut(gradient.size, n), count(), f"redis-py:{np.dtype(wire).name}:"

    def allreduce() -> Floats:
        step = next(steps)
        coded: npt.NDArray[Any] = gradient.astype(wire, copy=False)
        client.mset({f"{prefix}{step}:s:{rank}:{i}": coded[cut[i] : cut[i + 1]].tobytes() for i in range(n)})
        total = np.zeros(cut[rank + 1] - cut[rank], np.float32)
        shards = [f"{prefix}{step}:s:{j}:{rank}" for j in range(n)]
        for value in _when_there(client, shards):
            total += np.frombuffer(value, wire)
        client.set(f"{prefix}{step}:a:{rank}", (total / n).astype(wire).tobytes())
        client.delete(*shards)
        if step > 1:
            client.delete(f"{prefix}{step - 2}:a:{rank}")
        result = np.empty(gradient.size, np.float32)
        for i, value in enumerate(_when_there(client, [f"{prefix}{step}:a:{i}" for i in range(n)])):
            result[cut[i] : cut[i + 1]] = np.frombuffer(value, wire)
        return result

    yield allreduce


@contextmanager
def lambdaml(place: Place) -> Iterator[Callable[[], Floats]]:
    """LambdaML's ScatterReduce over Redis, float32.

    From Jiang et al., Towards Demystifying Serverless Machine Learning Training, SIGMOD 2021, section 3.2. A worker
    writes every partition but its own to a bucket, one after the other; lists the bucket until the others' parts of its
    own partition are there; adds each; writes the merged partition to a second bucket; lists that until all are there,
    reads and concatenates. A bucket is a hash. Listing goes on without a pause, as in the authors' program.
    """
    client, rank, n, gradient = redis.Redis.from_url(place.url), place.rank, place.n, place.gradient
    cut, steps = _cut(gradient.size, n), count()

    def allreduce() -> Floats:
        step = next(steps)
        parts, merged = f"lambdaml:{step}:parts", f"lambdaml:{step}:merged"
        for i in range(n):
            if i != rank:
                client.hset(parts, f"{i}_{rank}", gradient[cut[i] : cut[i + 1]].tobytes())
        mine = gradient[cut[rank] : cut[rank + 1]]
        for field in _as_listed(client, parts, {f"{rank}_{j}" for j in range(n) if j != rank}):
            value: Any = client.hget(parts, field)
            mine = mine + np.frombuffer(value, np.float32)
            client.hdel(parts, field)
        mine = mine / np.float32(n)
        client.hset(merged, str(rank), mine.tobytes())
        pieces = {rank: mine}
        for field in _as_listed(client, merged, {str(j) for j in range(n) if j != rank}):
            value = client.hget(merged, field)
            pieces[int(field)] = np.frombuffer(value, np.float32)
        if rank == 0:  # everybody has written there by now, so nobody reads what is older
            client.delete(f"lambdaml:{step - 1}:merged")
        return np.concatenate([pieces[i] for i in range(n)])

    yield allreduce


@contextmanager
def central(place: Place) -> Iterator[Callable[[], Floats]]:
    """One worker aggregates, as in Siren (Wang et al., INFOCOM 2019) and Cirrus (Carreira et al., SoCC 2019).

    redis-py, float32. Everybody uploads the whole gradient, rank 0 adds them up and uploads the mean, everybody downloads
    it. Rank 0's own gradient stays where it is.
    """
    client, rank, n, gradient = redis.Redis.from_url(place.url), place.rank, place.n, place.gradient
    steps = count()

    def allreduce() -> Floats:
        step = next(steps)
        mean = f"central:{step}:mean"
        if rank == 0:
            total = gradient.copy()
            for key in (f"central:{step}:{j}" for j in range(1, n)):
                total += np.frombuffer(_when_there(client, [key])[0], np.float32)
                client.delete(key)
            total /= n
            client.set(mean, total.tobytes())
            client.delete(f"central:{step - 1}:mean")
            return total
        client.set(f"central:{step}:{rank}", gradient.tobytes())
        return np.frombuffer(_when_there(client, [mean])[0], np.float32)

    yield allreduce


@contextmanager
def gloo(place: Place) -> Iterator[Callable[[], Floats]]:
    """torch.distributed's gloo, float32, over TCP from worker to worker: what serverless functions cannot do."""
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = place.interface
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place.folder}/gloo", rank=place.rank, world_size=place.n)
    tensor = torch.from_numpy(place.gradient.copy())

    def allreduce() -> Floats:
        dist.all_reduce(tensor)  # in place: from the second time on it is the mean of equal means
        tensor.div_(place.n)
        result: Floats = tensor.numpy()
        return result

    try:
        yield allreduce
        dist.barrier()
    finally:
        dist.destroy_process_group()


def gloo_missing() -> str:
    """Why gloo cannot be measured here. Imports PyTorch, so that workers forked later need not."""
    try:
        import torch.distributed as dist
    except ImportError:
        return "PyTorch is not installed"
    return "" if dist.is_available() and dist.is_gloo_available() else "this PyTorch has no gloo"


def all_peers(codecs: Sequence[str] = tuple(CODECS)) -> dict[str, Peer]:
    """The peers by name; SMLT with each of `codecs`."""
    tolerance = {"fp32": 1e-5, "fp16": 5e-3}
    return {
        "redis-py float32": Peer(partial(redis_py, wire=np.float32), 1e-5),
        "redis-py float16": Peer(partial(redis_py, wire=np.float16), 5e-3),
        "lambdaml float32": Peer(lambdaml, 1e-5),
        "central float32": Peer(central, 1e-5),
        "gloo float32": Peer(gloo, 1e-5, gloo_missing),
        **{f"smlt {codec}": Peer(partial(smlt_peer, codec=codec), tolerance.get(codec, 0.1)) for codec in codecs},
        "raw limit": Peer(lambda place: raw_limit(place.url, place.rank, place.n, place.gradient.size), None),
    }


def _cut(size: int, n: int) -> list[int]:
    return [size * i // n for i in range(n + 1)]


def _when_there(client: redis.Redis, keys: list[str]) -> list[bytes]:
    found: dict[str, bytes] = {}
    while True:
        missing = [key for key in keys if key not in found]
        if not missing:
            return [found[key] for key in keys]
        values: Any = client.mget(missing)
        found.update({key: value for key, value in zip(missing, values, strict=True) if value is not None})
        if len(found) < len(keys):
            time.sleep(POLL_S)


def _as_listed(client: redis.Redis, bucket: str, wanted: set[str]) -> Iterator[str]:
    """The wanted fields, as they come to be listed."""
    while wanted:
        listed: Any = client.hkeys(bucket)
        for field in sorted(wanted.intersection(name.decode() for name in listed)):
            yield field
            wanted.remove(field)
