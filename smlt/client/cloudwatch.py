"""A run's lines in CloudWatch Logs: which invocation wrote them, and which of them are this run's.

A sandbox writes a stream, one invocation after the other, between START and END. The first line of the handler says whose
invocation it is (`smlt run=... worker=... rank=...`). That holds for repeated invocations too, and for those whose answer
was lost; the request ids in invocations.jsonl stand in for it where an invocation ended before its first line.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from smlt.client.invocations import Report, parse_report, read_invocations
from smlt.client.logs import LogLine
from smlt.client.runs import Run
from smlt.errors import StoreError
from smlt.store.aws import aws_client, aws_errors

#: CloudWatch takes 5 to 10 FilterLogEvents a second of an account:
#: https://docs.aws.amazon.com/AmazonCloudWatch/latest/logs/cloudwatch_limits_cwl.html
POLL_S = 2.0
#: Clocks differ, and a line may be there so much later than its time says.
MARGIN_S, LATE_S = 60.0, 15.0
#: An invocation that nobody waits for may go on for so long behind the run's end.
LONGEST_S = 900.0

_ID = r"([0-9A-Za-z-]{1,64})"
_START = re.compile(rf"START RequestId: {_ID}\b", re.ASCII)
_END = re.compile(rf"END RequestId: {_ID}\b", re.ASCII)
_OWNER = re.compile(r"smlt run=([A-Za-z0-9_-]{1,48}) worker=([A-Za-z0-9_-]{1,64}) rank=(\d{1,6})\s*\Z", re.ASCII)
#: The runtime's own words, before, behind or instead of a handler's.
_RUNTIME = re.compile(rf"(?:RequestId: {_ID} |\S+Z {_ID} Task timed out)", re.ASCII)


@dataclass
class _Execution:
    """One time that the function ran."""

    request_id: str
    worker_id: str = ""
    rank: int = -1
    ours: bool | None = None  # None: not known yet
    held: list[LogLine | Report] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"worker-{self.rank}" if self.rank >= 0 else (self.worker_id or self.request_id)

    def add(self, *what: LogLine | Report) -> Iterator[LogLine | Report]:
        """What can be told now: nothing before it is known whose it is, and nothing of another run's."""
        self.held += what
        if self.ours is None:
            return
        held, self.held = self.held, []
        for one in held if self.ours else ():
            if isinstance(one, LogLine):
                yield replace(one, worker=self.name)
            else:
                yield replace(one, worker_id=self.worker_id, rank=self.rank)


@dataclass
class _Stream:
    """A sandbox's log stream."""

    current: _Execution | None = None  # between START and END
    latest: _Execution | None = None
    before: list[LogLine] = field(default_factory=list)  # what was printed while the sandbox began
    beginning: bool = False


class Sorter:
    """Takes a log group's events in order, gives the lines and reports of one run. `known`: (worker id, rank) by request id."""

    def __init__(self, run: str, known: dict[str, tuple[str, int]]) -> None:
        self.run, self.known = run, known
        self.reported: set[str] = set()
        self._streams: dict[str, _Stream] = {}

    def take(self, events: Iterable[dict[str, Any]]) -> Iterator[LogLine | Report]:
        """The run's part of `events`, each with "timestamp" (ms), "message" and "logStreamName"."""
        for event in events:
            stream = self._streams.setdefault(event.get("logStreamName", ""), _Stream())
            yield from self._event(stream, event["timestamp"] / 1e3, event["message"])

    def finish(self) -> Iterator[LogLine | Report]:
        """The lines of invocations that are not known to have ended, and whose first line has not come."""
        for stream in self._streams.values():
            if stream.latest is not None:
                yield from self._decide(stream.latest)

    def _event(self, stream: _Stream, at: float, message: str) -> Iterator[LogLine | Report]:
        if message.startswith("INIT_START "):
            stream.current, stream.beginning, stream.before = None, True, []
        elif start := _START.match(message):
            worker = self.known.get(start[1])
            stream.current = stream.latest = _Execution(start[1], *(worker or ("", -1)), held=[*stream.before])
            stream.beginning, stream.before = False, []
        elif end := _END.match(message):
            if stream.current is not None and stream.current.request_id == end[1]:
                yield from self._decide(stream.current)
                stream.current = None
        elif message.startswith("REPORT RequestId: "):
            yield from self._report(stream, at, message)
        elif stream.beginning:
            stream.before += _lines(at, message)
        else:
            yield from self._printed(stream, at, message)

    def _printed(self, stream: _Stream, at: float, message: str) -> Iterator[LogLine | Report]:
        execution = stream.current
        if execution is None:
            named = _RUNTIME.match(message)
            execution = stream.latest
            if execution is None or (named and execution.request_id not in named.groups()):
                return
        owner = _OWNER.match(message) if execution.ours is None else None
        if owner is not None:
            execution.ours = owner[1] == self.run
            execution.worker_id, execution.rank = owner[2], int(owner[3])
            yield from execution.add()
            return
        for line in _lines(at, message):
            yield from execution.add(line)

    def _report(self, stream: _Stream, at: float, message: str) -> Iterator[LogLine | Report]:
        report = parse_report(message)
        execution = stream.latest
        if report is None or execution is None or execution.request_id != report.request_id:
            return
        yield from self._decide(execution)
        self.reported.add(report.request_id)
        line = LogLine(at, "", message.splitlines()[0].rstrip().replace("\t", "  "))
        yield from execution.add(line, replace(report, time=at))
        stream.current = None

    def _decide(self, execution: _Execution) -> Iterator[LogLine | Report]:
        """It has ended: without its first line, the request id tells whose it was."""
        if execution.ours is None:
            execution.ours = execution.request_id in self.known
            yield from execution.add()


def _lines(at: float, message: str) -> list[LogLine]:
    """An event is one print: it may hold several lines."""
    return [LogLine(at, "", line) for line in message.rstrip("\r\n").splitlines()] or [LogLine(at, "", "")]


class RunLogs:
    """The log group of a run's function. Raises as `smlt.client.logs.logs`."""

    def __init__(self, run: Run) -> None:
        self.run, self.group = run, str(run.status["log_group"])
        self.client = aws_client("logs", attempts=8)

    def lines(self) -> Iterator[LogLine]:
        """All lines until now, oldest first."""
        return iter(sorted((one for one in self._all() if isinstance(one, LogLine)), key=lambda line: line.time))

    def reports(self) -> Iterator[Report]:
        """All reports until now."""
        return (one for one in self._all() if isinstance(one, Report))

    def follow(self, poll_s: float = POLL_S) -> Iterator[LogLine]:
        """Lines as they come, until the run has ended and its last ones are there."""
        sorter, seen = Sorter(self.run.name, self._known()), dict[str, int]()
        start_ms, ended_since = self._span()[0], 0.0
        while True:
            sorter.known.update(self._known())
            if self.run.status.get("state") != "running":
                ended_since = ended_since or time.monotonic()
            events = [event for event in self._events(start_ms, None, waiting=True) if event["eventId"] not in seen]
            seen.update((event["eventId"], event["timestamp"]) for event in events)
            found = [one for one in sorter.take(events) if isinstance(one, LogLine)]
            yield from sorted(found, key=lambda line: line.time)
            complete = sorter.known and sorter.known.keys() <= sorter.reported
            if ended_since and (complete or time.monotonic() - ended_since > LATE_S):
                return
            # Lines may come late: what is asked again is told apart by its id.
            start_ms = max([start_ms, *(at - int(LATE_S * 1e3) for at in seen.values())])
            seen = {event_id: at for event_id, at in seen.items() if at >= start_ms}
            time.sleep(poll_s)

    def _all(self) -> Iterator[LogLine | Report]:
        start_ms, end_ms = self._span()
        sorter = Sorter(self.run.name, self._known())
        yield from sorter.take(self._events(start_ms, end_ms))
        yield from sorter.finish()

    def _known(self) -> dict[str, tuple[str, int]]:
        return {row.request_id: (row.worker_id, row.rank) for row in read_invocations(self.run.path)}

    def _span(self) -> tuple[int, int | None]:
        status = self.run.status
        starts = [row.started for row in read_invocations(self.run.path) if row.started]  # a resumed run began earlier
        begin = min([float(status.get("started") or time.time()), *starts]) - MARGIN_S
        ended = status.get("ended") if status.get("state") != "running" else None
        return max(0, int(begin * 1e3)), int((float(ended) + LONGEST_S + MARGIN_S) * 1e3) if ended else None

    def _events(self, start_ms: int, end_ms: int | None, *, waiting: bool = False) -> Iterator[dict[str, Any]]:
        options: dict[str, Any] = {"logGroupName": self.group, "startTime": start_ms}
        if end_ms is not None:
            options["endTime"] = end_ms
        with aws_errors(f"cannot read the logs in {self.group}"):
            try:
                for page in self.client.get_paginator("filter_log_events").paginate(**options):
                    yield from page["events"]
            except self.client.exceptions.ResourceNotFoundException as error:
                if not waiting:
                    raise StoreError(
                        f"there is no log group {self.group}: the function has not run, or its logs were deleted; "
                        f"look at the region and the profile"
                    ) from error
