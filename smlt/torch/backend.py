"""From what torch.distributed knows of a group to its communicator: where the store is, and under which name to meet."""

from __future__ import annotations

import os
import secrets
from typing import Any

import torch.distributed as dist

from smlt.collective.communicator import Communicator
from smlt.errors import ConfigError, SmltError
from smlt.store.secrets import resolve_store_url
from smlt.torch.errors import as_torch
from smlt.torch.process_group import ProcessGroup


def group_communicator(group: dist.ProcessGroup | None = None) -> Communicator:
    """The communicator of a process group of the backend "smlt", by default the whole world's.

    Its collectives count on with the group's own: call `allreduce_async` with a codec and error feedback of your own, in
    the same order on all workers. ConfigError for a group of another backend.
    """
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, ProcessGroup):
        raise ConfigError(f'the group {found} is not of the backend "smlt": init_process_group("smlt", ...) makes one')
    return found.communicator


def make_process_group(options: Any, chosen: Any = None) -> ProcessGroup:
    """For `torch.distributed`: a group of the backend "smlt"."""
    try:
        rank, size = options.group_rank, options.group_size
        url = resolve_store_url(os.environ.get("SMLT_STORE"))
        if url is None and size > 1:
            raise ConfigError(
                'the backend "smlt" needs a parameter store: set SMLT_STORE to its URL (redis://host:6379) for all workers'
            )
        store = options.store
        turn = store.add(f"smlt-turn-{rank}", 1)
        key = f"smlt-job-{turn}"
        if rank == 0:
            store.set(key, f"{os.environ.get('SMLT_JOB', 'torch')[:48]}-{secrets.token_hex(6)}")
        job = store.get(key).decode()
        communicator = Communicator(
            url, job=job, rank=rank, world_size=size, timeout_s=options.timeout.total_seconds(), codec="fp32"
        )
    except SmltError as error:
        raise as_torch(error) from error
    return ProcessGroup(communicator, options.timeout)
