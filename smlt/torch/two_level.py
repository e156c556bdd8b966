"""A communication hook for DistributedDataParallel on workers that share machines: see `smlt.collective.two_level`.

comm = smlt.init(two_level=True, job="mine", store=url)  # under torchrun
model = DistributedDataParallel(model)  # with a process group of any backend, which the hook does not use
model.register_comm_hook(comm, smlt.torch.two_level_hook)
"""

# Without `from __future__ import annotations`: DistributedDataParallel looks at the hook's.
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket

from smlt.collective.two_level import TwoLevelCommunicator
from smlt.errors import ConfigError, SmltError
from smlt.torch.errors import as_torch

GradientFuture = torch.futures.Future[torch.Tensor]


def two_level_hook(comm: TwoLevelCommunicator, bucket: GradBucket) -> GradientFuture:
    """Average a bucket of gradients within the machine and then between machines; for `register_comm_hook`.

    Gradients travel between machines in the communicator's codec. The bucket's memory is read and written in place, by a
    thread of the communicator's; meanwhile backward goes on. Every worker receives the same bytes.

    Raises ConfigError for a communicator of another kind, and what `TwoLevelCommunicator.allreduce` raises.
    """
    if not isinstance(comm, TwoLevelCommunicator):
        raise ConfigError(
            "two_level_hook needs the communicator of workers that share machines as its state: smlt.init(two_level=True, ...)"
        )
    buffer = bucket.buffer()
    future: Any = torch.futures.Future()  # of a list of one, as the futures of collectives are

    def settle(error: BaseException | None) -> None:
        if error is None:
            future.set_result([buffer])
        else:
            known = as_torch(error, "all_reduce of a bucket (two-level)") if isinstance(error, SmltError) else error
            future.set_exception(known if isinstance(known, Exception) else RuntimeError(repr(known)))

    comm.allreduce_async(buffer, "mean", out=buffer).then(settle)
    then: GradientFuture = future.then(_first)
    return then


def _first(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
    return future.value()[0]
