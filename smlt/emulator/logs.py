"""Logs: what a sandbox writes, line by line or in frames, into moto's CloudWatch Logs, with Lambda's own lines."""

from __future__ import annotations

import math
import os
import selectors
import threading
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

from smlt.emulator.functions import Function

#: How much of an invocation's log X-Amz-Log-Result holds (https://docs.aws.amazon.com/lambda/latest/api/API_Invoke.html).
TAIL_BYTES = 4096
_FRAME_HEADER_BYTES = 16  # type, length, time in microseconds: awslambdaric.bootstrap.FramedTelemetryLogSink
_FRAME_TYPE = b"\xa5\x5a"
_MESSAGE_BYTES = 262_118  # CloudWatch Logs takes 256 KiB an event, 26 bytes of them its own

Put = Callable[[str, str, list[dict[str, object]]], None]


def new_stream_name(function: Function) -> str:
    """YYYY/MM/DD/[version]hex, as Lambda names a sandbox's stream."""
    return f"{time.strftime('%Y/%m/%d', time.gmtime())}/[{function.version}]{uuid.uuid4().hex}"


class Report(NamedTuple):
    """What Lambda says of an invocation when it is over. Times in milliseconds, memory in MB."""

    request_id: str
    duration_ms: float
    memory_mb: int
    max_memory_mb: int
    init_ms: float | None
    status: str = ""  # "", "timeout" or "error"
    error_type: str = ""

    @property
    def billed_ms(self) -> int:
        """Duration and, since August 2025, the initialisation, rounded up to a millisecond
        (https://aws.amazon.com/blogs/compute/aws-lambda-standardizes-billing-for-init-phase/)."""
        return math.ceil(self.duration_ms + (self.init_ms or 0))

    @property
    def line(self) -> str:
        """The REPORT line."""
        parts = [
            f"REPORT RequestId: {self.request_id}",
            f"Duration: {self.duration_ms:.2f} ms",
            f"Billed Duration: {self.billed_ms} ms",
            f"Memory Size: {self.memory_mb} MB",
            f"Max Memory Used: {min(self.max_memory_mb, self.memory_mb)} MB",
        ]
        parts += [] if self.init_ms is None else [f"Init Duration: {self.init_ms:.2f} ms"]
        parts += [f"Status: {self.status}"] if self.status else []
        parts += [f"Error Type: {self.error_type}"] if self.error_type else []
        return "\t".join(parts) + "\t\n"


class LogStream:
    """The log stream of one sandbox: keeps the tail of the invocation under way, and puts all of it in moto."""

    def __init__(self, function: Function, name: str, put: Put) -> None:
        self.name = name
        self._group = function.log_group
        self._put = put
        self._lock = threading.Lock()
        self._tail: list[str] = []

    def begin(self) -> None:
        """An invocation begins: the tail is its own."""
        with self._lock:
            self._tail.clear()

    def write(self, *messages: str, at_ms: int | None = None) -> None:
        """Add messages, each an event of its own."""
        now = int(time.time() * 1000) if at_ms is None else at_ms
        events: list[dict[str, object]] = [{"timestamp": now, "message": text[:_MESSAGE_BYTES]} for text in messages if text]
        if not events:
            return
        with self._lock:
            self._tail += [text if text.endswith("\n") else text + "\n" for text in messages]
            self._put(self._group, self.name, events)

    def tail(self) -> bytes:
        """The last 4 KB of what was written since `begin`."""
        with self._lock:
            return "".join(self._tail).encode()[-TAIL_BYTES:]


class Pipes:
    """Reads a sandbox's output (lines) and the frames of its runtime client (whole messages) into a log stream."""

    def __init__(self, stream: LogStream) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        output, self.output = os.pipe()
        frames, self.frames = os.pipe()
        self._kept = {output: b"", frames: b""}
        self._frames = frames
        self._selector = selectors.DefaultSelector()
        for end in (output, frames):
            os.set_blocking(end, False)
            self._selector.register(end, selectors.EVENT_READ)
        threading.Thread(target=self._read, name="smlt-lambda-logs", daemon=True).start()

    def started(self) -> None:
        """The sandbox has the writing ends: close ours, so that the end of its processes is the end of the pipes."""
        os.close(self.output)
        os.close(self.frames)

    def drain(self) -> None:
        """Take all that has been written so far, also a line without its end."""
        with self._lock:
            for end in list(self._kept):
                self._take(end, at_end=False)
                if end != self._frames and self._kept.get(end):
                    self._stream.write(self._kept[end].decode(errors="replace"))
                    self._kept[end] = b""

    def _read(self) -> None:
        while self._kept:
            self._selector.select()
            with self._lock:
                for end in list(self._kept):
                    self._take(end, at_end=True)
        self._selector.close()

    def _take(self, end: int, *, at_end: bool) -> None:
        """Read what is there. `at_end`: also close the pipe when that was all, which wakes nobody, so only the reader does."""
        while True:
            try:
                read = os.read(end, 65536)
            except BlockingIOError:
                break
            if not read and not at_end:
                return
            if not read:
                self._selector.unregister(end)
                os.close(end)
                rest = self._kept.pop(end)
                if rest and end != self._frames:
                    self._stream.write(rest.decode(errors="replace"))
                return
            self._kept[end] += read
            self._kept[end] = self._framed(self._kept[end]) if end == self._frames else self._lines(self._kept[end])

    def _lines(self, kept: bytes) -> bytes:
        *lines, rest = kept.split(b"\n")
        self._stream.write(*(line.decode(errors="replace") + "\n" for line in lines))
        return rest

    def _framed(self, kept: bytes) -> bytes:
        while len(kept) >= _FRAME_HEADER_BYTES:
            if not kept.startswith(_FRAME_TYPE):  # not the runtime client: something wrote to a file that is not its own
                self._stream.write(kept.decode(errors="replace"))
                return b""
            length = int.from_bytes(kept[4:8], "big")
            if len(kept) < _FRAME_HEADER_BYTES + length:
                break
            message = kept[_FRAME_HEADER_BYTES : _FRAME_HEADER_BYTES + length].decode(errors="replace")
            self._stream.write(message, at_ms=int.from_bytes(kept[8:16], "big") // 1000)
            kept = kept[_FRAME_HEADER_BYTES + length :]
        return kept
