"""A run's invocations: a row for each in `invocations.jsonl`, and Lambda's REPORT lines that say what each was billed.

Lambda invokes at least once: the same request may run twice, and is billed for each time. Such a second time has a REPORT
line, not a row of the client's, and becomes a row here (`with_reports`).
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from smlt.client.rows import append_row
from smlt.errors import CheckpointError

FILE = "invocations.jsonl"
#: A REPORT line is some 200 characters; with X-Ray's trailer and an error's type less than this.
_LINE_MAX = 4096
#: What a field's number may have: more is no time in ms and no memory in MB.
_DIGITS = 12
_NUMBER = re.compile(rf"(\d{{1,{_DIGITS}}})(?:\.(\d{{1,{_DIGITS}}}))? (ms|MB)\Z", re.ASCII)
_REQUEST_ID = re.compile(r"[0-9A-Za-z-]{1,64}\Z", re.ASCII)


@dataclass(frozen=True)
class Report:
    """A REPORT line: what one invocation was billed.

    https://docs.aws.amazon.com/lambda/latest/dg/python-logging.html. `billed_ms` is what counts: since August 2025 it holds
    the init phase too. `status`: "" when it went well, "timeout", "error", ... `time` (epoch s), `worker_id` and `rank` are
    not in the line: whoever reads the log knows them.
    """

    request_id: str
    duration_ms: float
    billed_ms: int
    memory_mb: int
    max_memory_mb: int
    init_ms: float | None = None
    restore_ms: float | None = None
    status: str = ""
    error_type: str = ""
    time: float = 0.0
    worker_id: str = ""
    rank: int = -1


@dataclass(frozen=True)
class Invocation:
    """One time that a worker's function ran.

    `started`: epoch s. `billed_ms` None: no REPORT line has been seen yet. `outcome`: how it ended ("done", "paused",
    "timeout", "error", "lost", "duplicate", ...). `rank` -1: not known.
    """

    request_id: str
    worker_id: str = ""
    rank: int = -1
    started: float = 0.0
    billed_ms: int | None = None
    memory_mb: int = 0
    max_memory_mb: int | None = None
    init_ms: float | None = None
    outcome: str = ""


def parse_report(line: str) -> Report | None:
    """A REPORT line as Lambda writes it; None for any other line, and for one that is cut off or makes no sense."""
    if not line.startswith("REPORT RequestId: ") or len(line) > _LINE_MAX:
        return None
    found: dict[str, str] = {}
    for part in re.split(r"[\t\r\n]+", line.removeprefix("REPORT ").rstrip()):
        name, mark, value = part.strip().partition(": ")
        if mark and found.setdefault(name, value.strip()) != value.strip():
            return None  # a task's own line that only looks like one
    request_id = found.get("RequestId", "")
    duration, billed = _number(found, "Duration", "ms"), _number(found, "Billed Duration", "ms")
    memory, used = _number(found, "Memory Size", "MB"), _number(found, "Max Memory Used", "MB")
    if duration is None or billed is None or used is None or not memory or not _REQUEST_ID.match(request_id):
        return None
    if not (billed.is_integer() and memory.is_integer() and used.is_integer()):
        return None
    return Report(
        request_id=request_id,
        duration_ms=duration,
        billed_ms=int(billed),
        memory_mb=int(memory),
        max_memory_mb=int(used),
        init_ms=_number(found, "Init Duration", "ms"),
        restore_ms=_number(found, "Restore Duration", "ms"),
        status=found.get("Status", ""),
        error_type=found.get("Error Type", ""),
    )


def _number(found: dict[str, str], name: str, unit: str) -> float | None:
    match = _NUMBER.match(found.get(name, ""))
    return float(f"{match[1]}.{match[2] or 0}") if match and match[3] == unit else None


def with_reports(invocations: Iterable[Invocation], reports: Iterable[Report]) -> list[Invocation]:
    """The rows with what their REPORT lines say, and a row more for each report that has none.

    The n-th report of a request id belongs to the n-th row with it. A report too many is an invocation that Lambda repeated
    ("duplicate"); one whose request id no row has is an invocation whose answer was lost ("unanswered").
    """
    by_id: defaultdict[str, list[Report]] = defaultdict(list)
    for report in sorted(reports, key=lambda report: report.time):
        by_id[report.request_id].append(report)
    rows, seen = list[Invocation](), set[str]()
    for row in invocations:
        seen.add(row.request_id)
        rows.append(_joined(row, by_id[row.request_id].pop(0)) if by_id[row.request_id] else row)
    for request_id, left in by_id.items():
        for report in left:
            outcome = "duplicate" if request_id in seen else "unanswered"
            started = max(0.0, report.time - report.duration_ms / 1e3)
            row = Invocation(request_id, report.worker_id, report.rank, started, outcome=report.status or outcome)
            rows.append(_joined(row, report))
            seen.add(request_id)
    return sorted(rows, key=lambda row: row.started)


def _joined(row: Invocation, report: Report) -> Invocation:
    return replace(
        row,
        worker_id=row.worker_id or report.worker_id,
        rank=row.rank if row.rank >= 0 else report.rank,
        billed_ms=report.billed_ms,
        memory_mb=report.memory_mb,
        max_memory_mb=report.max_memory_mb,
        init_ms=report.init_ms,
        outcome=row.outcome or report.status or "done",
    )


def append_invocation(run_path: Path, row: Invocation) -> None:
    """Add a row to a run's invocations.jsonl. CheckpointError when the file cannot be written."""
    known = {name: value for name, value in asdict(row).items() if value is not None}
    append_row(Path(run_path) / FILE, json.dumps(known))


def read_invocations(run_path: Path) -> list[Invocation]:
    """The rows of a run's invocations.jsonl, [] when it has none; CheckpointError when the file cannot be read.

    A row that was cut short is left out: the REPORT line of the log brings it back (`with_reports`).
    """
    path = Path(run_path) / FILE
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    found = (_row(line) for line in lines)
    return [row for row in found if row is not None]


_KINDS: dict[str, tuple[type, ...]] = {
    "request_id": (str,),
    "worker_id": (str,),
    "outcome": (str,),
    "rank": (int,),
    "started": (int, float),
    "billed_ms": (int,),
    "memory_mb": (int,),
    "max_memory_mb": (int,),
    "init_ms": (int, float),
}
assert {field.name for field in fields(Invocation)} == set(_KINDS)


def _row(line: bytes) -> Invocation | None:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not value.get("request_id"):
        return None
    kept = {name: value[name] for name in _KINDS if value.get(name) is not None}
    if any(isinstance(one, bool) or not isinstance(one, _KINDS[name]) for name, one in kept.items()):
        return None
    if any(not 0 <= kept.get(name, 0) < math.inf for name in ("started", "billed_ms", "memory_mb", "max_memory_mb")):
        return None
    return Invocation(**kept)
