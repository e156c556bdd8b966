"""SMLT: train models on serverless workers, averaging gradients through a Redis or Valkey store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smlt._version import __version__

if TYPE_CHECKING:
    from smlt.collective.api import allgather, allreduce, allreduce_async, barrier, broadcast, finalize, init, rank, world_size
    from smlt.collective.communicator import Communicator
    from smlt.collective.feedback import ErrorFeedback
    from smlt.collective.two_level import TwoLevelCommunicator
    from smlt.collective.work import Work
    from smlt.worker.shards import open_shards
    from smlt.worker.task import Task

# A name here is imported when it is first used: a cold start pays for what it touches.
_HOME = {
    "Communicator": "smlt.collective.communicator",
    "ErrorFeedback": "smlt.collective.feedback",
    "Task": "smlt.worker.task",
    "TwoLevelCommunicator": "smlt.collective.two_level",
    "Work": "smlt.collective.work",
    "allgather": "smlt.collective.api",
    "allreduce": "smlt.collective.api",
    "allreduce_async": "smlt.collective.api",
    "barrier": "smlt.collective.api",
    "broadcast": "smlt.collective.api",
    "finalize": "smlt.collective.api",
    "init": "smlt.collective.api",
    "open_shards": "smlt.worker.shards",
    "rank": "smlt.collective.api",
    "world_size": "smlt.collective.api",
}

__all__ = [
    "Communicator",
    "ErrorFeedback",
    "Task",
    "TwoLevelCommunicator",
    "Work",
    "__version__",
    "allgather",
    "allreduce",
    "allreduce_async",
    "barrier",
    "broadcast",
    "finalize",
    "init",
    "open_shards",
    "rank",
    "world_size",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smlt' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
