"""Workers as processes of their own, with the environment that a launcher would give them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore

FOLDER = Path(__file__).parent
#: Variables of whoever runs the tests that would change what they mean.
_NOT_OURS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass
class Ended:
    """How a worker has ended."""

    code: int
    out: str
    err: str


def environment(**variables: Any) -> dict[str, str]:
    """A worker's environment: ours without what a launcher would set, and `variables`."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_OURS and not name.startswith("SMLT_")}
    kept |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return kept | {name: str(value) for name, value in variables.items()}


def start(arguments: list[str], **variables: Any) -> subprocess.Popen[str]:
    """A worker: `python arguments`."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(world_size: int, arguments: list[str], **variables: Any) -> list[subprocess.Popen[str]]:
    """A worker for each rank, told by RANK and WORLD_SIZE."""
    return [start(arguments, RANK=rank, WORLD_SIZE=world_size, **variables) for rank in range(world_size)]


def wait_all(workers: list[subprocess.Popen[str]], timeout_s: float = 90) -> list[Ended]:
    """How they ended; those that have not in time are killed, and the test fails."""
    deadline, ended = time.monotonic() + timeout_s, []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ended.append(Ended(worker.returncode, out, err))
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.communicate()
    return ended


def run_all(world_size: int, script: str, *arguments: Any, timeout_s: float = 90, **variables: Any) -> list[Ended]:
    """Run a script's text in a worker for each rank, to the end."""
    return wait_all(start_all(world_size, ["-c", script, *map(str, arguments)], **variables), timeout_s)


def keys_left(store: EmbeddedStore, job: str) -> list[str]:
    """The keys of all that has met under a name that begins with `job`."""
    parameters = ParameterStore(store.url, job=job)
    try:
        return sorted(key.decode() for key in parameters.client.scan_iter(match=f"smlt:{{{job}*"))
    finally:
        parameters.close()
