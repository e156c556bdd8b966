"""events.jsonl: what happened in a run beside its steps: workers' starts and ends, generations, warnings, starts of the run.

A row has "time" (epoch s) and "event":

begin     the scheduler has begun: pid, host, resumed, workers
started   a worker was started: worker_id, rank (the one it is meant for), spare, before (whose invocation it goes on), warm
ready     it has model and data in its memory: worker_id
freeze    a generation is opened, the workers gather: generation
plan      they go on: generation, world_size, ranks (worker_id -> rank)
ended     a worker has ended: worker_id, rank, how ("done", "paused", "was killed by signal 9", ...), code
warning   text
over      the run has ended: state, error
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from smlt.client.records import json_line
from smlt.client.rows import append_row
from smlt.client.runs import Run
from smlt.client.watching import Listener
from smlt.errors import CheckpointError

FILE = "events.jsonl"


class Events:
    """Writes the rows. What cannot be written is left out: metrics.jsonl, on the same disk, is what a run needs."""

    def __init__(self, folder: Run) -> None:
        self.path = folder.path / FILE

    def write(self, event: str, **values: Any) -> None:
        """Add a row."""
        with suppress(CheckpointError):
            append_row(self.path, json_line({"time": time.time(), "event": event, **values}))


class Journal(Listener):
    """Writes down what a run's user is warned of, for whoever looks at it later or from another terminal."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self.events = events

    def warning(self, text: str) -> None:
        """See Progress."""
        self.events.write("warning", text=text)

    def stopping(self) -> None:
        """See Progress."""
        self.events.write("warning", text="asked to stop: the workers finish their step")
