"""Communication hooks for DistributedDataParallel: gradients travel in fewer bits, and what that loses is made up for.

model = DistributedDataParallel(model)
model.register_comm_hook(None, smlt.torch.fp16_hook)
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket

from smlt.collective.codecs import check_codec
from smlt.collective.feedback import ErrorFeedback
from smlt.errors import CheckpointError, ConfigError, SmltError
from smlt.torch.errors import as_torch
from smlt.torch.process_group import ProcessGroup
from smlt.torch.work import CollectiveWork

GradientFuture = torch.futures.Future[torch.Tensor]

#: Kept in a state_dict, so that another codec's residuals are not taken for one's own.
_CODEC = "codec"


class _Bucket:
    """The layout of one of DDP's buckets, and what its encodings have lost."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.parameters = parameters  # held, so that their ids stay theirs
        self.feedback = ErrorFeedback()

    def holds(self, parameters: list[torch.Tensor]) -> bool:
        return len(parameters) == len(self.parameters) and all(map(_same, parameters, self.parameters))

    def residuals(self) -> dict[int, torch.Tensor]:
        """What each parameter's gradient has lost, flat, by the parameter's id; empty when nothing has been lost yet."""
        state = self.feedback.state_dict()
        if "0" not in state:
            return {}
        parts = torch.split(torch.from_numpy(state["0"]), [parameter.numel() for parameter in self.parameters])
        return {id(parameter): part for parameter, part in zip(self.parameters, parts, strict=True)}


class HookState:
    """The state of `compress_hook`: what to send gradients as, and each worker's error feedback.

    Parameters
    ----------
    codec
        "fp16", "bf16", "int8" or "fp32": see `smlt.collective.codecs`. The same on all workers.
    process_group
        The model's group, of the backend "smlt"; by default the whole world's.
    feedback
        Whether what a gradient loses in a step is added to it in the next (`smlt.ErrorFeedback`). By default with int8
        only: fp16 and bf16 lose less than the noise of a batch. Takes two buffers of the gradients' size.

    One state goes with one model. DDP lays its buckets out anew after the first step, in the order in which the gradients
    came; residuals follow their parameters there.

    >>> state = smlt.torch.HookState("int8")  # doctest: +SKIP
    >>> model.register_comm_hook(state, smlt.torch.compress_hook)  # doctest: +SKIP
    """

    def __init__(
        self, codec: str = "fp16", process_group: dist.ProcessGroup | None = None, feedback: bool | None = None
    ) -> None:
        self.codec = check_codec(codec)
        self.process_group = process_group
        self.feedback = codec == "int8" if feedback is None else feedback
        self._buckets: dict[int, _Bucket] = {}
        self._owed: dict[int, torch.Tensor] = {}  # residuals whose parameters' new buckets have not come by yet
        self._owed_to: list[torch.Tensor] = []  # these parameters, so that their ids stay theirs

    def state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """This worker's residuals by the names of `model`'s parameters, for its checkpoint; each worker has its own.

        `model` is the DistributedDataParallel, or the module in it. Call it between two steps.
        """
        found = dict(self._owed)
        for bucket in self._buckets.values():
            found.update(bucket.residuals())
        named = _module(model).named_parameters()
        residuals = {name: found[id(parameter)].clone() for name, parameter in named if id(parameter) in found}
        return {_CODEC: self.codec, "residuals": residuals}

    def load_state_dict(self, state: Mapping[str, Any], model: torch.nn.Module) -> None:
        """The inverse of `state_dict`, for the same model and codec. CheckpointError when they do not fit."""
        if state[_CODEC] != self.codec:
            raise CheckpointError(
                f"the hook's state is of the codec {state[_CODEC]}, not of {self.codec}: make the HookState with that codec, "
                "or go on without the state"
            )
        parameters = dict(_module(model).named_parameters())
        for name, residual in state["residuals"].items():
            if name not in parameters or parameters[name].numel() != residual.numel():
                raise CheckpointError(f"the hook's state has a residual for {name}, which does not fit this model")
        self._buckets = {}
        self._owe([(parameters[name], residual.reshape(-1)) for name, residual in state["residuals"].items()])

    def _feedback_of(self, bucket: GradBucket) -> ErrorFeedback | None:
        """The bucket's error feedback. When its layout is new, what its gradients are owed is added to them now."""
        if not self.feedback:
            return None
        index, parameters = bucket.index(), bucket.parameters()
        known = self._buckets.get(index)
        if known is None or not known.holds(parameters):
            # Buckets come in the order of their indices: those before are as they were, or have been laid out anew.
            for later in [number for number in self._buckets if number >= index]:
                gone = self._buckets.pop(later)
                lost = gone.residuals()
                self._owe([(parameter, lost[id(parameter)]) for parameter in gone.parameters if lost])
            known = self._buckets[index] = _Bucket(parameters)
            self._repay(bucket.buffer(), parameters)
        return known.feedback

    def _owe(self, residuals: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._owed.update({id(parameter): residual for parameter, residual in residuals})
        self._owed_to += [parameter for parameter, _ in residuals]

    def _repay(self, buffer: torch.Tensor, parameters: list[torch.Tensor]) -> None:
        at = 0
        for parameter in parameters:
            residual = self._owed.pop(id(parameter), None)
            if residual is not None:
                buffer[at : at + parameter.numel()] += residual
            at += parameter.numel()
        if not self._owed:
            self._owed_to = []


def compress_hook(state: HookState, bucket: GradBucket) -> GradientFuture:
    """Average a bucket of gradients as `state` says; for `DistributedDataParallel.register_comm_hook`.

    The bucket's memory is read and written in place. The future is completed by a thread of the group's, in the order of
    the buckets; meanwhile backward goes on. Every worker receives the same bytes.

    Raises ConfigError for a group that is not of the backend "smlt", and what `smlt.allreduce` raises.
    """
    return _begin(state.process_group, bucket, state.codec, state._feedback_of(bucket))


def fp16_hook(process_group: dist.ProcessGroup | None, bucket: GradBucket) -> GradientFuture:
    """Average gradients that travel as fp16 with a power-of-two scale for each chunk, so that none overflows.

    As `compress_hook`; the hook's state is the process group, or None for the whole world's.

    >>> model.register_comm_hook(None, smlt.torch.fp16_hook)  # doctest: +SKIP
    """
    return _begin(process_group, bucket, "fp16", None)


def bf16_hook(process_group: dist.ProcessGroup | None, bucket: GradBucket) -> GradientFuture:
    """Average gradients that travel as bf16: as `fp16_hook`."""
    return _begin(process_group, bucket, "bf16", None)


def _begin(
    process_group: dist.ProcessGroup | None, bucket: GradBucket, codec: str, feedback: ErrorFeedback | None
) -> GradientFuture:
    group = dist.group.WORLD if process_group is None else process_group
    if not isinstance(group, ProcessGroup):
        raise ConfigError(
            f'smlt.torch\'s hooks need a group of the backend "smlt", not {dist.get_backend(group)}: call '
            'init_process_group("smlt"), or use a hook of torch.distributed.algorithms.ddp_comm_hooks'
        )
    buffer, issuer, name = bucket.buffer(), group._issuer, f"all_reduce of a bucket ({codec})"
    with issuer.in_order:
        try:
            pending = group.communicator.allreduce_async(buffer, "mean", codec, out=buffer, feedback=feedback)
        except SmltError as error:
            raise as_torch(error, name) from error
        work = issuer.hold(CollectiveWork(pending, [buffer], issuer.futures, name), asynchronous=True)
    return work.get_future().then(_first)


def _first(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
    return future.value()[0]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other


def _module(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
