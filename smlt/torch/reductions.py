"""all_reduce, reduce and reduce_scatter: what is added up on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from smlt.collective import _native
from smlt.collective.plan import SegmentType, reduce_plan, reduce_scatter_plan, reduce_to_plan
from smlt.collective.structure import EXACT_ELEMENTS, Signature
from smlt.errors import ConfigError
from smlt.torch.issue import Call, Content, Issuer
from smlt.torch.tensors import (
    HALVES,
    Run,
    added,
    apart,
    check_alike,
    check_tensor,
    describe,
    dtype_name,
    room,
    segment,
    type_of,
)
from smlt.torch.work import CollectiveWork

_OPERATIONS = (
    (dist.ReduceOp.SUM, "sum"),
    (dist.ReduceOp.AVG, "mean"),
    (dist.ReduceOp.MIN, "min"),
    (dist.ReduceOp.MAX, "max"),
    (dist.ReduceOp.PRODUCT, "product"),
    (dist.ReduceOp.BAND, "band"),
    (dist.ReduceOp.BOR, "bor"),
    (dist.ReduceOp.BXOR, "bxor"),
)
#: A sum of booleans says whether any is true, as with NCCL; a product, whether all are.
_OF_BOOLEANS = {"sum": "max", "product": "min"}


class Reduction:
    """A `torch.distributed.ReduceOp` as the native code knows it: `name`, and the `factor` of a PREMUL_SUM."""

    def __init__(self, op: Any) -> None:
        self.factor: Any = None
        for known, name in _OPERATIONS:
            if op == known:
                self.name = name
                return
        if op != dist.ReduceOp.PREMUL_SUM:
            raise ConfigError(f'the backend "smlt" has no reduce operation {op}')
        self.name, self.factor = "sum", getattr(op, "factor", None)
        if self.factor is None:
            raise ConfigError("PREMUL_SUM came without its factor, or this release of PyTorch does not tell it: multiply first")

    def of(self, tensor: torch.Tensor, what: str) -> str:
        """The native operation for a tensor's elements; ConfigError when it has no meaning for them."""
        dtype = tensor.dtype
        bits = self.name in ("band", "bor", "bxor")
        if (bits and (dtype.is_floating_point or dtype.is_complex)) or (dtype.is_complex and self.name not in ("sum", "mean")):
            raise ConfigError(f"{what}: {self.name} has no meaning for {describe(tensor)}")
        if dtype == torch.bool:
            if self.name == "mean":
                raise ConfigError(f"{what}: booleans have no mean; use MAX for any, MIN for all")
            return _OF_BOOLEANS.get(self.name, self.name)
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise ConfigError(f"{what}: {dtype_name(tensor)} cannot be added up; convert it first")
        return self.name

    def read(self, tensor: torch.Tensor) -> Run:
        """A tensor's elements, multiplied by the factor where there is one."""
        if self.factor is None:
            return added(tensor)
        return Run(added(tensor.detach() * self.factor).array)


def _signature(tensors: Sequence[torch.Tensor], types: Sequence[SegmentType]) -> tuple[Signature, ...]:
    """Elements count, shapes do not: gloo and NCCL hold it so."""
    names = [""] if len(tensors) == 1 else [str(index) for index in range(len(tensors))]
    return tuple(
        (name, dtype_name(tensor), (tensor.numel(),), kind.codec)
        for name, tensor, kind in zip(names, tensors, types, strict=True)
    )


def _codec(run: Run, operation: str, chosen: str, tensor: torch.Tensor) -> str:
    """What a run travels as: exact, unless the group was asked for another codec for its sums and means."""
    if operation not in ("sum", "mean", "min", "max"):
        return "fp32"
    if operation in ("sum", "mean") and chosen != "fp32" and tensor.numel() > EXACT_ELEMENTS:
        return chosen if tensor.is_floating_point() or tensor.is_complex() else "fp32"
    return run.codec


def all_reduce(issuer: Issuer, call: Call, tensors: list[torch.Tensor], reduction: Reduction, codec: str) -> CollectiveWork:
    """Reduce each tensor in place, all in one collective."""
    for tensor in tensors:
        check_tensor(tensor, call.name)
    operations = {reduction.of(tensor, call.name) for tensor in tensors} or {"sum"}
    if len(operations) > 1:  # booleans among numbers
        raise ConfigError(f"{call.name}: tensors of one call need one operation, these need {', '.join(sorted(operations))}")
    (operation,) = operations
    reads = [reduction.read(tensor) for tensor in tensors]
    writes = reads if reduction.factor is None else [added(tensor, read=False) for tensor in tensors]
    codecs = [_codec(run, operation, codec, tensor) for run, tensor in zip(reads, tensors, strict=True)]
    types = [type_of(run, name) for run, name in zip(reads, codecs, strict=True)] or [SegmentType("uint8", "fp32", 0)]
    segments = [segment(kind, a.array, b.array) for kind, a, b in zip(types, reads, writes, strict=False)]
    comm = issuer.communicator
    plan = reduce_plan(tuple(types), issuer.size, comm.chunks, comm.tuning, comm.algorithm, comm.node_count)
    if lossy := sorted({name for name in codecs if name == codec != "fp32"}):
        call.detail = f"in {lossy[0]}"
    signature = _signature(tensors, types[: len(tensors)])
    segments = segments or [segment(types[0], None, None)]
    return issuer.begin(call, Content(tensors, signature, segments, plan, writes, operation))


def reduce(issuer: Issuer, call: Call, tensor: torch.Tensor, root: int, reduction: Reduction) -> CollectiveWork:
    """Reduce a tensor in place on `root`; elsewhere it stays as it is."""
    check_tensor(tensor, call.name)
    operation, comm = reduction.of(tensor, call.name), issuer.communicator
    read = reduction.read(tensor)
    kind = type_of(read, _codec(read, operation, "fp32", tensor))
    plan, elements = reduce_to_plan(
        kind, root, issuer.rank, issuer.size, comm.chunks, comm.tuning, comm.algorithm, comm.node_count
    )
    if issuer.rank == root:
        write = read if reduction.factor is None else added(tensor, read=False)
    else:
        write = Run(room(elements, read.array.dtype))
    call.detail = f"to rank {root}"
    content = Content(
        [tensor], _signature([tensor], [kind]), [segment(kind, read.array, write.array)], plan, [write], operation
    )
    content.ahead_bytes = 0 if plan.algorithm == _native.ONE_SHOT else read.array.nbytes
    return issuer.begin(call, content)


def reduce_scatter(
    issuer: Issuer, call: Call, output: torch.Tensor, inputs: list[torch.Tensor], reduction: Reduction
) -> CollectiveWork:
    """Reduce `inputs`, one for each rank, of whatever sizes; `output` receives this rank's."""
    if len(inputs) != issuer.size:
        raise ConfigError(f"{call.name}: {len(inputs)} tensors for {issuer.size} ranks: give one for each")
    for tensor in (output, *inputs):
        check_tensor(tensor, call.name)
        if tensor.dtype != output.dtype:
            raise ConfigError(f"{call.name}: the output is {describe(output)}, an input {describe(tensor)}: one dtype, please")
    check_alike([output], inputs[issuer.rank], call.name)
    operation, comm = reduction.of(output, call.name), issuer.communicator
    write, reads = added(output, read=False), [reduction.read(tensor) for tensor in inputs]
    types = tuple(type_of(run, _codec(run, operation, "fp32", output)) for run in reads)
    plan = reduce_plan(types, issuer.size, comm.chunks, comm.tuning, comm.algorithm, comm.node_count)
    small = plan.algorithm == _native.ONE_SHOT  # everybody adds up everything: one way through the store
    if not small:
        plan = reduce_scatter_plan(types, comm.chunks)
    segments = []
    for rank, (kind, run) in enumerate(zip(types, reads, strict=True)):
        elsewhere = room(kind.count, run.array.dtype) if small else None
        target = write.array if rank == issuer.rank else elsewhere
        segments.append(segment(kind, apart(run.array, [write.array]), target))
    return issuer.begin(call, Content([output], _signature(inputs, types), segments, plan, [write], operation))


__all__ = ["HALVES", "Reduction", "all_reduce", "reduce", "reduce_scatter"]
