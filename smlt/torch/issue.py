"""How collectives are begun: in the order of the calls, with a handle each, and no more under way than the store can hold."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from smlt.collective.communicator import Communicator
from smlt.collective.plan import Plan, reduce_plan
from smlt.collective.structure import Segment, Signature, fuse
from smlt.collective.work import Work
from smlt.errors import SmltError
from smlt.torch.errors import as_torch
from smlt.torch.tensors import Run
from smlt.torch.work import CollectiveWork, FutureThread

#: A worker who only sends may be so far ahead of those who read, in bytes that lie in the store; then it waits for them.
AHEAD_BYTES_MAX = 128 << 20
#: For collectives that nobody waited for when the group is destroyed.
FAREWELL_S = 5.0


@dataclass
class Call:
    """A collective as torch.distributed has asked for it."""

    name: str  # all_reduce, ...
    asynchronous: bool = True  # nobody may wait for a while
    timeout_s: float | None = None
    #: What all workers must agree on beside the tensors: a root, an operation.
    detail: str = ""


@dataclass
class Content:
    """What a collective works on: signature and segments alike on all workers, and what is to be done at its end."""

    tensors: Sequence[torch.Tensor]  # that hold the result
    signature: tuple[Signature, ...]
    segments: list[Segment]
    plan: Plan
    runs: Sequence[Run] = field(default_factory=list)  # that were written to
    operation: str = ""
    #: Bytes that may still lie in the store when those who sent them have completed.
    ahead_bytes: int = 0


class Issuer:
    """Begins the collectives of a group."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.rank, self.size = communicator.rank, communicator.world_size
        self.futures = FutureThread(f"smlt-futures-{communicator.job}")
        self._pending: deque[CollectiveWork] = deque()  # nobody may hold the handle of a collective under way
        self._ahead_bytes = 0
        self._barrier: Work | None = None
        self._lock = threading.RLock()
        #: Held by whoever begins more than one collective for one call.
        self.in_order = self._lock

    def begin(self, call: Call, content: Content) -> CollectiveWork:
        """Begin a collective; raises what `Communicator.allreduce_async` raises."""
        gives: list[Callable[[], object]] = [run.give for run in content.runs if run.give is not None]

        def give() -> None:
            for one in gives:
                one()

        name = f"{call.name} {call.detail}" if call.detail else call.name
        with self._lock:
            try:
                self._keep_together(content.ahead_bytes)
                pending = self.communicator.begin(
                    name,
                    content.operation,
                    content.signature,
                    content.segments,
                    content.plan,
                    give,
                    timeout_s=call.timeout_s,
                )
            except SmltError as error:
                raise as_torch(error, name) from error
            return self.hold(CollectiveWork(pending, content.tensors, self.futures, name), call.asynchronous)

    def hold(self, work: CollectiveWork, asynchronous: bool) -> CollectiveWork:
        """Keep what is under way, whoever else does, until it has ended."""
        with self._lock:
            while self._pending and self._pending[0].is_completed():
                self._pending.popleft()
            self._pending.append(work)
        if asynchronous:
            self.communicator.start_progress()
        return work

    def barrier_content(self) -> Content:
        """A reduction of nothing."""
        comm, segments = self.communicator, fuse([], None)
        plan = reduce_plan((segments[0].type,), self.size, comm.chunks, comm.tuning, comm.algorithm, comm.node_count)
        return Content((), (), segments, plan)

    def barrier(self, call: Call) -> CollectiveWork:
        """Wait for everyone, and for what this worker has begun before: gloo holds it so."""
        with self._lock:
            earlier = list(self._pending)
            return self.begin(call, self.barrier_content()).with_earlier(earlier)

    def close(self) -> None:
        """Give what is under way a moment, then leave the job."""
        deadline = time.monotonic() + FAREWELL_S
        with self._lock:
            pending = list(self._pending)
        for work in pending:
            left = deadline - time.monotonic()
            if left > 0 and self.communicator.usable:
                with contextlib.suppress(Exception):  # whoever has the handle is told
                    work.wait(timedelta(seconds=left))
        self.communicator.close()
        self.futures.close()
        with self._lock:
            self._pending.clear()

    def _keep_together(self, ahead_bytes: int) -> None:
        """All workers count alike: after so many bytes each begins a barrier, and after as many more waits for it."""
        self._ahead_bytes += ahead_bytes
        if self._ahead_bytes <= AHEAD_BYTES_MAX or self.size == 1:
            return
        self._ahead_bytes = ahead_bytes
        if self._barrier is not None:
            self._barrier.wait()
        content = self.barrier_content()
        self._barrier = self.communicator.begin("barrier", "", (), content.segments, content.plan, _nothing)


def _nothing() -> Any:
    return None
