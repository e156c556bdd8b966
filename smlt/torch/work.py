"""Handles of collectives under way, as torch.distributed hands them out; and the thread that completes their futures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from smlt.errors import SmltError
from smlt.torch.errors import as_torch


class Waitable(Protocol):
    """What stands behind a handle: a collective (`smlt.Work`), or a message between two workers."""

    def wait(self, timeout_s: float | None = None) -> Any: ...

    def done(self) -> bool: ...


class CollectiveWork(dist.Work):
    """A collective or a message under way. For use from any thread.

    `wait` raises SMLT's errors (see `smlt.torch.errors`), and TimeoutError when it has not ended after the `timeout` given.
    Tensors belong to the collective until it has ended.
    """

    def __init__(self, pending: Waitable, tensors: Sequence[torch.Tensor], futures: FutureThread, name: str = "") -> None:
        super().__init__()
        self._pending, self._tensors, self._futures = pending, list(tensors), futures
        self._name = name
        self._future: torch.futures.Future[list[torch.Tensor]] | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return True when the result is in the tensors. Without `timeout` the group's counts, from the call on."""
        seconds = timeout.total_seconds()
        try:
            self._pending.wait(seconds if seconds > 0 else None)
        except SmltError as error:
            raise as_torch(error, self._name) from error
        return True

    def is_completed(self) -> bool:
        """Whether it has ended, well or not; never waits."""
        if not self._pending.done():
            return False
        self.exception()  # the result goes to the caller's tensors
        return True

    def is_success(self) -> bool:
        """Whether it has ended well."""
        return self._pending.done() and self.exception() is None

    def exception(self) -> BaseException | None:
        """How it failed; None when it did not, or has not ended."""
        if not self._pending.done():
            return None
        try:
            self._pending.wait()
        except Exception as error:
            return as_torch(error, self._name) if isinstance(error, SmltError) else error
        return None

    def synchronize(self) -> None:
        """As `wait`: there is no stream to be put in order."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """The tensors that hold the result."""
        return self._tensors

    def source_rank(self) -> int:
        """Of a message received: who has sent it."""
        return int(getattr(self._pending, "source_rank", -1))

    def _source_rank(self) -> int:
        return self.source_rank()

    def with_earlier(self, works: Sequence[CollectiveWork]) -> CollectiveWork:
        """One handle for this one and others, whose results it has too."""
        tensors = [tensor for work in works for tensor in work.result()]
        return CollectiveWork(_Following(self._pending, works, None), [*tensors, *self._tensors], self._futures, self._name)

    def then(self, follows: Callable[[], object], tensors: Sequence[torch.Tensor]) -> CollectiveWork:
        """A handle with which `follows` happens when the result is there."""
        return CollectiveWork(_Following(self._pending, (), follows), tensors, self._futures, self._name)

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Completed with the tensors, or with the error, by a thread of the group's."""
        with self._lock:
            if self._future is None:
                self._future = torch.futures.Future()
                self._futures.complete(self, self._future)
            return self._future


class MessageWork(CollectiveWork):
    """A message under way: its future is completed by whoever sends or receives it."""

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Completed with the tensor, or with the error."""
        with self._lock:
            if self._future is None:
                future = self._future = torch.futures.Future()
                self._pending.on_end(lambda: _complete(self, future))  # type: ignore[attr-defined]
            return self._future


class _Following:
    """What stands behind a handle, and something before or after it."""

    def __init__(self, pending: Waitable, earlier: Sequence[CollectiveWork], then: Callable[[], object] | None) -> None:
        self._pending, self._earlier, self._then = pending, list(earlier), then
        self._lock = threading.Lock()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for all of it; what follows happens once."""
        for work in self._earlier:
            work.wait(timedelta(seconds=timeout_s or 0))
        self._pending.wait(timeout_s)
        with self._lock:
            then, self._then = self._then, None
            if then is not None:
                then()

    def done(self) -> bool:
        """Whether all of it has ended."""
        return self._pending.done() and all(work._pending.done() for work in self._earlier)


class FutureThread:
    """Waits for one collective after the other, moving its bytes, and completes its future. Started when first needed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[CollectiveWork, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def complete(self, work: CollectiveWork, future: Any) -> None:
        """Complete `future` when `work` has ended: at once when it has.

        A future's callback may begin another collective and wait for its future, as PyTorch's PowerSGD hook does. It runs on
        this very thread, which then has nothing to do but to wait for that one.
        """
        if work._pending.done() or threading.current_thread() is self._thread:
            _complete(work, future)
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self._queue.put((work, future))

    def close(self) -> None:
        """End the thread behind what it was given."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._queue.put(None)
            thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            _complete(*item)
            del item  # lets go of the tensors


def _complete(work: CollectiveWork, future: Any) -> None:
    try:
        work.wait()
    except BaseException as error:
        future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
    else:
        future.set_result(work.result())
