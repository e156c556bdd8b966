"""The drop-in: one communicator for the process, for handlers and scripts that want no object.

smlt.init(event)                  # or from arguments, or from SMLT_* environment variables
gradient = smlt.allreduce(gradient)
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from smlt.collective.call_queue import QueuedWork
from smlt.collective.communicator import Communicator
from smlt.collective.feedback import ErrorFeedback
from smlt.collective.work import Work
from smlt.errors import CollectiveError, ConfigError
from smlt.store.secrets import resolve_store_url

if TYPE_CHECKING:
    from smlt.collective.two_level import AnyCommunicator

_current: AnyCommunicator | None = None
_asked: dict[str, Any] = {}  # what it was joined by

_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "store": str,
    "job": str,
    "rank": int,
    "world_size": int,
    "generation": int,
    "timeout_s": float,
    "codec": str,
}
#: Of workers that share machines (`smlt.collective.two_level`).
_MACHINE_SETTINGS = {"local_rank": int, "local_size": int, "machine": int, "machines": int}
_SETTINGS |= _MACHINE_SETTINGS
#: What torchrun calls them.
_TORCHRUN = {
    "rank": "RANK",
    "world_size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_size": "LOCAL_WORLD_SIZE",
    "machine": "GROUP_RANK",
    "machines": "GROUP_WORLD_SIZE",
}


def _setting(name: str, value: Any) -> Any:
    try:
        return _SETTINGS[name](value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} {value!r} is not {'a number' if _SETTINGS[name] is not str else 'text'}") from error


def init(event: Mapping[str, Any] | None = None, *, two_level: bool | None = None, **settings: Any) -> AnyCommunicator:
    """Join a job; `allreduce` and the others then work on it.

    Each of store, job, rank, world_size, generation, timeout_s and codec (see `Communicator`) is taken from the keyword
    arguments, else from `event["smlt"]` (a Lambda event), else from SMLT_STORE, SMLT_JOB, SMLT_RANK, SMLT_WORLD_SIZE,
    SMLT_GENERATION, SMLT_TIMEOUT_S and SMLT_CODEC, else it is the communicator's default. With nothing given this is a
    job of one worker. The store's URL may leave the password to a file, a variable or a secret manager, and may itself
    be in the file SMLT_STORE_FILE (see `smlt.store.secrets`). Whoever can choose `event["smlt"]["store"]` chooses where
    this worker's password goes: take the store from the environment when events come from strangers.

    Workers that share a machine reduce among themselves in shared memory first when they are given local_rank and
    local_size, and, where these do not tell, machine and machines (see `smlt.collective.two_level.TwoLevelCommunicator`), in
    the same ways. With `two_level` (SMLT_TWO_LEVEL=1) what is not given is taken from the variables of torchrun: RANK,
    WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, GROUP_WORLD_SIZE.

    A job joined before is left first, unless it is this very one, which is kept: a warm Lambda sandbox stays connected.
    Raises ConfigError for values that cannot work, and what `Communicator` raises.
    """
    global _current, _asked
    unknown = set(settings) - set(_SETTINGS)
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}; known: {', '.join(_SETTINGS)}")
    part = event.get("smlt", {}) if isinstance(event, Mapping) else {}
    if not isinstance(part, Mapping):
        raise ConfigError('event["smlt"] must be an object with store, job, rank and world_size')
    if two_level is None:
        two_level = os.environ.get("SMLT_TWO_LEVEL", "0") not in ("", "0")
    chosen = {}
    for name in _SETTINGS:
        elsewhere = os.environ.get(_TORCHRUN[name]) if two_level and name in _TORCHRUN else None
        for value in (settings.get(name), part.get(name), os.environ.get(f"SMLT_{name.upper()}"), elsewhere):
            if value is not None and value != "":
                chosen[name] = _setting(name, value)
                break
    store = resolve_store_url(chosen.get("store"))
    if store is not None:
        chosen["store"] = store
    if isinstance(event, Mapping) and "smlt" not in event and "world_size" not in chosen:
        raise ConfigError('the event has no "smlt" with store, job, rank and world_size, and SMLT_WORLD_SIZE is not set either')
    if _current is not None:
        if _asked == chosen and _current.usable:
            return _current
        finalize()
    _asked = dict(chosen)
    _current = _join(chosen, two_level)
    return _current


def _join(chosen: dict[str, Any], two_level: bool) -> AnyCommunicator:
    url, worker_id = chosen.pop("store", None), uuid.uuid4().hex
    given = sorted(set(chosen) & set(_MACHINE_SETTINGS))
    if not given and not two_level:
        return Communicator(url, worker_id=worker_id, **chosen)
    lacking = sorted({"rank", "world_size", "local_rank", "local_size"} - set(chosen))
    if lacking:
        raise ConfigError(
            f"{'two_level' if two_level else ' and '.join(given)} needs {' and '.join(lacking)} as well: give them, or set "
            f"{' and '.join(f'SMLT_{name.upper()}' for name in lacking)}"
        )
    from smlt.collective.two_level import TwoLevelCommunicator  # others do not pay for it

    return TwoLevelCommunicator(url, worker_id=worker_id, **chosen)


def finalize() -> None:
    """Leave the job joined by `init`. Done at exit as well."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def _communicator() -> AnyCommunicator:
    """The process's communicator; joined from the environment when SMLT_WORLD_SIZE is there and `init` was not called."""
    if _current is None:
        if "SMLT_WORLD_SIZE" not in os.environ:
            raise CollectiveError(
                "this process has joined no job: call smlt.init(store=…, job=…, rank=…, world_size=…), or start it with "
                "`smlt launch`"
            )
        return init()
    return _current


def current() -> AnyCommunicator:
    """The communicator that the functions here work on. CollectiveError when the process has joined no job."""
    return _communicator()


def allreduce(
    x: Any,
    op: str = "mean",
    codec: str | Mapping[str, str] | None = None,
    out: Any = None,
    feedback: ErrorFeedback | None = None,
) -> Any:
    """Reduce `x` (array, tensor, number, or nested dict/list/tuple) over all workers: op "mean", "sum", "min" or "max".

    Integer arrays keep their dtype: their mean is rounded to nearest. All about it: `help(smlt.Communicator.allreduce)`.
    """
    return _communicator().allreduce(x, op, codec, out, feedback)


def allreduce_async(
    x: Any,
    op: str = "mean",
    codec: str | Mapping[str, str] | None = None,
    out: Any = None,
    feedback: ErrorFeedback | None = None,
) -> Work | QueuedWork:
    """Begin an all-reduce and return its handle at once: see `Communicator.allreduce_async`."""
    return _communicator().allreduce_async(x, op, codec, out, feedback)


def broadcast(x: Any, root: int = 0, out: Any = None) -> Any:
    """Send rank `root`'s `x` to all workers: see `Communicator.broadcast`."""
    return _communicator().broadcast(x, root, out)


def allgather(x: Any) -> Any:
    """Gather `x` of all workers, stacked by rank: see `Communicator.allgather`."""
    return _communicator().allgather(x)


def barrier() -> None:
    """Wait for all workers: see `Communicator.barrier`."""
    _communicator().barrier()


def rank() -> int:
    """This worker's number, from 0."""
    return _communicator().rank


def world_size() -> int:
    """How many workers the job has."""
    return _communicator().world_size
