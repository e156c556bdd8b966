"""Calls worked off one after the other by a thread, for a communicator whose own operations block."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from smlt.errors import CollectiveError, SmltError

CLOSED = "this communicator can do no more: it was closed; open a new one"


class QueuedWork:
    """A call that waits for its turn, or runs, or is over; as `smlt.Work`. For use from any thread."""

    def __init__(self, call: Callable[[], Any] | None, step: int) -> None:
        self._call, self._step = call, step
        self._over = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        self._settle: Callable[[BaseException | None], object] | None = None
        self._lock = threading.Lock()

    def then(self, settle: Callable[[BaseException | None], object]) -> None:
        """Call `settle` with how it failed, or None, when it has ended: in the thread that ends it, or at once."""
        with self._lock:
            if not self._over.is_set():
                self._settle = settle
                return
        settle(self._error)

    @property
    def step(self) -> int:
        """The collective's number."""
        return self._step

    @property
    def complete(self) -> bool:
        """Whether it has ended well."""
        return self._over.is_set() and self._error is None

    def wait(self, timeout_s: float | None = None) -> Any:
        """The result, as the blocking call would return it; raises what that raises. TimeoutError after `timeout_s`."""
        if not self._over.wait(timeout_s):
            raise TimeoutError(f"collective {self._step} has not ended after {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._value

    def done(self) -> bool:
        """Whether it has ended, well or not; never waits."""
        return self._over.is_set()

    def exception(self) -> SmltError | None:
        """Wait for the end; how it failed, None when it did not."""
        try:
            self.wait()
        except SmltError as error:
            return error
        return None

    def run(self) -> None:
        """For the thread."""
        assert self._call is not None
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        self.end()

    def end(self, error: BaseException | None = None) -> None:
        """It is over; with `error`, without having run."""
        self._error = self._error or error
        self._call = None  # lets go of the caller's memory
        with self._lock:
            self._over.set()
            settle, self._settle = self._settle, None
        if settle is not None:
            settle(self._error)


class CallQueue:
    """Keeps calls in the order in which they were made. The thread is started by the first that is not waited for."""

    def __init__(self) -> None:
        self._order = threading.Lock()
        self._thread: threading.Thread | None = None
        self._works: queue.SimpleQueue[QueuedWork | None] = queue.SimpleQueue()
        self._stopping = False
        self.numbered = 0  # calls made

    def run(self, call: Callable[[int], Any]) -> Any:
        """Make a call, which is given its number, and return what it does: in this thread while there is no other."""
        with self._order:
            if self._thread is None:
                self._check()
                self.numbered += 1
                return call(self.numbered)
        return self.submit(call).wait()

    def submit(self, call: Callable[[int], Any]) -> QueuedWork:
        """Queue a call."""
        with self._order:
            self._check()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work_off, name="smlt-two-level", daemon=True)
                self._thread.start()
            self.numbered += 1
            number = self.numbered
            work = QueuedWork(lambda: call(number), number)
            self._works.put(work)
        return work

    def stop(self) -> None:
        """No more calls are taken, and those that have not begun will not."""
        self._stopping = True
        self._works.put(None)

    def join(self) -> None:
        """Wait for the call under way."""
        if self._thread is not None:
            self._thread.join()

    def _check(self) -> None:
        if self._stopping:
            raise CollectiveError(CLOSED)

    def _work_off(self) -> None:
        while (work := self._works.get()) is not None:
            if self._stopping:
                work.end(CollectiveError(CLOSED))
            else:
                work.run()
