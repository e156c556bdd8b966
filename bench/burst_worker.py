"""A worker of a checkout that is compared with another: a process of that checkout's package, and all-reduces when it is told.

    python bench/burst_worker.py RANK N FLOATS URL JOB

A line on stdin, a number, starts so many all-reduces; a line on stdout tells the seconds of each. `BurstWorker` runs it with
one package in its way or another: the file itself imports nothing of ours but `smlt`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


class BurstWorker:
    """The process. `package`: the folder that holds `smlt`, with its extension built. `python`: who runs it."""

    def __init__(self, package: Path, rank: int, n: int, floats: int, url: str, job: str, python: Path | None = None) -> None:
        self.package = package
        self.process = subprocess.Popen(
            [str(python or sys.executable), "-P", __file__, *map(str, (rank, n, floats)), url, job],
            cwd=package,
            env={**os.environ, "PYTHONPATH": str(package)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        """Wait until it has met the others."""
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"a worker of {self.package} did not start")

    def start(self, times: int) -> None:
        """Let it begin so many all-reduces."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()

    def seconds(self) -> list[float]:
        """What each of them took."""
        assert self.process.stdout is not None
        return [float(one) for one in self.process.stdout.readline().split()]

    def close(self) -> None:
        self.process.communicate(timeout=60)


def main() -> None:
    import numpy as np

    import smlt

    rank, n, floats = map(int, sys.argv[1:4])
    comm = smlt.Communicator(sys.argv[4], job=sys.argv[5], rank=rank, world_size=n)
    x = np.random.default_rng(rank).standard_normal(floats, dtype=np.float32)
    out = np.empty_like(x)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            comm.allreduce(x, out=out)
            seconds.append(time.perf_counter() - began)
        print(*seconds, flush=True)
    comm.close()


if __name__ == "__main__":
    main()
