"""`torch.distributed` through a parameter store: importing this registers the backend "smlt"."""

from __future__ import annotations

import torch.distributed as dist

from smlt.torch.backend import group_communicator, make_process_group
from smlt.torch.hooks import HookState, bf16_hook, compress_hook, fp16_hook
from smlt.torch.process_group import ProcessGroup

__all__ = ["HookState", "ProcessGroup", "bf16_hook", "compress_hook", "fp16_hook", "group_communicator"]

if not dist.is_backend_available("smlt"):
    dist.Backend.register_backend("smlt", make_process_group, extended_api=True, devices=["cpu"])
