"""What a lost worker means for the run: another in its place, fewer, or the end; and what a user is told at the end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import smlt.errors
from smlt.client.request import RunRequest
from smlt.client.starts import Started
from smlt.errors import SmltError, TaskError, WorkerLostError
from smlt.worker.stamped import split_stamp

#: Before a replacement is started: nothing the first time, then this, doubled each time in a row, up to the last.
BACKOFF_S, BACKOFF_MAX_S = 0.5, 30.0
#: Exit codes of what will not work the next time either: a configuration, a task, a checkpoint.
HOPELESS = (2, 5, 6)


class FailurePolicy:
    """Counts the failures of each rank since the last completed step, and raises when the run is to end."""

    def __init__(self, request: RunRequest) -> None:
        self.request = request
        self._failures: Counter[int] = Counter()  # by rank; -1: nobody's
        self._pauses: Counter[int] = Counter()  # by rank: that came before any step

    def step_completed(self) -> None:
        """Training goes on: what failed before does not count."""
        self._failures.clear()
        self._pauses.clear()

    @property
    def backoff_s(self) -> float:
        """How long to wait before another worker is started."""
        times = max(self._failures.values(), default=0)
        return min(BACKOFF_S * 2.0 ** (times - 2), BACKOFF_MAX_S) if times > 1 else 0.0

    @property
    def shrinks(self) -> bool:
        """Whether the job goes on with fewer."""
        return self.request.on_failure == "shrink"

    def count(self, rank: int, what: str, start: Started | None, step: int, code: int | None = None) -> None:
        """A worker (rank -1: nobody in particular) has failed. WorkerLostError when the run is to end."""
        self._failures[rank] += 1
        too_often = self._failures[rank] > self.request.max_restarts
        if self.request.on_failure == "stop" or too_often or code in HOPELESS:
            raise self.loss(rank, what, start, step)

    def count_pause(self, rank: int, start: Started, step: int) -> None:
        """A worker's time limit came before its first step. Cold, it has to begin anew: WorkerLostError when it always does."""
        self._pauses[rank] += not start.config.warm
        if self._pauses[rank] > self.request.max_restarts:
            what = f"worker {rank}: its time limit comes before it can train, {self._pauses[rank]} times in a row"
            if self.request.on == "lambda":
                advice = "deploy the function with a larger --timeout"
            elif self.request.on == "local":
                advice = "give a larger --time-limit, or keep workers --warm"
            else:
                advice = f"give a larger --time-limit, or let {self.request.on} run its workers for longer"
            raise self.loss(rank, f"{what}; {advice}", start, step)

    def loss(self, rank: int, what: str, start: Started | None, step: int) -> WorkerLostError:
        """The error that tells how a worker was lost, where its log is, and how that ends."""
        times = self._failures[rank]
        again = f" ({times} failures in a row without a step between)" if times > 1 else ""
        if start is None:
            return WorkerLostError(f"{what}{again}", [], step)
        return WorkerLostError(f"{what}{again}; its log: {start.log}\n{tail(start.log)}".rstrip(), [rank], step)


def reraised(failure: dict[str, Any]) -> SmltError:
    """What a worker has recorded as the error that ends the job, as it was raised there; with its traceback for a task's."""
    where = f"worker {failure['rank']}"
    if trace := failure["traceback"].rstrip():
        return TaskError(f"{where} failed at step {failure['step']}: {failure['error']}\n\n{trace}")
    kind, _, text = failure["error"].partition(": ")
    known = getattr(smlt.errors, kind, TaskError)
    error = known if isinstance(known, type) and issubclass(known, SmltError) else TaskError
    return error(f"{where} at step {failure['step']}: {text}")


def tail(path: Path, lines: int = 10) -> str:
    """The last lines of a log, without their times."""
    try:
        return "\n".join(split_stamp(line)[1] for line in path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
