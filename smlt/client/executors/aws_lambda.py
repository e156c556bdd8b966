"""Workers as invocations of a deployed function.

An invocation is synchronous: its answer says how it ended and its log what it is billed. The function hears of its
scheduler through the store (the lease), so a client that goes away takes nothing with it. Nobody can end an invocation
from outside: whoever is given up here is fenced, and leaves when it next looks into the store.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from smlt.client.executors import account_of
from smlt.client.executors.invocation import Answer, Invoker, Keep
from smlt.client.executors.preparation import Target
from smlt.errors import SmltError, StoreError
from smlt.worker.config import WorkerConfig

#: So long workers that are told that the job is over may take to leave: a step, at most.
DRAIN_S = 10.0
#: Throttled for so many times, it is worth a word.
THROTTLED_OFTEN = 20


class LambdaWorker:
    """One invocation, in a thread of its own."""

    def __init__(self, executor: LambdaExecutor, config: WorkerConfig, log_path: Path) -> None:
        self.config, self._executor, self._log_path = config, executor, log_path
        self._given_up = threading.Event()
        self._answer: Answer | None = None
        self._refused = 0.0
        threading.Thread(target=self._run, name=f"smlt-{config.worker_id}", daemon=True).start()

    @property
    def runs(self) -> bool:
        """Whether its function may still be running."""
        return self._answer is None

    @property
    def is_out_of_sight(self) -> bool:
        """Whether its connection is lost: it may run on, and its end will not be seen."""
        return self._answer is not None and self._answer.code is None and self._answer.error is None

    def poll(self) -> int | None:
        answer = self._answer
        if answer is None:
            return None
        if answer.error is not None:
            raise answer.error
        return answer.code  # None when it is out of sight: its metadata key tells

    def refused(self) -> float:
        return self._refused

    def account(self) -> str:
        answer = self._answer
        return account_of(0) if answer is None else answer.account

    def invoke(self, config: WorkerConfig) -> bool:
        """False: Lambda chooses the sandbox, and takes a warm one where there is one."""
        return False

    def kill(self) -> None:
        self._given_up.set()

    def _run(self) -> None:
        try:
            answer = self._executor.invoke(self.config, self._given_up, self._was_refused)
            if answer.log:
                with self._log_path.open("a") as file:
                    file.write(answer.log)
        except (SmltError, OSError) as error:  # nothing more can be written down: the disk is full, say
            answer = Answer(error=error if isinstance(error, SmltError) else StoreError(f"{self._log_path}: {error.strerror}"))
        self._answer = answer

    def _was_refused(self) -> None:
        self._refused = time.monotonic()


class LambdaExecutor:
    """Starts workers by `invoker`. At most `concurrency` invocations are under way at a time.

    `target`: the function with its memory; `prepare` makes it ready with another; `keep` takes a row for each invocation;
    `patience_s`: how long one that is throttled is tried again.
    """

    def __init__(
        self,
        invoker: Invoker,
        concurrency: int,
        target: Target,
        prepare: Callable[[int], Target],
        keep: Keep,
        patience_s: float = 60.0,
    ) -> None:
        self.invoker, self._keep, self._patience_s = invoker, keep, patience_s
        self.target, self._prepare = target, prepare
        self._targets: dict[int, Target | SmltError | None] = {target.memory_mb: target}  # None: it is being made
        self.concurrency: int | None = concurrency
        self._slots = threading.BoundedSemaphore(concurrency)
        self._lock = threading.Lock()
        self._running: set[LambdaWorker] = set()
        self._notes: list[str] = []
        self.requests: Counter[str] = Counter()  # of all workers to the object store, by kind

    def start(self, config: WorkerConfig, log_path: Path) -> LambdaWorker:
        worker = LambdaWorker(self, config, log_path)
        self._running = {other for other in self._running if other.runs or other.is_out_of_sight} | {worker}
        return worker

    def invoke(self, config: WorkerConfig, given_up: threading.Event, refused: Callable[[], None]) -> Answer:
        """One worker's invocation, to its end."""
        while not self._slots.acquire(timeout=0.1):
            if given_up.is_set():
                return Answer()
        try:
            answer = self.invoker.invoke({"smlt_worker": json.loads(config.to_json())}, given_up, self._patience_s, refused)
        finally:
            self._slots.release()
        if answer.row is not None:
            self._keep(replace(answer.row, worker_id=config.worker_id, rank=config.rank))
        with self._lock:
            self._take(answer.payload.get("requests"))
        return answer

    def _take(self, requests: Any) -> None:
        if isinstance(requests, dict):
            self.requests.update({str(kind): int(count) for kind, count in requests.items() if count})

    def threads(self, world_size: int) -> int:
        return self.target.threads

    def make_ready(self, memory_mb: int) -> bool:
        """It takes some seconds, in a thread: the scheduler has its lease to renew meanwhile."""
        if memory_mb not in self._targets:
            self._targets[memory_mb] = None
            threading.Thread(target=self._make, args=(memory_mb,), name=f"smlt-{memory_mb}mb", daemon=True).start()
        found = self._targets[memory_mb]
        if isinstance(found, SmltError):
            del self._targets[memory_mb]  # the next time it may work
            raise found
        return found is not None

    def _make(self, memory_mb: int) -> None:
        try:
            self._targets[memory_mb] = self._prepare(memory_mb)
        except SmltError as error:
            self._targets[memory_mb] = error

    def use(self, memory_mb: int) -> None:
        target = self._targets[memory_mb]
        assert isinstance(target, Target)
        self.target, self.invoker.qualifier = target, target.qualifier

    def drain(self, tell: Callable[[], None]) -> None:
        if not any(worker.runs or worker.is_out_of_sight for worker in self._running):
            return
        tell()
        deadline = time.monotonic() + DRAIN_S
        while any(worker.runs for worker in self._running) and time.monotonic() < deadline:
            time.sleep(0.02)

    def notes(self) -> list[str]:
        if self.invoker.throttled >= THROTTLED_OFTEN:
            times = self.invoker.throttled
            self._notes.append(
                f"Lambda has throttled {times} invocations: look at the function's and the account's concurrency"
            )
            self.invoker.throttled = 0
        notes, self._notes = self._notes, []
        return notes
