"""Output with the time before every line: what lets `smlt logs` merge the logs of all workers.

    2026-01-02T15:30:00.123Z epoch 3

stdout and stderr of a worker go to one file, so they share the knowledge whether a line has begun. What native code prints by
itself has no time; a reader counts it to the line before.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, TextIO

_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ", re.ASCII)


def stamp(at: float) -> str:
    """Epoch seconds as ISO 8601 in UTC, to the millisecond, with a Z."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def split_stamp(line: str) -> tuple[float | None, str]:
    """The time of a line (epoch s, None when it has none) and the line without it."""
    match = _STAMP.match(line)
    if match is None:
        return None, line
    try:
        return datetime.fromisoformat(match[1]).timestamp(), line[match.end() :]
    except ValueError:  # digits, but no date
        return None, line


class _Place:
    """Where the output stands: at the start of a line, or within one. Shared by the streams that end in one file."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler may print while its thread does
        self.at_start = True
        if hasattr(os, "register_at_fork"):  # another thread may hold it at that moment
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()


class StampedStream:
    """A text stream that puts the time before every line; all but writing is the stream's own."""

    def __init__(self, stream: TextIO, place: _Place | None = None) -> None:
        self._stream, self._place = stream, place or _Place()

    def write(self, text: str) -> int:
        """Write the text, and the time where a line begins."""
        if not text:
            return 0
        with self._place.lock:
            now = f"{stamp(time.time())} "
            lines = text.split("\n")
            ended = lines.pop() == ""
            stamped = (now if self._place.at_start else "") + f"\n{now}".join(lines if ended else text.split("\n"))
            self._place.at_start = ended
            self._stream.write(stamped + "\n" if ended else stamped)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def stamp_output() -> None:
    """Put the time before every line that this process prints. Call it before logging is set up."""
    place = _Place()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:
            setattr(sys, name, StampedStream(stream, place))
