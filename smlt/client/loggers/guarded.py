"""Listeners that may fail: what they raise is told once, then they are left alone; the run goes on."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from smlt.client.runs import Run
from smlt.client.watching import Listener, Progress
from smlt.store.parameter import ServerInfo

#: Calls that wait for a listener that is slow: more are left out, for memory is the run's.
WAITING_MAX = 10_000
#: At a run's end a listener has so long to write what is still waiting.
LAST_WORDS_S = 10.0


class Guarded(Listener):
    """Tells `inner` everything until it raises. `name`: what a complaint calls it."""

    def __init__(self, inner: Progress, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name
        self.failed = False
        self._complaints: deque[str] = deque()  # added to and taken from by different threads

    def complaints(self) -> Sequence[str]:
        """See Listener."""
        return [self._complaints.popleft() for _ in range(len(self._complaints))]

    def _tell(self, what: str, *arguments: Any) -> None:
        self._carry_out(what, arguments)

    def _carry_out(self, what: str, arguments: tuple[Any, ...]) -> None:
        if self.failed:
            return
        try:
            getattr(self.inner, what)(*arguments)
        except Exception as error:  # whatever it is, the run is worth more
            self.failed = True
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            self._complaints.append(f"{self.name}: {text}; nothing more is logged there, the run goes on")

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        """See Progress."""
        self._tell("started", run, config, server)

    def step(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._tell("step", row)

    def epoch(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._tell("epoch", row)

    def membership(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._tell("membership", row)

    def decision(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._tell("decision", row)

    def warning(self, text: str) -> None:
        """See Progress."""
        self._tell("warning", text)

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """See Progress."""
        self._tell("ended", run, status)


class InBackground(Guarded):
    """Tells `inner` in a thread of its own, in order: a slow disk or server does not keep the scheduler from its workers.

    An inner listener with `flush()` is called by it whenever nothing more waits.
    """

    def __init__(self, inner: Progress, name: str) -> None:
        super().__init__(inner, name)
        self._waiting: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(WAITING_MAX)
        self._left_out = 0
        self._thread = threading.Thread(target=self._work, name=f"smlt {name}", daemon=True)
        self._thread.start()

    def _tell(self, what: str, *arguments: Any) -> None:
        if self.failed:
            return
        try:
            # A few at the end of a run are waited for: how it ended is worth more than one of its steps.
            self._waiting.put((what, arguments), block=what == "ended", timeout=1.0)
        except queue.Full:
            self._left_out += 1

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """Give it LAST_WORDS_S to write the rest."""
        super().ended(run, status)
        deadline = time.monotonic() + LAST_WORDS_S
        try:
            self._waiting.put(None, timeout=1.0)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        if self.failed:
            return
        if self._thread.is_alive():
            self._complaints.append(f"{self.name}: the last {self._waiting.qsize()} rows were not taken in {LAST_WORDS_S:g} s")
        if self._left_out:
            self._complaints.append(f"{self.name}: it was too slow, {self._left_out} rows were left out")

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            self._carry_out(*call)
            if self._waiting.empty() and hasattr(self.inner, "flush"):
                self._carry_out("flush", ())
