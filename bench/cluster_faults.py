"""All-reduces on a Valkey Cluster whose slots move and whose primaries die meanwhile: is a result lost, or wrong?

    python -m bench.cluster_faults [--collectives 500] [--seed 0] [--json FILE]

Four workers, processes of their own, reduce on a cluster of three primaries with a replica each. At random moments the slots of
the job's own keys move to another primary and back, key by key (SETSLOT and MIGRATE) and at once (Valkey 9's MIGRATESLOTS),
replicas take over from primaries that are asked to let them, and primaries are killed (SIGKILL) and come back as replicas.
Each result is compared with the mean of the four gradients, computed from their seeds in float64, within fp16's bound; sizes
(one-shot and hierarchical), out-of-place and in-place come of the seed. Ends with status 1 when a collective is lost, a result
wrong, two workers' results differ in a bit, or a key is left.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from smlt import Communicator
from smlt.errors import SmltError, StoreUnavailable
from smlt.store.embedded_cluster import EmbeddedCluster
from smlt.store.parameter import ParameterStore
from smlt.store.slots import slot_of

WORKERS, PRIMARIES, TIMEOUT_S = 4, 3, 60.0
SIZES = (1_000, 100_000, 1_000_000)
JOB = "cluster-faults"
#: fp16 of a value, of its sum in float32, and of the mean once more (docs/codecs.md), beside the largest element.
BOUND = 2.0**-10
#: How often each kind of fault is drawn.
KINDS = {"move keys": 4, "move at once": 4, "fail over": 2, "kill": 1}


def gradient(seed: int, number: int, rank: int, size: int) -> np.ndarray:
    """What `rank` has to give in collective `number`."""
    return np.random.default_rng((seed, number, rank)).standard_normal(size, dtype=np.float32)


def work(url: str, rank: int, seed: int, collectives: int, said: Any) -> None:
    """One worker: all collectives, each compared; tells what it found, and the digest of all results."""
    digest, wrong, seconds = hashlib.sha256(), [], []
    try:
        with Communicator(url, job=JOB, rank=rank, world_size=WORKERS, timeout_s=TIMEOUT_S, chunk_bytes=64 * 1024) as comm:
            for number in range(collectives):
                chance = random.Random(f"{seed}:{number}")
                size, in_place = chance.choice(SIZES), chance.random() < 0.5
                rows = [gradient(seed, number, other, size) for other in range(WORKERS)]
                expected = np.mean(rows, axis=0, dtype=np.float64)
                began = time.monotonic()
                result = comm.allreduce(rows[rank], codec="fp16", out=rows[rank] if in_place else None)
                seconds.append(time.monotonic() - began)
                error = float(np.abs(result - expected).max() / np.abs(rows).max())
                if not error <= BOUND:
                    wrong.append({"collective": number, "error": error})
                digest.update(result.tobytes())
                said.put({"rank": rank, "done": number + 1})
        said.put({"rank": rank, "ended": True, "digest": digest.hexdigest(), "wrong": wrong, "seconds": seconds})
    except SmltError as error:
        said.put(
            {"rank": rank, "ended": True, "failed": f"{type(error).__name__}: {error}", "wrong": wrong, "seconds": seconds}
        )


class Faults:
    """What happens to the cluster, one thing after the other, until it is told to stop."""

    def __init__(self, cluster: EmbeddedCluster, places: list[str], seed: int) -> None:
        self.cluster, self.slots, self.chance = cluster, [slot_of(place) for place in places], random.Random(seed)
        self.happened: Counter[str] = Counter()
        self.failed: list[str] = []
        self.stopping = threading.Event()
        self._do: dict[str, Callable[[], None]] = {
            "move keys": lambda: self._move(self.cluster.migrate),
            "move at once": lambda: self._move(self.cluster.migrate_at_once),
            "fail over": self._fail_over,
            "kill": self._kill,
        }

    def run(self) -> None:
        """Let things happen; at the end every server is there, and the cluster whole."""
        while not self.stopping.wait(self.chance.uniform(0.1, 0.6)):
            kind = self.chance.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                self._do[kind]()
                self.happened[kind] += 1
            except Exception as error:  # the cluster's refusal of a fault is no finding, and told at the end
                self.failed.append(f"{kind}: {type(error).__name__}: {error}")

    def _primaries(self) -> list[int]:
        return sorted({self.cluster.owner(slot) for slot in (0, 8000, 16000)})

    def _move(self, migrate: Callable[[int, int], None]) -> None:
        slot = self.chance.choice(self.slots)
        home = self.cluster.owner(slot)
        others = [number for number in self._primaries() if number != home]
        migrate(slot, self.chance.choice(others))
        time.sleep(self.chance.uniform(0, 0.3))
        migrate(slot, home)

    def _fail_over(self) -> None:
        primary = self.cluster.owner(self.chance.choice(self.slots))
        self.cluster.fail_over(self.cluster.replica_of(primary), force=self.chance.random() < 0.5)
        self.cluster.wait_for_replica(primary)

    def _kill(self) -> None:
        slot = self.chance.choice(self.slots)
        primary = self.cluster.owner(slot)
        self.cluster.replica_of(primary)  # there is one
        self.cluster.nodes[primary].kill()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(StoreUnavailable):
                self.cluster.owner(slot)
                break
            time.sleep(0.05)
        self.cluster.nodes[primary].restart()
        self.cluster.wait_for_replica(primary)


def measure(collectives: int, seed: int) -> dict[str, Any]:
    """Everything, once; returns the row."""
    with EmbeddedCluster(PRIMARIES, 1, memory_bytes=512 << 20, node_timeout_ms=1000) as cluster:
        with contextlib.closing(ParameterStore(cluster.url, job=JOB)) as parameters:
            places = parameters.propose_places()
        context = multiprocessing.get_context("spawn")
        said = context.Queue()
        workers = [
            context.Process(target=work, args=(cluster.url, rank, seed, collectives, said), daemon=True)
            for rank in range(WORKERS)
        ]
        for worker in workers:
            worker.start()
        faults = Faults(cluster, places, seed)
        began = time.monotonic()
        striking = threading.Thread(target=faults.run)
        striking.start()
        try:
            ends = _listen(said)
        finally:
            faults.stopping.set()
            striking.join()
        took = time.monotonic() - began
        for worker in workers:
            worker.join(30)
        with contextlib.closing(ParameterStore(cluster.url, job=JOB)) as parameters:
            left = parameters.count_keys()
            parameters.sweep()
    return _row(ends, faults, collectives, took, left)


def _listen(said: Any) -> dict[int, dict[str, Any]]:
    ends: dict[int, dict[str, Any]] = {}
    told = 0
    while len(ends) < WORKERS:
        row = said.get(timeout=3 * TIMEOUT_S)
        if row.get("ended"):
            ends[row["rank"]] = row
        elif row["rank"] == 0 and row["done"] >= told + 50:
            told = row["done"]
            print(f"{told} collectives", file=sys.stderr, flush=True)
    return ends


def _row(ends: dict[int, dict[str, Any]], faults: Faults, collectives: int, took_s: float, left: int) -> dict[str, Any]:
    seconds = [value for end in ends.values() for value in end["seconds"]]
    return {
        "workers": WORKERS,
        "primaries": PRIMARIES,
        "collectives": collectives,
        "completed": min(len(end["seconds"]) for end in ends.values()),
        "lost": sorted({end["failed"] for end in ends.values() if "failed" in end}),
        "wrong": [row for end in ends.values() for row in end["wrong"]],
        "same_bits": len({end.get("digest") for end in ends.values()}) == 1,
        "keys_left": left,
        "faults": dict(faults.happened),
        "faults_refused": faults.failed,
        "seconds": round(took_s, 1),
        "median_s": round(median(seconds), 4) if seconds else None,
        "longest_s": round(max(seconds), 2) if seconds else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collectives", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the row there too")
    arguments = parser.parse_args()
    row = measure(arguments.collectives, arguments.seed)
    for name, value in row.items():
        print(f"{name:16} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=1) + "\n")
    good = row["completed"] == arguments.collectives and not row["lost"] and not row["wrong"]
    return 0 if good and row["same_bits"] and row["keys_left"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
