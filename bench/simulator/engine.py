"""A discrete-event engine, and what takes time in it: cores that threads share, threads, links.

An event is a time, a function and its arguments. Threads and links serve *flows* (connections) in turn, a job or a
segment each, as an event loop serves its clients and a network interface the sockets behind it. Nothing here knows what
a collective is.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

Action = Callable[..., None]


class Engine:
    """The clock: runs events in the order of their time, and of their making when times are equal."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0  # how many have been run
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._made = 0

    def at(self, when: float, action: Action, *arguments: Any) -> None:
        """Call `action(*arguments)` at `when`, in seconds."""
        self._made += 1
        heapq.heappush(self._heap, (when, self._made, action, arguments))

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap, pop = self._heap, heapq.heappop
        while heap:
            self.now, _, action, arguments = pop(heap)
            self.events += 1
            action(*arguments)


class Cores:
    """`count` cores that all runnable threads share equally, as a fair scheduler has them do.

    With b threads runnable each runs at min(1, count / b) of a core's speed. Kept as a fluid: a virtual clock that advances
    at that rate, and a heap of the virtual times at which jobs are done.
    """

    def __init__(self, engine: Engine, count: int) -> None:
        self.engine, self.count = engine, count
        self.busy_s = 0.0  # core-seconds used
        self._virtual = self._seen = 0.0
        self._jobs: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._made = self._version = 0

    def run(self, work_s: float, done: Action, *arguments: Any) -> None:
        """A thread becomes runnable for `work_s` seconds of a core's time."""
        self._advance()
        self._made += 1
        self.busy_s += work_s
        heapq.heappush(self._jobs, (self._virtual + work_s, self._made, done, arguments))
        self._plan()

    def _rate(self) -> float:
        return min(1.0, self.count / len(self._jobs)) if self._jobs else 1.0

    def _advance(self) -> None:
        self._virtual += (self.engine.now - self._seen) * self._rate()
        self._seen = self.engine.now

    def _plan(self) -> None:
        self._version += 1
        if self._jobs:
            left = max(0.0, self._jobs[0][0] - self._virtual)
            self.engine.at(self.engine.now + left / self._rate(), self._finish, self._version)

    def _finish(self, version: int) -> None:
        if version != self._version:
            return  # another job has come or gone meanwhile
        self._advance()
        virtual, _, done, arguments = heapq.heappop(self._jobs)
        self._virtual = max(self._virtual, virtual)
        self._plan()
        done(*arguments)


class Thread:
    """One thread: its jobs one after the other, the flows in turn. On shared `cores`, or with a core of its own.

    `wake_s` is spent whenever a job finds the thread asleep; `speed` scales the work of a thread with a core of its own.
    """

    def __init__(self, engine: Engine, cores: Cores | None = None, *, wake_s: float = 0.0, speed: float = 1.0) -> None:
        self.engine, self.cores, self.wake_s, self.speed = engine, cores, wake_s, speed
        self.busy_s, self.wakes = 0.0, 0
        self._flows: dict[Hashable, deque[tuple[float, Action, tuple[Any, ...]]]] = {}
        self._turns: deque[Hashable] = deque()
        self._running = False

    def do(self, flow: Hashable, work_s: float, done: Action, *arguments: Any) -> None:
        """Add a job of `work_s` seconds to `flow`; `done(*arguments)` is called when it is."""
        jobs = self._flows.get(flow)
        if jobs is None:
            jobs = self._flows[flow] = deque()
        if not jobs:
            self._turns.append(flow)
        jobs.append((work_s, done, arguments))
        if not self._running:
            self._running = True
            self.wakes += 1
            self._serve(self.wake_s)

    def _serve(self, extra_s: float) -> None:
        work_s, done, arguments = self._flows[self._turns[0]][0]
        work_s = (work_s + extra_s) / self.speed
        self.busy_s += work_s
        if self.cores is not None:
            self.cores.run(work_s, self._served, done, arguments)
        else:
            self.engine.at(self.engine.now + work_s, self._served, done, arguments)

    def _served(self, done: Action, arguments: tuple[Any, ...]) -> None:
        flow = self._turns.popleft()
        jobs = self._flows[flow]
        jobs.popleft()
        if jobs:
            self._turns.append(flow)
        done(*arguments)
        if self._turns:
            self._serve(0.0)
        else:
            self._running = False


class Link:
    """One direction of a link: `bytes_per_s`, one queue, `latency_s` on top, a token bucket of `burst_bytes`.

    A flow may have `flow_bytes` in the queue, and what it sends beyond waits for its own bytes to leave: a kernel holds back
    each socket like that (TCP small queues), so a short message waits for so much of every other flow and not for all of it.
    A message is there when its last segment is.
    """

    def __init__(
        self,
        engine: Engine,
        bytes_per_s: float,
        *,
        latency_s: float = 0.0,
        burst_bytes: float = 0.0,
        flow_bytes: float = 131072,
        segment_bytes: float = 65536,
    ) -> None:
        self.engine, self.bytes_per_s, self.latency_s = engine, bytes_per_s, latency_s
        self.burst_s, self.segment_bytes, self.flow_bytes = burst_bytes / bytes_per_s, segment_bytes, flow_bytes
        self.bytes = 0.0
        self._waiting: dict[Hashable, deque[tuple[float, Action, tuple[Any, ...]]]] = {}
        self._queued: dict[Hashable, float] = {}  # bytes by flow
        self._queue: deque[tuple[Hashable, float, Action | None, tuple[Any, ...]]] = deque()
        self._running = False
        self._paid_until = 0.0  # GCRA: when the bucket is full again, less its size; it begins empty, as after other traffic

    def send(self, flow: Hashable, size: float, arrived: Action, *arguments: Any) -> None:
        """`size` bytes of `flow`; `arrived(*arguments)` is called when they are at the other end."""
        self.bytes += size
        if flow not in self._waiting:
            self._waiting[flow], self._queued[flow] = deque(), 0.0
        self._waiting[flow].append((size, arrived, arguments))
        self._admit(flow)
        if not self._running:
            self._running = True
            self._serve()

    def _admit(self, flow: Hashable) -> None:
        messages = self._waiting[flow]
        while messages and self._queued[flow] < self.flow_bytes:
            size, arrived, arguments = messages.popleft()
            if size > self.segment_bytes:
                messages.appendleft((size - self.segment_bytes, arrived, arguments))
                self._queue.append((flow, self.segment_bytes, None, ()))
                self._queued[flow] += self.segment_bytes
            else:
                self._queue.append((flow, size, arrived, arguments))
                self._queued[flow] += size

    def _serve(self) -> None:
        now = self.engine.now
        self._paid_until = max(self._paid_until, now - self.burst_s) + self._queue[0][1] / self.bytes_per_s
        self.engine.at(max(self._paid_until, now), self._sent)

    def _sent(self) -> None:
        flow, size, arrived, arguments = self._queue.popleft()
        self._queued[flow] -= size
        if self._waiting[flow]:
            self._admit(flow)
        if arrived is not None:
            if self.latency_s:
                self.engine.at(self.engine.now + self.latency_s, arrived, *arguments)
            else:
                arrived(*arguments)
        if self._queue:
            self._serve()
        else:
            self._running = False
