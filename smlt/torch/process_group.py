"""The backend "smlt": a process group whose collectives go through the parameter store."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from smlt.collective.communicator import Communicator
from smlt.collective.plan import allgather_plan, broadcast_plan, reduce_plan
from smlt.collective.structure import Segment, Signature
from smlt.errors import SmltError
from smlt.torch.errors import as_torch
from smlt.torch.tensors import Run, added, check_tensor, dtype_name, moved, segment
from smlt.torch.work import CollectiveWork, FutureThread

OPERATIONS = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "mean",
    dist.ReduceOp.MIN: "min",
    dist.ReduceOp.MAX: "max",
}


class ProcessGroup(dist.ProcessGroup):
    """The workers of a group, as torch.distributed sees them; `communicator` is SMLT's own face of the same group.

    Made by `torch.distributed.init_process_group("smlt", ...)` and `new_group`, not by hand. Collectives are numbered in
    the order of the calls, from whichever threads, and `communicator` counts on with them.
    """

    def __init__(self, communicator: Communicator, timeout: timedelta) -> None:
        super().__init__(communicator.rank, communicator.world_size)
        self.communicator = communicator
        self._rank, self._size = communicator.rank, communicator.world_size
        self._timeout = timeout
        self._futures = FutureThread(f"smlt-futures-{communicator.job}")
        self._pending: deque[CollectiveWork] = deque()  # nobody may hold the handle of a collective under way
        self._lock = threading.Lock()

    def getBackendName(self) -> str:  # noqa: N802
        return "smlt"

    # ---- collectives ----

    def allreduce(self, tensors: Any, opts: Any = None) -> CollectiveWork:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        op = "sum"
        for known, name in OPERATIONS.items():
            if opts is not None and opts.reduceOp == known:
                op = name
        runs = []
        for tensor in tensors:
            check_tensor(tensor, "all_reduce")
            runs.append(added(tensor))
        segments = [segment(run.array, run.array) for run in runs]
        comm = self.communicator
        plan = reduce_plan(tuple(s.type for s in segments), self._size, comm.chunk_bytes, comm.tuning, comm.algorithm)
        return self._begin("allreduce", op, tensors, segments, plan, runs, opts)

    def broadcast(self, tensors: Any, opts: Any = None) -> CollectiveWork:
        root = opts.rootRank if opts is not None else 0
        runs = [moved(tensor) for tensor in tensors]
        segments = [segment(run.array, run.array) for run in runs]
        plan = broadcast_plan(tuple(s.type for s in segments), root, self.communicator.chunk_bytes)
        return self._begin(f"broadcast from rank {root}", "", tensors, segments, plan, runs, opts)

    def allgather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> CollectiveWork:
        source, outputs = input_tensors[0], output_tensors[0]
        run = moved(source)
        gathered = torch.empty((self._size, source.numel()), dtype=source.dtype)
        target = moved(gathered).array
        plan = allgather_plan((segment(run.array, None).type,), self._size, self.communicator.chunk_bytes)
        made = segment(run.array, None)
        made.target = target

        def give() -> None:
            for rank, output in enumerate(outputs):
                output.copy_(gathered[rank].view_as(output))

        return self._begin("all_gather", "", [source], [made], plan, [Run(target, give)], opts, outputs)

    def _allgather_base(self, output: Any, input: Any, opts: Any = None) -> CollectiveWork:
        return self.allgather([list(output.view(self._size, *input.shape).unbind(0))], [input], opts)

    all_gather_single = _allgather_base

    def barrier(self, opts: Any = None) -> CollectiveWork:
        comm = self.communicator
        empty = segment(moved(torch.empty(0, dtype=torch.uint8)).array, None)
        plan = reduce_plan((empty.type,), self._size, comm.chunk_bytes, comm.tuning, comm.algorithm)
        return self._begin("barrier", "", [], [empty], plan, [], opts)

    def shutdown(self) -> None:
        self.communicator.close()
        self._futures.close()

    def abort(self) -> None:
        self.communicator.forgo_farewell()
        self.shutdown()

    # ---- inside ----

    def _begin(
        self,
        kind: str,
        detail: str,
        tensors: Sequence[torch.Tensor],
        segments: list[Segment],
        plan: Any,
        runs: Sequence[Run],
        opts: Any,
        results: Sequence[torch.Tensor] | None = None,
    ) -> CollectiveWork:
        signature: tuple[Signature, ...] = tuple(
            ("", dtype_name(tensor), (tensor.numel(),), s.type.codec) for tensor, s in zip(tensors, segments, strict=False)
        )
        gives: list[Callable[[], None]] = [run.give for run in runs if run.give is not None]

        def give() -> None:
            for one in gives:
                one()

        with self._lock:
            try:
                pending = self.communicator.begin(kind, detail, signature, segments, plan, give)
            except SmltError as error:
                raise as_torch(error) from error
            work = CollectiveWork(pending, tensors if results is None else results, self._futures)
            while self._pending and self._pending[0].is_completed():
                self._pending.popleft()
            self._pending.append(work)
        if getattr(opts, "asyncOp", True):
            self.communicator.start_progress()
        return work
