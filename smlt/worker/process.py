"""A worker's process, for whoever starts it: its command and its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import smlt
from smlt.store.secrets import without_store_secrets
from smlt.worker.processors import VARIABLES

#: To the command: end at once when stdin closes. Without it a worker whose stdin closes has lost its scheduler, and asks all
#: others to stop with it at a checkpoint.
END_WITH_STDIN = "--end-with-stdin"


def worker_command(*options: str) -> list[str]:
    """What starts a worker that reads its WorkerConfig, one line of JSON, from stdin."""
    return [sys.executable, "-m", "smlt.worker.main", *options]


def worker_environment(threads: int) -> dict[str, str]:
    """For a worker that computes with so many threads. It has the store's URL from its configuration."""
    return {
        **without_store_secrets(os.environ),
        **dict.fromkeys(VARIABLES, str(threads)),  # workers that share cores: none of them may take all
        "PYTHONUNBUFFERED": "1",
        **this_package(),
    }


def this_package() -> dict[str, str]:
    """The environment in which a child process finds this very package, installed or not."""
    folder = Path(smlt.__file__).parents[1]
    if folder.name in ("site-packages", "dist-packages"):
        return {}  # it is found anyway, and must not come before the standard library
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
