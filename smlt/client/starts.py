"""Every start of a worker: which is due, which is ready, how its process fares."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from smlt.client.events import Events
from smlt.client.executors import Executor, Worker
from smlt.client.runs import Run
from smlt.worker.config import WorkerConfig

#: A worker that has not acknowledged so long after it was started, or --timeout when that is longer, does not come.
START_S = 120.0
#: A started worker that has given no sign of life for so long never will.
SIGN_S = 60.0
#: Cold workers that have paused end by themselves within that.
END_S = 1.0


@dataclass
class Started:
    """One start of a worker."""

    config: WorkerConfig
    log: Path
    not_before: float  # monotonic; it is started then
    handle: Worker | None = None
    started: float = 0.0
    ready: bool = False  # it has acknowledged a generation: model and data are in its memory
    watched_from: float | None = None  # monotonic; from then on a missing metadata key means that it is lost
    gone: bool = False  # it has ended; its last reports are read before that is looked into
    before: str = ""  # whose next invocation it is
    sign_s: float = 0.0  # its executor's: how long its first sign of life may take, where that is longer than SIGN_S

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs or is still to be started."""
        return None if self.handle is None else self.handle.poll()

    @property
    def overdue(self) -> bool:
        """Whether it should have acknowledged, or given a sign of life, by now."""
        if self.handle is None or self.ready:
            return False
        since = max(self.started, self.handle.refused())  # throttled, it could not come yet: how long, its executor says
        return time.monotonic() - since > self.start_s

    @property
    def start_s(self) -> float:
        """How long it may take to come: data and model may be large. Its first sign of life comes before it loads them."""
        return max(SIGN_S, self.sign_s) if self.watched_from is None else max(START_S, self.config.timeout_s)


class Starts(dict[str, Started]):
    """The starts that have not been dealt with to their end, by worker id. `template` is every worker's configuration."""

    def __init__(self, executor: Executor, folder: Run, template: WorkerConfig, events: Events) -> None:
        super().__init__()
        self.executor, self.folder, self.template, self.events = executor, folder, template, events
        self._number = 0

    def new(self, index: int, *, spare: bool = False, delay_s: float = 0.0) -> str:
        """Another worker, to be started in `delay_s`; its id. `index` names its log."""
        self._number += 1
        worker_id = f"w{self._number}-{os.urandom(4).hex()}"
        config = replace(self.template, rank=index, worker_id=worker_id, spare=spare)
        log, sign_s = self.folder.log_path(f"worker-{index}"), self.executor.traits.start_s
        self[worker_id] = Started(config, log, time.monotonic() + delay_s, sign_s=sign_s)
        return worker_id

    def start_what_is_due(self) -> None:
        """Start whoever's time has come."""
        now = time.monotonic()
        for start in self.values():
            if start.handle is None and start.not_before <= now:
                start.handle, start.started = self.executor.start(start.config, start.log), now
                self._note(start, warm=False)

    def invoke_again(self, worker_id: str, index: int, end_by: float | None = None) -> str:
        """A worker that has paused goes on, warm where its process is still there, else cold; its new id.

        `end_by` (monotonic): until when a cold one's process may take to end; END_S from now when it is not given.
        """
        before = self.pop(worker_id, None)
        new = self.new(index, spare=before is not None and before.config.spare)
        if before is not None and before.handle is not None:
            start = self[new]
            start.before = worker_id
            self.events.write("ended", worker_id=worker_id, rank=index, how="paused", code=None)
            if start.config.warm and before.handle.invoke(start.config):
                start.handle, start.started = before.handle, time.monotonic()
                self._note(start, warm=True)
            elif not start.config.warm:
                _let_end(before.handle, time.monotonic() + END_S if end_by is None else end_by)
        return new

    def lose(self, worker_id: str, how: str, code: int | None = None) -> Started | None:
        """End what is left of a worker; what is known of it. `how`, `code`: how it has come to that, for the record."""
        start = self.pop(worker_id, None)
        if start is not None and start.handle is not None:
            start.handle.kill()
            self.events.write("ended", worker_id=worker_id, rank=start.config.rank, how=how, code=code)
        return start

    def finish(self, worker_id: str, rank: int, how: str) -> None:
        """A worker has ended in order."""
        del self[worker_id]
        self.events.write("ended", worker_id=worker_id, rank=rank, how=how, code=0)

    def spares(self, busy: Collection[str]) -> list[str]:
        """Workers that wait for a place."""
        return [worker_id for worker_id, start in self.items() if start.config.spare and worker_id not in busy]

    def kill_all(self) -> None:
        """No worker is left."""
        for worker_id, start in self.items():
            if start.handle is not None:
                start.handle.kill()
                self.events.write("ended", worker_id=worker_id, rank=start.config.rank, how="ended with the run", code=None)

    def _note(self, start: Started, *, warm: bool) -> None:
        config, more = start.config, {"before": start.before, "warm": warm} if start.before else {}
        self.events.write("started", worker_id=config.worker_id, rank=config.rank, spare=config.spare, **more)


def _let_end(handle: Worker, end_by: float) -> None:
    while handle.poll() is None and time.monotonic() < end_by:
        time.sleep(0.01)
    handle.kill()
