"""A worker of test_collectives_against_gloo.py: the same random cases through gloo and through smlt, in one process.

All workers draw the same cases from the seed; what is in the tensors differs by rank. Prints a line of JSON: how many
cases were compared, and what differed.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import smlt.torch

FLOATS = [torch.float32, torch.float64]
GLOO_INTEGERS = [torch.int8, torch.uint8, torch.int32, torch.int64]
HALVES = [torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
OPS = {name: getattr(dist.ReduceOp, name) for name in ("SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "AVG")}
KINDS = (
    *("all_reduce",) * 6,
    *("reduce", "reduce_scatter", "reduce_scatter_tensor") * 2,
    *("all_gather", "all_gather_into_tensor", "broadcast", "gather", "scatter") * 2,
    *("all_to_all", "all_to_all_single", "all_to_all_single") * 2,
    *("send", "anysource", "batch", "all_gather_object", "broadcast_object", "gather_object", "scatter_object"),
    *("all_reduce_coalesced", "barrier"),
)


class Case:
    """One case: what all workers do alike, twice, on equal tensors."""

    def __init__(self, number: int, seed: int, groups: list[tuple[list[int], Any, Any]]) -> None:
        self.draw = random.Random(f"{seed}:{number}")
        self.number, self.kind = number, self.draw.choice(KINDS)
        self.members, self.gloo, self.smlt = self.draw.choice(groups)
        self.n = len(self.members)
        self.root = self.draw.randrange(self.n)
        self.asynchronous = self.draw.random() < 0.3
        self.shape = tuple(self.draw.choice([0, 1, 1, 2, 3, 5, 17]) for _ in range(self.draw.choice([0, 1, 2, 3])))
        if self.draw.random() < 0.25:
            self.shape = (self.draw.choice([1000, 30_000, 200_000]),)
        self.layout = self.draw.choice(["plain", "plain", "strided", "transposed", "offset"])
        self.op = self.draw.choice(list(OPS))
        self.dtype = self.draw.choice([*FLOATS, *FLOATS, *GLOO_INTEGERS, torch.bool, *HALVES, *COMPLEX])
        if self.op in ("BAND", "BOR", "BXOR"):
            self.dtype = self.draw.choice(GLOO_INTEGERS)
        if self.dtype in COMPLEX and self.op not in ("SUM", "AVG"):
            self.op = "SUM"
        if self.dtype in (torch.bool,) and self.op == "AVG":
            self.op = "MAX"

    def __str__(self) -> str:
        return (
            f"case {self.number}: {self.kind} {self.op} {self.dtype} {self.shape} {self.layout} ranks {self.members} root "
            f"{self.root} async {self.asynchronous}"
        )

    def tensor(self, shape: tuple[int, ...], rank: int, index: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rank `rank`'s values in the layout of the case."""
        dtype = dtype or self.dtype
        made = torch.Generator().manual_seed(hash((self.number, rank, index)) % 2**31)
        if dtype == torch.bool:
            values = torch.randint(0, 2, shape, generator=made, dtype=torch.uint8).bool()
        elif dtype.is_floating_point or dtype.is_complex:
            values = torch.randn(shape, generator=made, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
        else:
            values = torch.randint(-9 if dtype.is_signed else 0, 9, shape, generator=made).to(dtype)
        return self.laid(values)

    def laid(self, values: torch.Tensor) -> torch.Tensor:
        """The same values, lying otherwise in memory."""
        if self.layout == "strided" and values.dim():
            wide = torch.zeros((*values.shape[:-1], 2 * values.shape[-1]), dtype=values.dtype)
            wide[..., ::2] = values
            return wide[..., ::2]
        if self.layout == "transposed" and values.dim() > 1:
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "offset":
            room = torch.zeros(values.numel() + 3, dtype=values.dtype)
            room[3:] = values.reshape(-1)
            return room[3:].view(values.shape)
        return values

    def plain(self) -> None:
        self.layout = "offset" if self.layout == "offset" else "plain"


def at_least_1d(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape or (1,)


def finish(work: Any, case: Case) -> None:
    if not case.asynchronous:
        assert work is None
    elif isinstance(work, torch.futures.Future):  # what all_reduce_coalesced returns
        work.wait()
    elif case.draw.random() < 0.5:
        work.get_future().wait()
    else:
        work.wait()
        assert work.is_completed()


def reduction(case: Case, group: Any, me: int) -> list[torch.Tensor]:
    op, kind = OPS[case.op], case.kind
    averaged = group is case.gloo and case.op == "AVG"  # which gloo has not
    op = OPS["SUM"] if averaged else op
    more = {"group": group, "async_op": case.asynchronous}
    if kind == "all_reduce":
        results = [case.tensor(case.shape, me)]
        finish(dist.all_reduce(results[0], op, **more), case)
    elif kind == "all_reduce_coalesced":
        case.plain()
        shapes = [case.shape, (3,), at_least_1d(case.shape)]
        results = [case.tensor(shape, me, index) for index, shape in enumerate(shapes)]
        if group is case.gloo:
            for result in results:
                dist.all_reduce(result, op, group=group)
        else:
            finish(dist.all_reduce_coalesced(results, op, **more), case)
    elif kind == "reduce":
        case.plain()
        results = [case.tensor(case.shape, me)]
        real = group is case.gloo and results[0].is_complex()  # it has none
        finish(
            dist.reduce(torch.view_as_real(results[0]) if real else results[0], op=op, dst=case.members[case.root], **more),
            case,
        )
        results = results if me == case.root else []
    else:
        case.plain()
        shape = at_least_1d(case.shape)
        inputs = [case.tensor(shape, me, index) for index in range(case.n)]
        output = torch.zeros(shape, dtype=case.dtype)
        if group is case.gloo:  # it has no reduce_scatter of lists: every part, reduced
            for index, part in enumerate(inputs):
                dist.all_reduce(part, op, group=group)
                if index == me:
                    output = part
        elif kind == "reduce_scatter":
            finish(dist.reduce_scatter(output, inputs, op, **more), case)
        else:
            finish(dist.reduce_scatter_tensor(output, torch.cat(inputs), op, **more), case)
        results = [output]
    if averaged:
        results = [averaged_as_smlt(result, case.n) for result in results]
    return results


def averaged_as_smlt(total: torch.Tensor, n: int) -> torch.Tensor:
    if total.is_floating_point() or total.is_complex():
        return total / n
    return (total.double() / n).round().to(total.dtype)  # to nearest, ties to even


def movement(case: Case, group: Any, me: int) -> list[torch.Tensor]:
    kind, n, more = case.kind, case.n, {"group": group, "async_op": case.asynchronous}
    root, shape = case.members[case.root], case.shape
    if kind == "broadcast":
        results = [case.tensor(shape, me)]
        finish(dist.broadcast(results[0], root, **more), case)
        return results
    if kind == "all_gather":
        results = [case.laid(torch.zeros(shape, dtype=case.dtype)) for _ in range(n)]
        finish(dist.all_gather(results, case.tensor(shape, me), **more), case)
        return results
    if kind == "all_gather_into_tensor":
        case.plain()
        shape = at_least_1d(shape)
        result = torch.zeros((n * shape[0], *shape[1:]), dtype=case.dtype)
        mine = case.tensor(shape, me)
        if group is case.smlt and case.draw.random() < 0.3:  # in place, as FSDP does
            mine = result[me * shape[0] : (me + 1) * shape[0]].copy_(mine)
        finish(dist.all_gather_into_tensor(result, mine, **more), case)
        return [result]
    if kind == "gather":
        case.plain()
        results = [torch.zeros(shape, dtype=case.dtype) for _ in range(n)] if me == case.root else []
        given, into = case.tensor(shape, me), results
        if group is case.gloo and given.is_complex():  # it has none
            given, into = torch.view_as_real(given), [torch.view_as_real(result) for result in results]
        finish(dist.gather(given, into or None, dst=root, **more), case)
        return results
    assert kind == "scatter"
    case.plain()
    result = torch.zeros(shape, dtype=case.dtype)
    inputs = [case.tensor(shape, me, index) for index in range(n)] if me == case.root else None
    finish(dist.scatter(result, inputs, src=root, **more), case)
    return [result]


def all_to_all(case: Case, group: Any, me: int) -> list[torch.Tensor]:
    case.plain()
    n, more = case.n, {"group": group, "async_op": case.asynchronous}
    rows = [[case.draw.choice([0, 1, 2, 7, 300]) for _ in range(n)] for _ in range(n)]
    width = case.draw.choice([(), (3,)])
    even = case.kind == "all_to_all_single" and case.draw.random() < 0.5
    if even:
        rows = [[rows[0][0]] * n] * n
    total = sum(rows[me])
    expects = [rows[other][me] for other in range(n)]
    given = case.tensor((total, *width), me)
    result = torch.zeros((sum(expects), *width), dtype=case.dtype)
    if case.kind == "all_to_all_single" or group is case.gloo:  # gloo has no lists
        sizes = {} if even else {"output_split_sizes": expects, "input_split_sizes": rows[me]}
        finish(dist.all_to_all_single(result, given, **sizes, **more), case)
        return [result]
    outputs = [torch.zeros((count, *width), dtype=case.dtype) for count in expects]
    finish(dist.all_to_all(outputs, list(given.split(rows[me])), **more), case)
    return [torch.cat(outputs)]


def message(case: Case, group: Any, me: int) -> list[torch.Tensor]:
    case.plain()
    n, tag = case.n, case.draw.randrange(5)
    following, before = case.members[(me + 1) % n], case.members[(me - 1) % n]
    given, result = case.tensor(case.shape, me), torch.zeros(case.shape, dtype=case.dtype)
    if group is case.gloo and not given.numel():  # it refuses empty messages
        return [result]
    if case.kind == "batch":
        ops = [dist.P2POp(dist.isend, given, following, group), dist.P2POp(dist.irecv, result, before, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return [result]
    sent = dist.isend(given, following, group=group, tag=tag)
    if case.kind == "anysource":
        assert dist.recv(result, group=group, tag=tag) == before
    else:
        dist.recv(result, before, group=group, tag=tag)
    sent.wait()
    return [result]


def objects(case: Case, group: Any, me: int) -> list[Any]:
    n, root = case.n, case.members[case.root]
    mine = case.draw.choice([None, "ä" * 1000, {"rank": me, "list": [1.5, (2, b"\0")]}, set(), 10**40, range(me)])
    if case.kind == "all_gather_object":
        found = [None] * n
        dist.all_gather_object(found, (me, mine), group=group)
    elif case.kind == "broadcast_object":
        found = [mine, me, "x" * me]
        dist.broadcast_object_list(found, root, group=group)
    elif case.kind == "gather_object":
        found = [None] * n if me == case.root else []
        dist.gather_object((me, mine), found or None, dst=root, group=group)
    else:
        found = [None]
        dist.scatter_object_list(found, [(i, mine) for i in range(n)] if me == case.root else None, src=root, group=group)
    return found


def run(case: Case, group: Any, me: int) -> list[Any]:
    if case.kind in ("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor"):
        return reduction(case, group, me)
    if case.kind in ("all_to_all", "all_to_all_single"):
        return all_to_all(case, group, me)
    if case.kind in ("send", "anysource", "batch"):
        return message(case, group, me) if case.n > 1 else []
    if case.kind.endswith("object"):
        return objects(case, group, me)
    if case.kind == "barrier":
        dist.barrier(group=group)
        return []
    return movement(case, group, me)


def tolerance(case: Case) -> float:
    """Relative to the sum of magnitudes: 0 where every order of the additions gives the same bits."""
    adds = case.kind.startswith(("all_reduce", "reduce")) and case.op in ("SUM", "AVG", "PRODUCT")
    if not adds or not (case.dtype.is_floating_point or case.dtype.is_complex):
        return 0.0
    return {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(case.dtype, 1e-6)


def differ(a: Any, b: Any, allowed: float) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a != b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return True
    if a.dtype == torch.bool:  # gloo adds bytes: any of them says yes
        return not torch.equal(a.view(torch.uint8) != 0 if a.numel() else a, b.view(torch.uint8) != 0 if b.numel() else b)
    if allowed == 0.0:
        return not torch.equal(a, b)
    kind = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(kind), b.to(kind)
    return not bool(((a - b).abs() <= allowed * torch.maximum(b.abs(), torch.ones(()))).all())


def main() -> None:
    url, seed, cases = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    dist.init_process_group("smlt", init_method=url, timeout=timedelta(seconds=60))
    subsets = [list(range(n))]
    if n > 2:
        subsets += [[0, n - 1], list(range(1, n))]
    groups = []
    for members in subsets:
        gloo = dist.new_group(members, backend="gloo")
        own = dist.group.WORLD if len(members) == n else dist.new_group(members)
        groups.append((members, gloo, own))
    differing, kinds, began = [], Counter[str](), time.monotonic()
    spent = {"gloo": 0.0, "smlt": 0.0}
    for number in range(cases):
        found = []
        for name in ("gloo", "smlt"):
            case = Case(number, seed, groups)  # drawn anew: both make the same choices
            if rank not in case.members:
                break
            if name == "gloo":  # it sends what lies behind the first element, strides or not
                case.plain()
            start = time.perf_counter()
            try:
                found.append(run(case, getattr(case, name), case.members.index(rank)))
            except Exception as error:
                raise RuntimeError(f"seed {seed}, {case}, {name}") from error
            spent[name] += time.perf_counter() - start
        if len(found) == 2:
            kinds[case.kind] += 1
            if len(found[0]) != len(found[1]) or any(differ(a, b, tolerance(case)) for a, b in zip(*found, strict=True)):
                differing.append(str(case))
    dist.destroy_process_group()
    row = {"rank": rank, "compared": sum(kinds.values()), "kinds": kinds, "differing": differing}
    print(json.dumps({**row, "seconds": round(time.monotonic() - began, 1), "spent": spent}))


if __name__ == "__main__":
    sys.setrecursionlimit(10_000)
    assert smlt.torch is not None
    main()
