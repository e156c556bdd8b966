"""The backend "smlt": a process group whose collectives go through the parameter store."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from smlt.collective.communicator import Communicator
from smlt.errors import ConfigError
from smlt.torch import movements, reductions
from smlt.torch.issue import Call, Issuer
from smlt.torch.options import Options
from smlt.torch.point_to_point import PointToPoint
from smlt.torch.reductions import Reduction
from smlt.torch.work import CollectiveWork, MessageWork

Tensors = list[torch.Tensor]


def _timeout_s(given: Any) -> float | None:
    """A timeout of c10d's in seconds; None when it is not set."""
    seconds = given.total_seconds() if isinstance(given, timedelta) else 0.0
    return seconds if seconds > 0 else None


def _call(name: str, opts: Any, timeout: timedelta | None = None) -> Call:
    asynchronous = bool(getattr(opts, "asyncOp", True))  # older releases do not say
    return Call(name, asynchronous, _timeout_s(timeout if timeout is not None else getattr(opts, "timeout", None)))


def _reduction(opts: Any) -> Reduction:
    return Reduction(dist.ReduceOp.SUM if opts is None else getattr(opts, "reduceOp", opts))


def _root(opts: Any) -> int:
    return int(opts) if isinstance(opts, int) else int(getattr(opts, "rootRank", 0))


def _listed(tensors: Any) -> Tensors:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


class ProcessGroup(dist.ProcessGroup):
    """The workers of a group, as torch.distributed sees them.

    Made by `torch.distributed.init_process_group("smlt", ...)` and `new_group`, not by hand. `communicator` is SMLT's own
    face of the same group; collectives of both are numbered in the order of the calls, from whichever threads, which must
    be the same on all workers. The methods are those of `torch.distributed.ProcessGroup`; call them through
    `torch.distributed.all_reduce` and the others. They raise ConfigError for tensors that cannot be sent, and what
    `Communicator.allreduce` raises, each of which is a `torch.distributed.DistBackendError` too.
    """

    def __init__(self, communicator: Communicator, options: Options, on_shutdown: Callable[[], None], name: str = "") -> None:
        super().__init__(communicator.rank, communicator.world_size)  # type: ignore[call-arg]  # the stub lacks it
        self.communicator, self.options = communicator, options
        self._name, self._description = name, ""
        self._issuer = Issuer(communicator)
        self._messages = PointToPoint(communicator)
        self._on_shutdown: Callable[[], None] | None = on_shutdown
        self._pid = os.getpid()

    def getBackendName(self) -> str:  # noqa: N802
        """The backend's name."""
        return "smlt"

    # Without a backend below it the C++ side knows no names.

    def getGroupName(self) -> str:  # noqa: N802
        """The name that torch.distributed has given the group."""
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """Give it another."""
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802
        """What the group is for, in words."""
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        """Say what it is for."""
        self._description = description

    @property
    def group_name(self) -> Any:
        """The name that torch.distributed has given the group."""
        return self._name

    @property
    def group_desc(self) -> str:
        """What the group is for, in words."""
        return self._description

    # ---- reductions ----

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> CollectiveWork:
        """Reduce in place."""
        call = _call("all_reduce", opts, timeout)
        return reductions.all_reduce(self._issuer, call, _listed(tensors), _reduction(opts), self.options.codec)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> CollectiveWork:
        """Reduce several tensors in place, in one collective."""
        call = _call("all_reduce_coalesced", opts)
        return reductions.all_reduce(self._issuer, call, list(tensors), _reduction(opts), self.options.codec)

    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: timedelta | None = None) -> CollectiveWork:
        """Reduce in place on one rank."""
        (tensor,) = _listed(tensors)
        reduction = _reduction(op if op is not None else None if isinstance(opts, int) else opts)
        return reductions.reduce(self._issuer, _call("reduce", opts, timeout), tensor, _root(opts), reduction)

    def reduce_scatter(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> CollectiveWork:  # type: ignore[override]
        """Reduce a list of tensors, one for each rank."""
        (output,) = _listed(output_tensors)
        inputs = input_tensors if isinstance(input_tensors[0], torch.Tensor) else input_tensors[0]
        call = _call("reduce_scatter", opts)
        return reductions.reduce_scatter(self._issuer, call, output, list(inputs), _reduction(opts))

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> CollectiveWork:
        """Reduce one tensor, of which each rank receives a part."""
        call = _call("reduce_scatter_tensor", opts)
        parts = _parts(input, self.communicator.world_size, output.numel(), call.name)
        return reductions.reduce_scatter(self._issuer, call, output, parts, _reduction(opts))

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> CollectiveWork:
        """Several of them, one collective each."""
        works = [self.reduce_scatter_single(output, given, opts) for output, given in zip(outputs, inputs, strict=True)]
        return works[-1].with_earlier(works[:-1]) if works else self.barrier(opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    # ---- movements ----

    def broadcast(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> CollectiveWork:
        """Send one rank's tensor to all."""
        (tensor,) = _listed(tensors)
        return movements.broadcast(self._issuer, _call("broadcast", opts, timeout), tensor, _root(opts))

    def allgather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> CollectiveWork:
        """Gather a tensor of each rank on all, in a list."""
        outputs = [output_tensors] if isinstance(output_tensors[0], torch.Tensor) else list(output_tensors)
        return movements.all_gather(self._issuer, _call("all_gather", opts), outputs, _listed(input_tensors))

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> CollectiveWork:
        """Gather a tensor of each rank on all, in one tensor."""
        return movements.all_gather_single(self._issuer, _call("all_gather_into_tensor", opts), output, input)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> CollectiveWork:
        """Several of them, in one collective."""
        call, size = _call("all_gather_into_tensor", opts), self.communicator.world_size
        lists = [_parts(output, size, given.numel(), call.name) for output, given in zip(outputs, inputs, strict=True)]
        return movements.all_gather(self._issuer, call, lists, list(inputs))

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]

    def allgather_coalesced(self, output_lists: list[Tensors], input_list: Tensors, opts: Any = None) -> CollectiveWork:
        """Gather several tensors of each rank on all, in one collective. `output_lists` are by rank."""
        by_tensor = [list(tensors) for tensors in zip(*output_lists, strict=True)]
        return movements.all_gather(self._issuer, _call("all_gather_coalesced", opts), by_tensor, list(input_list))

    def gather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> CollectiveWork:  # type: ignore[override]
        """Gather a tensor of each rank on one."""
        (mine,) = _listed(input_tensors)
        outputs = list(output_tensors[0]) if output_tensors else []
        return movements.gather(self._issuer, _call("gather", opts), outputs, mine, _root(opts))

    def scatter(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> CollectiveWork:  # type: ignore[override]
        """Send a tensor of one rank's list to each."""
        (output,) = _listed(output_tensors)
        inputs = list(input_tensors[0]) if input_tensors else []
        return movements.scatter(self._issuer, _call("scatter", opts), output, inputs, _root(opts))

    def alltoall(self, output_tensors: Tensors, input_tensors: Tensors, opts: Any = None) -> CollectiveWork:
        """Send a tensor of each rank's list to each."""
        return movements.all_to_all(self._issuer, _call("all_to_all", opts), list(output_tensors), list(input_tensors))

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = None,
    ) -> CollectiveWork:
        """Send a part of each rank's tensor to each, cut along the first dimension; without sizes in equal parts."""
        call = _call("all_to_all_single", opts)
        even = not output_split_sizes and not input_split_sizes
        outputs, give = _cut(output, output_split_sizes, self.communicator.world_size, call.name, "output")
        inputs, _ = _cut(input, input_split_sizes, self.communicator.world_size, call.name, "input")
        work = movements.all_to_all(self._issuer, call, outputs, inputs, even=even)
        return work if give is None else work.then(give, [output])

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    # ---- messages ----

    def send(self, tensors: Tensors, dst_rank: int, tag: int) -> CollectiveWork:
        """Send a tensor to one rank; the handle is done when the store has it."""
        (tensor,) = _listed(tensors)
        return self._message(self._messages.send(tensor, dst_rank, tag), tensor, f"send to rank {dst_rank}")

    def recv(self, tensors: Tensors, src_rank: int, tag: int) -> CollectiveWork:
        """Receive a tensor from one rank."""
        (tensor,) = _listed(tensors)
        return self._message(self._messages.receive(tensor, src_rank, tag), tensor, f"recv from rank {src_rank}")

    def recv_anysource(self, tensors: Tensors, tag: int) -> CollectiveWork:
        """Receive a tensor from whoever has sent one with this tag."""
        (tensor,) = _listed(tensors)
        return self._message(self._messages.receive(tensor, None, tag), tensor, "recv from any rank")

    def _message(self, pending: Any, tensor: torch.Tensor, name: str) -> CollectiveWork:
        return MessageWork(pending, [tensor], self._issuer.futures, name)

    # ---- the group ----

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> CollectiveWork:  # type: ignore[override]
        """Wait for everyone."""
        return self._issuer.barrier(_call("barrier", opts, timeout))

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait for everyone, at most `timeout`; WorkerLostError names all ranks that did not come.

        `torch.distributed.monitored_barrier` asks for gloo by name: call this method. All missing ranks are always named,
        `wait_all_ranks` or not, and all who came hear of them.
        """
        call = Call("monitored_barrier", asynchronous=False, timeout_s=_timeout_s(timeout))
        self._issuer.barrier(call).wait()

    def set_timeout(self, timeout: timedelta) -> None:
        """The deadline of collectives that begin from now on."""
        seconds = _timeout_s(timeout)
        if seconds is None:
            raise ConfigError(f"a timeout of {timeout} is not above 0")
        self.communicator.set_timeout(seconds)

    def shutdown(self) -> None:
        """Leave the group: the last worker to leave deletes what is left in the store."""
        if os.getpid() != self._pid:
            return  # the parent's
        self._messages.close()
        self._issuer.close()
        leave, self._on_shutdown = self._on_shutdown, None
        if leave is not None:
            leave()

    def leave_at_exit(self) -> None:
        """The process ends: leave without waiting for anything."""
        if os.getpid() == self._pid and self._on_shutdown is not None:
            self.communicator.close()
            self._on_shutdown()

    def abort(self) -> None:
        """Leave at once: what is under way ends in error."""
        self.communicator.forgo_farewell()
        self.communicator.close()
        self.shutdown()


def _parts(tensor: torch.Tensor, size: int, count: int, what: str) -> Tensors:
    """A tensor in `size` runs of `count` elements each."""
    if tensor.numel() != size * count:
        raise ConfigError(f"{what}: {tensor.numel()} elements are not {size} times {count}")
    if not tensor.is_contiguous():
        raise ConfigError(f"{what}: the large tensor must be contiguous: call .contiguous() first")
    return list(tensor.detach().reshape(size, count).unbind(0))


def _cut(
    tensor: torch.Tensor, sizes: list[int], size: int, what: str, which: str
) -> tuple[Tensors, Callable[[], object] | None]:
    """A tensor in parts along its first dimension; for one that is not contiguous in parts of a copy, and the way back."""
    rows = tensor.size(0) if tensor.dim() else 1
    if not sizes:
        if rows % size:
            raise ConfigError(f"{what}: the {which}'s first dimension, {rows}, cannot be divided by {size} ranks")
        sizes = [rows // size] * size
    if len(sizes) != size or sum(sizes) != rows or min(sizes) < 0:
        raise ConfigError(f"{what}: the {which}'s split sizes {sizes} are not {size} numbers that add up to {rows}")
    plain = tensor.detach()
    whole = plain.contiguous()
    parts = list((whole if whole.dim() else whole.reshape(1)).split(sizes))  # type: ignore[no-untyped-call]
    return parts, None if whole.data_ptr() == plain.data_ptr() else lambda: plain.copy_(whole)
