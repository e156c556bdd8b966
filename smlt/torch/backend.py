"""From what torch.distributed knows of a group to its communicator: where the store is, and under which name to meet."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import weakref
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch._C._distributed_c10d import Store as C10dStore
from torch.distributed.constants import default_pg_timeout

from smlt.collective.communicator import Communicator
from smlt.errors import ConfigError, SmltError, StoreError
from smlt.store.secrets import resolve_store_url
from smlt.torch.errors import as_torch
from smlt.torch.options import Options
from smlt.torch.process_group import ProcessGroup
from smlt.torch.rendezvous import JOB_LETTERS_MAX, job_name
from smlt.torch.store import Store

_groups: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


def group_communicator(group: dist.ProcessGroup | None = None) -> Communicator:
    """The communicator of a process group of the backend "smlt", by default the whole world's.

    Its collectives and the group's are numbered together, in the order of the calls: call `allreduce_async` with a codec
    and error feedback of your own, in the same order on all workers, as a DDP communication hook does.
    ConfigError for a group of another backend.

    >>> work = group_communicator().allreduce_async(bucket, codec="int8", out=bucket, feedback=feedback)  # doctest: +SKIP
    """
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, ProcessGroup):
        raise ConfigError(f'the group {found} is not of the backend "smlt": init_process_group("smlt", ...) makes one')
    return found.communicator


def make_process_group(options: Any, chosen: Any = None) -> ProcessGroup:
    """For `torch.distributed`: a group of the backend "smlt". `options` are c10d's, `chosen` is `pg_options`."""
    if chosen is not None and not isinstance(chosen, Options):
        raise ConfigError(f"pg_options is a {type(chosen).__name__}; the backend takes smlt.torch.Options")
    world = dist.group.WORLD
    settings = chosen or getattr(world, "options", None) or Options()
    try:
        return _made(options, settings)
    except SmltError as error:
        raise as_torch(error) from error


def _made(options: Any, settings: Options) -> ProcessGroup:
    rank, size = options.group_rank, options.group_size
    found = options.store
    while isinstance(found, PrefixStore):
        found = found.underlying_store
    own = found if isinstance(found, Store) else None
    is_world = not options.global_ranks_in_group
    if own is not None and is_world:
        own.join()

    def leave() -> None:
        if own is not None and is_world:
            with contextlib.suppress(StoreError):  # the store is gone: everything there has a TTL
                own.leave()
            own.close()

    try:
        communicator = Communicator(
            _store_url(settings, own) if size > 1 else None,
            job=_agreed_name(options.store, rank, own),
            rank=rank,
            world_size=size,
            timeout_s=_timeout_s(options.timeout),
            codec=settings.codec,
            algorithm=settings.algorithm,
            chunk_bytes=settings.chunk_bytes,
            tuning=settings.tuning,
        )
    except BaseException:
        leave()
        raise
    group = ProcessGroup(communicator, settings, leave, options.group_id)
    _groups.add(group)
    return group


def _store_url(settings: Options, own: Store | None) -> str:
    url = settings.store or (own.url if own is not None else None)
    found = resolve_store_url(url or os.environ.get("SMLT_STORE") or None)
    if found is None:
        raise ConfigError(
            'the backend "smlt" needs a parameter store: set SMLT_STORE to its URL (redis://host:6379) for all workers, or '
            'give it as init_method, or as pg_options=smlt.torch.Options(store="redis://...")'
        )
    return found


def _agreed_name(store: C10dStore, rank: int, own: Store | None) -> str:
    """A name that no other group has: rank 0 makes it up, and tells the others through the rendezvous' store.

    A store may see the same group made, destroyed and made again: each worker counts which time this is.
    """
    turn = store.add(f"smlt-turn-{rank}", 1)
    key = f"smlt-job-{turn}"
    if rank == 0:
        base = own.job if own is not None else job_name()
        store.set(key, f"{base[: JOB_LETTERS_MAX + 9]}-{secrets.token_hex(4)}")
    return bytes(store.get(key)).decode()


def _timeout_s(given: Any) -> float:
    """torch.distributed's timeout; SMLT_TIMEOUT_S where that is the default, which cannot be told from none."""
    chosen = os.environ.get("SMLT_TIMEOUT_S")
    if given == default_pg_timeout and chosen:
        try:
            return float(chosen)
        except ValueError:
            raise ConfigError(f"SMLT_TIMEOUT_S {chosen!r} is not a number of seconds") from None
    return float(given.total_seconds())


@atexit.register
def _leave_all() -> None:
    """For scripts that do not call destroy_process_group."""
    for group in list(_groups):
        group.leave_at_exit()
