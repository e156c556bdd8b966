"""`torch.distributed` through a parameter store: importing this registers the backend "smlt".

>>> import torch.distributed as dist
>>> import smlt.torch
>>> dist.init_process_group("smlt", init_method="redis://store:6379", rank=0, world_size=2)  # doctest: +SKIP
"""

from __future__ import annotations

try:
    import torch.distributed as dist
except ImportError as error:
    from smlt.errors import ConfigError

    raise ConfigError("smlt.torch needs PyTorch: pip install 'smlt[torch]'") from error

from smlt.torch.backend import group_communicator, make_process_group
from smlt.torch.hooks import HookState, bf16_hook, compress_hook, fp16_hook
from smlt.torch.options import Options
from smlt.torch.process_group import ProcessGroup
from smlt.torch.rendezvous import register
from smlt.torch.store import Store
from smlt.torch.two_level import two_level_hook

__all__ = [
    "HookState",
    "Options",
    "ProcessGroup",
    "Store",
    "bf16_hook",
    "compress_hook",
    "fp16_hook",
    "group_communicator",
    "two_level_hook",
]

if not dist.is_available():
    from smlt.errors import ConfigError

    raise ConfigError("this build of PyTorch has no torch.distributed")
if not dist.is_backend_available("smlt"):
    dist.Backend.register_backend("smlt", make_process_group, extended_api=True, devices=["cpu"])
register()
