"""`torch.distributed` through a parameter store: importing this registers the backend "smlt"."""

from __future__ import annotations

import torch.distributed as dist

from smlt.torch.backend import group_communicator, make_process_group
from smlt.torch.process_group import ProcessGroup

__all__ = ["ProcessGroup", "group_communicator"]

if not dist.is_backend_available("smlt"):
    dist.Backend.register_backend("smlt", make_process_group, extended_api=True, devices=["cpu"])
