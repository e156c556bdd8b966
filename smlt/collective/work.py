"""The handle of an asynchronous collective."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from smlt.collective.session import Session
from smlt.errors import FencedError, SmltError


class Work:
    """A collective under way, as `Communicator.allreduce_async` returns it. For use from any thread.

    The memory of the input and of `out` belongs to the collective until `wait` has returned or raised, or `done` is true;
    when a newer generation has begun (FencedError), until it is completed after all or the communicator is closed.
    """

    def __init__(self, session: Session | None, step: int, give: Callable[[], Any], timeout_s: float | None = None) -> None:
        self._session, self._step, self._give = session, step, give
        self._then: Callable[[bool], None] | None = None
        self._limit_s = timeout_s or (session.timeout_s if session is not None else math.inf)
        self._deadline = time.monotonic() + self._limit_s
        self._lock = threading.RLock()
        self._settled = False
        self._value: Any = None
        self._error: BaseException | None = None

    def then(self, settle: Callable[[bool], None]) -> None:
        """For the communicator: what to do when it has ended, told whether it is complete."""
        self._then = settle
        if self._session is not None:
            self._session.works.add(self)

    @property
    def step(self) -> int:
        """The collective's number."""
        return self._step

    def wait(self, timeout_s: float | None = None) -> Any:
        """The result, as the blocking call would return it.

        Raises what the blocking call raises, again on every call; TimeoutError when it has not ended after `timeout_s`
        seconds (default: the communicator's deadline, counted from the call that began it), and then goes on. FencedError
        is not the end either: after `Communicator.complete_fenced` has returned True, `wait` returns the result.
        """
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=-1 if timeout_s is None else max(timeout_s, 0)):
            raise TimeoutError(f"collective {self._step} has not ended after {timeout_s:g} s")
        try:
            if not self._settled and not self._settle(until):
                raise TimeoutError(f"collective {self._step} has not ended after {timeout_s:g} s")
            if self._error is not None:
                raise self._error
            return self._value
        finally:
            self._lock.release()

    def done(self) -> bool:
        """Whether it has ended, well or not; never waits."""
        return self._settled or self._session is None or self._session.has_ended(self._step)

    @property
    def complete(self) -> bool:
        """Whether `wait` has returned the result."""
        return self._settled and self._error is None

    def exception(self) -> SmltError | None:
        """Wait for the end; how it failed, None when it did not."""
        try:
            self.wait()
        except SmltError as error:
            return error
        return None

    def settle(self) -> None:
        """For the session, when it is closed: end it here, one way or another."""
        with contextlib.suppress(Exception):  # kept for whoever waits
            self.wait()

    def __del__(self) -> None:
        if not self._settled and self._session is not None:
            self._session.forget(self._step)

    def _settle(self, until: float) -> bool:
        try:
            if self._session is not None and not self._session.finish(self._step, self._deadline, until, self._limit_s):
                return False
            self._value = self._give()
        except BaseException as error:
            if isinstance(error, FencedError) and self._session is not None and not self._session.closed:
                raise  # it may be completed yet
            self._error = error
        if self._then is not None:
            self._then(self._error is None)
        self._settled = True
        self._give, self._then = _nothing, None  # lets go of the caller's memory
        return True


def _nothing() -> None:
    return None
