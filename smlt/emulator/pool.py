"""Warm and cold: which sandbox takes an invocation, how many there may be, and when they end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from smlt.emulator.functions import Function, FunctionNotFoundError
from smlt.emulator.sandbox import Place, Sandbox

#: Concurrent executions that a new account may have
#: (https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html).
ACCOUNT_LIMIT = 1000


class ThrottledError(Exception):
    """No more sandboxes for now. `reason` is Lambda's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Pool:
    """All sandboxes. Those that are free are reused, the last used first; those idle for `idle_s` are ended.

    `current(function)` is the function as it is deployed now, `reserved(region)` the sum of what functions there have reserved.
    """

    def __init__(
        self,
        place: Place,
        *,
        account_limit: int,
        idle_s: float,
        current: Callable[[Function], Function],
        reserved: Callable[[str], int],
    ) -> None:
        self._place = place
        self._account_limit = account_limit
        self._idle_s = idle_s
        self._current = current
        self._reserved = reserved
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], list[Sandbox]] = {}
        self._all: set[Sandbox] = set()
        self._busy: Counter[str] = Counter()  # by function, of all versions
        self._busy_unreserved = 0
        self._closed = False

    def sandboxes(self) -> list[Sandbox]:
        """Those there are now."""
        with self._lock:
            return list(self._all)

    def busy(self, name: str) -> int:
        """Invocations of the function that are under way, of all versions."""
        with self._lock:
            return sum(count for arn, count in self._busy.items() if arn.endswith(f":function:{name}"))

    def enter(self, function: Function) -> bool:
        """Count an invocation that begins; whether it is one of the unreserved, for `leave`. Raises ThrottledError."""
        reserved = self._reserved(function.region)
        with self._lock:
            if function.reserved is not None:
                if self._busy[function.arn] >= function.reserved:
                    raise ThrottledError("ReservedFunctionConcurrentInvocationLimitExceeded")
            elif self._busy_unreserved >= self._account_limit - reserved:
                raise ThrottledError("ConcurrentInvocationLimitExceeded")
            self._busy[function.arn] += 1
            self._busy_unreserved += function.reserved is None
            return function.reserved is None

    def leave(self, function: Function, unreserved: bool) -> None:
        """Count an invocation that is over."""
        with self._lock:
            self._busy[function.arn] -= 1
            self._busy_unreserved -= unreserved

    def take(self, function: Function) -> Sandbox | None:
        """A warm sandbox of this code and configuration, None when all are busy."""
        fingerprint = function.fingerprint
        with self._lock:
            idle = self._idle.get(function.key, [])
            stale = [sandbox for sandbox in idle if sandbox.fingerprint != fingerprint or not sandbox.alive]
            for sandbox in stale:
                idle.remove(sandbox)
            taken = idle.pop() if idle else None
        self.end(*stale)
        return taken

    def make(self, function: Function) -> Sandbox:
        """A cold one, whose handler is being loaded."""
        made = Sandbox(function, self._place)
        with self._lock:
            self._all.add(made)
            closed = self._closed
        if closed:
            self.end(made)
        return made

    def give_back(self, sandbox: Sandbox) -> None:
        """It is free: keep it warm, unless it has ended or the emulator is closing."""
        sandbox.idle_since = time.monotonic()
        with self._lock:
            keep = sandbox.alive and not self._closed
            if keep:
                self._idle.setdefault(sandbox.function.key, []).append(sandbox)
        if not keep:
            self.end(sandbox)

    def end(self, *sandboxes: Sandbox) -> None:
        """Kill them and forget them."""
        for sandbox in sandboxes:
            sandbox.kill("ended")
        for sandbox in sandboxes:
            sandbox.close()
            with self._lock:
                self._all.discard(sandbox)

    def reap(self) -> None:
        """End those that have been idle for long, have died, or whose code or configuration has changed since."""
        with self._lock:
            idle = [sandbox for some in self._idle.values() for sandbox in some]
        old = [sandbox for sandbox in idle if self._is_old(sandbox)]
        with self._lock:
            still = [sandbox for sandbox in old if sandbox in self._idle.get(sandbox.function.key, [])]
            for sandbox in still:
                self._idle[sandbox.function.key].remove(sandbox)
        self.end(*still)

    def _is_old(self, sandbox: Sandbox) -> bool:
        if not sandbox.alive or time.monotonic() - sandbox.idle_since >= self._idle_s:
            return True
        try:
            return self._current(sandbox.function).fingerprint != sandbox.fingerprint
        except FunctionNotFoundError:
            return True

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._closed = True
            self._idle.clear()
            all_of_them = list(self._all)
        self.end(*all_of_them)
