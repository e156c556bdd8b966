"""broadcast, all_gather, gather, scatter and all_to_all: elements that are moved and not looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from smlt.collective.plan import Part, SegmentType, allgather_plan, broadcast_plan, exchange_plan
from smlt.collective.structure import Array, Segment, Signature
from smlt.errors import ConfigError, MismatchError
from smlt.torch.errors import as_torch
from smlt.torch.issue import Call, Content, Issuer
from smlt.torch.tensors import Run, apart, check_alike, check_tensor, describe, dtype_name, moved, segment, type_of
from smlt.torch.work import CollectiveWork


def _signature(*tensors: torch.Tensor) -> tuple[Signature, ...]:
    names = [""] if len(tensors) == 1 else [str(index) for index in range(len(tensors))]
    return tuple((name, dtype_name(tensor), (tensor.numel(),), "fp32") for name, tensor in zip(names, tensors, strict=True))


def _checked(call: Call, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    for tensor in tensors:
        check_tensor(tensor, call.name)
    return list(tensors)


def broadcast(issuer: Issuer, call: Call, tensor: torch.Tensor, root: int) -> CollectiveWork:
    """Send `root`'s tensor into everyone's."""
    _checked(call, [tensor])
    run = moved(tensor, read=issuer.rank == root)
    plan = broadcast_plan((type_of(run),), root, issuer.communicator.chunk_bytes)
    call.detail = f"from rank {root}"
    written = [] if issuer.rank == root else [run]
    content = Content([tensor], _signature(tensor), [segment(type_of(run), run.array, run.array)], plan, written)
    content.ahead_bytes = run.array.nbytes
    return issuer.begin(call, content)


def all_gather(
    issuer: Issuer, call: Call, outputs: Sequence[list[torch.Tensor]], inputs: Sequence[torch.Tensor]
) -> CollectiveWork:
    """Gather each of `inputs` from every rank into the list of `outputs` that belongs to it, one tensor a rank."""
    if len(outputs) != len(inputs):
        raise ConfigError(f"{call.name}: {len(inputs)} tensors, but outputs for {len(outputs)}")
    parts, segments, written = [], list[Segment](), list[Run]()
    for mine, gathered in zip(inputs, outputs, strict=True):
        if len(gathered) != issuer.size:
            raise ConfigError(f"{call.name}: {len(gathered)} output tensors for {issuer.size} ranks: give one for each")
        check_alike(_checked(call, gathered), _checked(call, [mine])[0], call.name)
        targets = [moved(tensor, read=False) for tensor in gathered]
        source = moved(mine)
        # In place is how FSDP gathers: the input is this rank's part of the output.
        others = [run.array for rank, run in enumerate(targets) if rank != issuer.rank]
        own = targets[issuer.rank].array
        if own.ctypes.data != source.array.ctypes.data:
            others.append(own)
        source.array = apart(source.array, others)
        for rank, run in enumerate(targets):
            parts.append(Part(len(segments), type_of(source), rank))
            segments.append(segment(type_of(source), source.array if rank == issuer.rank else None, run.array))
        written += targets
    plan = exchange_plan(tuple(parts), issuer.communicator.chunk_bytes)
    results = [tensor for gathered in outputs for tensor in gathered]
    return issuer.begin(call, Content(results, _signature(*inputs), segments, plan, written))


def all_gather_single(issuer: Issuer, call: Call, output: torch.Tensor, mine: torch.Tensor) -> CollectiveWork:
    """Gather `mine` of every rank into one tensor, one behind the other."""
    _checked(call, [output, mine])
    if output.numel() != issuer.size * mine.numel() or output.dtype != mine.dtype:
        raise ConfigError(f"{call.name}: {describe(output)} cannot take {issuer.size} times {describe(mine)}")
    target, source = moved(output, read=False), moved(mine)
    place = target.array[issuer.rank * source.array.size : (issuer.rank + 1) * source.array.size]
    if place.ctypes.data != source.array.ctypes.data:
        source.array = apart(source.array, [target.array])
    plan = allgather_plan((type_of(source),), issuer.size, issuer.communicator.chunk_bytes)
    content = Content([output], _signature(mine), [segment(type_of(source), source.array, target.array)], plan, [target])
    return issuer.begin(call, content)


def gather(issuer: Issuer, call: Call, outputs: list[torch.Tensor], mine: torch.Tensor, root: int) -> CollectiveWork:
    """Send `mine` to `root`, who has one output tensor a rank."""
    _checked(call, [mine, *outputs])
    if issuer.rank == root:
        if len(outputs) != issuer.size:
            raise ConfigError(f"{call.name}: {len(outputs)} output tensors for {issuer.size} ranks: give one for each")
        check_alike(outputs, mine, call.name)
    targets = [moved(tensor, read=False) for tensor in outputs] if issuer.rank == root else []
    source = moved(mine)
    kind = type_of(source)
    parts = tuple(Part(rank, kind, rank, root) for rank in range(issuer.size) if rank != root)
    segments = []
    for rank in range(issuer.size):
        sends = rank == issuer.rank
        segments.append(segment(kind, source.array if sends else None, targets[rank].array if targets else None))
    if targets:
        _keep(source.array, targets[root].array)
        segments[root] = segment(kind, None, None)
    call.detail = f"to rank {root}"
    content = Content(outputs, _signature(mine), segments, exchange_plan(parts, issuer.communicator.chunk_bytes), targets)
    content.ahead_bytes = source.array.nbytes * (issuer.size - 1)
    return issuer.begin(call, content)


def scatter(issuer: Issuer, call: Call, output: torch.Tensor, inputs: list[torch.Tensor], root: int) -> CollectiveWork:
    """Send each of `root`'s tensors to its rank."""
    _checked(call, [output, *inputs])
    if issuer.rank == root:
        if len(inputs) != issuer.size:
            raise ConfigError(f"{call.name}: {len(inputs)} tensors for {issuer.size} ranks: give one for each")
        check_alike(inputs, output, call.name)
    target = moved(output, read=False)
    kind = type_of(target)
    sources = [moved(tensor) for tensor in inputs] if issuer.rank == root else []
    parts = tuple(Part(rank, kind, root, rank) for rank in range(issuer.size) if rank != root)
    segments = []
    for rank in range(issuer.size):
        source = apart(sources[rank].array, [target.array]) if sources and rank != root else None
        receives = rank == issuer.rank != root
        segments.append(segment(kind, source, target.array if receives else None))
    if sources:
        _keep(sources[root].array, target.array)
    call.detail = f"from rank {root}"
    content = Content([output], _signature(output), segments, exchange_plan(parts, issuer.communicator.chunk_bytes), [target])
    content.ahead_bytes = target.array.nbytes * (issuer.size - 1)
    return issuer.begin(call, content)


def all_to_all(
    issuer: Issuer, call: Call, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *, even: bool = False
) -> CollectiveWork:
    """Send `inputs[i]` to rank i and receive rank i's into `outputs[i]`.

    When the sizes are not known to be `even`, all workers tell each other first: that part blocks until all have called.
    """
    for tensors in (_checked(call, outputs), _checked(call, inputs)):
        if len(tensors) != issuer.size:
            raise ConfigError(f"{call.name}: {len(tensors)} tensors for {issuer.size} ranks: give one for each")
    if len({tensor.dtype for tensor in (*outputs, *inputs)}) > 1:
        raise ConfigError(f"{call.name}: all tensors must have one dtype")
    targets, sources = [moved(tensor, read=False) for tensor in outputs], [moved(tensor) for tensor in inputs]
    with issuer.in_order:
        if even:
            counts = [[run.array.size for run in sources]] * issuer.size
            signature = _signature(*inputs)
        else:
            counts = _agree_on_sizes(issuer, call, inputs[0], sources, targets)
            signature = (("", dtype_name(inputs[0]), (), "fp32"),)
        # What goes from rank i to rank i + k is segment k, on both.
        n, dtype = issuer.size, sources[0].array.dtype.name
        own = segment(type_of(sources[issuer.rank]), None, None)
        parts, segments = list[Part](), [own]
        for k in range(1, n):
            source, target = sources[(issuer.rank + k) % n], targets[(issuer.rank - k) % n]
            read = apart(source.array, [run.array for run in targets])
            segments.append(Segment(type_of(source), [], read, target.array))
            for rank in range(n):
                to = (rank + k) % n
                parts.append(Part(k, SegmentType(dtype, "fp32", counts[rank][to]), rank, to))
        _keep(sources[issuer.rank].array, targets[issuer.rank].array)
        plan = exchange_plan(tuple(parts), issuer.communicator.chunk_bytes)
        return issuer.begin(call, Content(outputs, signature, segments, plan, targets))


def _keep(source: Array, target: Array) -> None:
    """What a rank sends to itself."""
    if source.ctypes.data != target.ctypes.data:
        target[...] = source


def _agree_on_sizes(issuer: Issuer, call: Call, like: torch.Tensor, sources: list[Run], targets: list[Run]) -> list[list[int]]:
    """How many elements each rank sends to each other; MismatchError on all when one expects something else."""
    n = issuer.size
    sizes = np.array([[run.array.size for run in sources], [run.array.size for run in targets]], np.int64)
    table = np.empty((n, 2, n), np.int64)
    kind = SegmentType("int64", "fp32", 2 * n)
    plan = allgather_plan((kind,), n, issuer.communicator.chunk_bytes)
    signature: tuple[Signature, ...] = ((dtype_name(like), "int64", (2, n), "fp32"),)
    made = [segment(kind, sizes.reshape(-1), table.reshape(-1))]
    issuer.begin(Call(f"{call.name}, sizes", False, call.timeout_s), Content((), signature, made, plan)).wait()
    for sender in range(n):
        for receiver in range(n):
            sent, expected = int(table[sender, 0, receiver]), int(table[receiver, 1, sender])
            if sent != expected:
                error = MismatchError(
                    f"{call.name}: rank {sender} sends {sent} elements to rank {receiver}, which expects {expected}"
                )
                raise as_torch(error)
    return [[int(count) for count in row] for row in table[:, 0]]
