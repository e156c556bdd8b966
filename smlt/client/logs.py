"""The logs of all workers of a run as one, in the order of time: files of a local run, CloudWatch Logs of functions."""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from smlt.client.invocations import Report
from smlt.client.runs import Run
from smlt.errors import ConfigError
from smlt.worker.stamped import split_stamp

if TYPE_CHECKING:
    from smlt.client.cloudwatch import RunLogs

#: How often --follow looks at the files.
POLL_S = 0.2
_READ_BYTES = 1 << 20
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")  # in every locale
#: How Valkey and Redis begin a line: process, role, local time. serverLogRaw in
#: https://github.com/valkey-io/valkey/blob/9.0/src/server.c
_STORE_LINE = re.compile(r"\d+:[A-Z] (\d\d) ([A-Z][a-z]{2}) (\d{4}) (\d\d):(\d\d):(\d\d)\.(\d{3}) ", re.ASCII)
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, order=True)
class LogLine:
    """One line: `time` in epoch s, `worker` "worker-<rank>" or "store"."""

    time: float
    worker: str
    text: str


def logs(run: Run, *, since: float = 0.0, worker: int | None = None) -> Iterator[LogLine]:
    """The lines of a run until now, oldest first. `since`: epoch s; `worker`: this rank alone.

    Raises CheckpointError for a run folder that cannot be read, StoreError (StoreAuthError, StoreUnavailable) when
    CloudWatch Logs refuses or does not answer.
    """
    wanted = _wanted(since, worker)
    return filter(wanted, _cloudwatch(run).lines() if is_on_lambda(run) else _local(run))


def follow(run: Run, *, since: float = 0.0, worker: int | None = None) -> Iterator[LogLine]:
    """As `logs`, and what comes until the run has ended. Lines that are there at the same time come oldest first."""
    wanted = _wanted(since, worker)
    return filter(wanted, _cloudwatch(run).follow() if is_on_lambda(run) else _follow_local(run))


def reports(run: Run) -> Iterator[Report]:
    """The REPORT line of every invocation of a run on Lambda, repeated and unanswered ones too; none of a local run."""
    return _cloudwatch(run).reports() if is_on_lambda(run) else iter(())


def is_on_lambda(run: Run) -> bool:
    """Whether the run's workers are functions."""
    return bool(run.status.get("log_group"))


def _cloudwatch(run: Run) -> RunLogs:
    from smlt.client.cloudwatch import RunLogs

    return RunLogs(run)


def _wanted(since: float, worker: int | None) -> Callable[[LogLine], bool]:
    name = None if worker is None else f"worker-{worker}"
    return lambda line: line.time >= since and name in (None, line.worker)


def parse_since(text: str, now: float | None = None) -> float:
    """`--since`: "90s", "10m", "2h", "1d" ago, or a time in ISO 8601 (UTC when it names no zone). Epoch s; ConfigError."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text, re.ASCII)
    if match:
        return (time.time() if now is None else now) - int(match[1]) * _UNITS_S[match[2]]
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(f"--since {text!r}: write 90s, 10m, 2h, 1d, or a time such as 2026-01-02T15:30:00Z") from None


# ---- files ----


class _File:
    """A log file that grows: each line with its time; one without has that of the line before."""

    def __init__(self, path: Path, began: float) -> None:
        self.path, self.name, self.time = path, path.stem, began
        self._offset, self._rest = 0, b""

    def lines(self, *, last: bool) -> Iterator[LogLine]:
        """What has come since the last time; with `last` also a line without its end."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                while chunk := file.read(_READ_BYTES):
                    self._offset += len(chunk)
                    *whole, self._rest = (self._rest + chunk).split(b"\n")
                    yield from map(self._line, whole)
        except FileNotFoundError:  # removed in between
            return
        if last and self._rest:
            rest, self._rest = self._rest, b""
            yield self._line(rest)

    def _line(self, raw: bytes) -> LogLine:
        text = raw.decode(errors="replace").removesuffix("\r")
        at, text = (_store_time(text), text) if self.name == "store" else split_stamp(text)
        if at is not None:
            self.time = at
        return LogLine(self.time, self.name, text)


def _store_time(line: str) -> float | None:
    match = _STORE_LINE.match(line)
    if match is None or match[2] not in _MONTHS:
        return None
    day, _, year, hour, minute, second, millisecond = match.groups()
    moment = (int(year), _MONTHS.index(match[2]) + 1, int(day), int(hour), int(minute), int(second), 0, 0, -1)
    try:
        return time.mktime(moment) + int(millisecond) / 1e3
    except (OverflowError, ValueError):
        return None


def _files(run: Run, known: dict[Path, _File]) -> list[_File]:
    began = float(run.status.get("started") or 0.0)
    for path in sorted((run.path / "logs").glob("*.log")):
        if path not in known:
            known[path] = _File(path, began)
    return list(known.values())


def _local(run: Run) -> Iterator[LogLine]:
    # Lines of one log keep their order, whatever their times are.
    files = _files(run, {})
    return heapq.merge(*(file.lines(last=True) for file in files), key=lambda line: line.time)


def _follow_local(run: Run) -> Iterator[LogLine]:
    known: dict[Path, _File] = {}
    while True:
        # Before the files are read: what was printed until the end is in them then.
        ended = run.status.get("state") != "running"
        files = _files(run, known)
        yield from heapq.merge(*(file.lines(last=ended) for file in files), key=lambda line: line.time)
        if ended:
            return
        time.sleep(POLL_S)
