"""What a worker's engine spent its time on: seconds by phase, and a file for Chrome's or Perfetto's trace viewer.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smlt.errors import ConfigError

if TYPE_CHECKING:
    from smlt.collective.communicator import Communicator

#: By number, as in csrc/trace.h.
PHASES = ("encode", "send", "wait", "receive", "add", "publish", "decode")
LANES = ("up", "down", "tokens")
CAPACITY = 200_000


@dataclass(frozen=True)
class Event:
    """One stretch of a phase: nanoseconds of the machine's monotonic clock; `lane` for send and receive, else `chunk`."""

    phase: str
    begin_ns: int
    end_ns: int
    step: int
    chunk: int
    bytes: int

    @property
    def lane(self) -> str:
        """The connection of a send or receive, behind the first node with the node's number; "" for other phases."""
        if self.phase not in ("send", "receive"):
            return ""
        node, kind = divmod(self.chunk, len(LANES))
        return f"{LANES[kind]} {node}" if node else LANES[kind]


@dataclass
class Trace:
    """The events of one worker."""

    rank: int
    events: list[Event] = field(default_factory=list)

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each phase."""
        totals = dict.fromkeys(PHASES, 0.0)
        for event in self.events:
            totals[event.phase] += (event.end_ns - event.begin_ns) / 1e9
        return totals

    def bytes(self) -> dict[str, int]:
        """Bytes handled in each phase: of elements for encode, add, publish, decode; on the wire for send, receive."""
        totals = dict.fromkeys(PHASES, 0)
        for event in self.events:
            totals[event.phase] += event.bytes
        return totals


@contextmanager
def record(comm: Communicator, capacity: int = CAPACITY) -> Iterator[Trace]:
    """Trace what `comm` does inside the with block, up to `capacity` events. ConfigError with one worker alone."""
    session = comm._session
    if session is None:
        raise ConfigError("a job of one worker has nothing to trace: it moves no bytes")
    trace = Trace(comm.rank)
    session.start_trace(capacity)
    try:
        yield trace
    finally:
        trace.events = [Event(PHASES[kind], *rest) for kind, *rest in session.take_trace()]


def to_chrome(traces: Iterable[Trace]) -> dict[str, Any]:
    """The workers' traces as a trace viewer's JSON object: a process a worker, a row a phase and connection."""
    rows: list[dict[str, Any]] = []
    traces = list(traces)
    start = min((event.begin_ns for trace in traces for event in trace.events), default=0)
    for trace in traces:
        rows.append({"name": "process_name", "ph": "M", "pid": trace.rank, "args": {"name": f"worker {trace.rank}"}})
        names: dict[str, int] = {}
        for event in trace.events:
            row = f"{event.phase} {event.lane}".strip()
            thread = names.setdefault(row, len(names))
            rows.append(
                {
                    "name": f"{event.phase} {event.chunk}" if not event.lane and event.phase != "wait" else row,
                    "cat": "collective",
                    "ph": "X",
                    "ts": (event.begin_ns - start) / 1e3,
                    "dur": (event.end_ns - event.begin_ns) / 1e3,
                    "pid": trace.rank,
                    "tid": thread,
                    "args": {"step": event.step, "bytes": event.bytes},
                }
            )
        rows += [
            {"name": "thread_name", "ph": "M", "pid": trace.rank, "tid": thread, "args": {"name": row}}
            for row, thread in names.items()
        ]
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def write_chrome(path: Path, traces: Iterable[Trace]) -> None:
    """Write a file that ui.perfetto.dev and chrome://tracing open."""
    path.write_text(json.dumps(to_chrome(traces)))
