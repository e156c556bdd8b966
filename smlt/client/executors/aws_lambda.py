"""Workers as invocations of a deployed function.

An invocation is synchronous: its answer says how it ended and its log what it is billed. The function hears of its
scheduler through the store (the lease), so a client that goes away takes nothing with it. Nobody can end an invocation
from outside: whoever is given up here is fenced, and leaves when it next looks into the store.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from smlt.client.executors import RunContext, Traits
from smlt.client.executors.calls import CallingExecutor, CallWorker
from smlt.client.executors.invocation import Answer, Invoker, Keep
from smlt.client.executors.preparation import Target, check_reach, lambda_client, prepare
from smlt.client.invocations import append_invocation
from smlt.client.lambda_runs import place
from smlt.errors import SmltError

if TYPE_CHECKING:
    from smlt.client.request import RunRequest

#: More connections at once are kept for workers that the run begins with only.
CONNECTIONS_MAX = 1000
#: Throttled for so many times, it is worth a word.
THROTTLED_OFTEN = 20


class LambdaExecutor(CallingExecutor):
    """Invocations of a function that `smlt deploy` has made.

    `invoker` starts them, at most `concurrency` at a time. `target`: the function with its memory; `prepare` makes it ready
    with another; `keep` takes a row for each invocation; `patience_s`: how long one that is throttled is tried again.
    """

    traits = Traits(kills=False, keeps_memory=True, is_billed=True)

    def __init__(
        self,
        invoker: Invoker,
        concurrency: int,
        target: Target,
        prepare: Callable[[int], Target],
        keep: Keep,
        patience_s: float = 60.0,
    ) -> None:
        super().__init__()
        self.invoker, self._keep, self._patience_s = invoker, keep, patience_s
        self.target, self._prepare = target, prepare
        self._targets: dict[int, Target | SmltError | None] = {target.memory_mb: target}  # None: it is being made
        self.concurrency = concurrency
        self._slots = threading.BoundedSemaphore(concurrency)
        self._lock = threading.Lock()
        self._notes: list[str] = []
        self.requests: Counter[str] = Counter()  # of all workers to the object store, by kind

    @classmethod
    def place(cls, request: RunRequest, store: str | None) -> tuple[RunRequest, str | None]:
        return place(request, store)

    @classmethod
    def open(cls, context: RunContext) -> Self:
        """When the function is there, has room for all workers, and reaches the stores."""
        request, run = context.request, context.run
        target = prepare(request.function, request.workers + request.spares, request.memory_mb)
        at_once = min(target.concurrency, max(CONNECTIONS_MAX, request.workers + request.spares))
        invoker = Invoker(lambda_client(at_once), request.function, target.qualifier)
        probe = check_reach(invoker, target, context.store_url, context.object_store_url)
        if probe is not None:
            append_invocation(run.path, probe)
        found = target.deployment
        run.write_status(
            function=request.function,
            log_group=found.log_group,
            memory_mb=target.memory_mb,
            tmp_mb=found.tmp_mb,
            architecture=found.arch,
        )
        make = partial(prepare, request.function, 1)
        return cls(invoker, at_once, target, make, partial(append_invocation, run.path))

    def call(self, worker: CallWorker) -> Answer:
        """One worker's invocation, to its end."""
        config, given_up = worker.config, worker.given_up
        while not self._slots.acquire(timeout=0.1):
            if given_up.is_set():
                return Answer()
        try:
            event = {"smlt_worker": json.loads(config.to_json())}
            answer = self.invoker.invoke(event, given_up, self._patience_s, worker.was_refused)
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

    def notes(self) -> list[str]:
        if self.invoker.throttled >= THROTTLED_OFTEN:
            times = self.invoker.throttled
            self._notes.append(
                f"Lambda has throttled {times} invocations: look at the function's and the account's concurrency"
            )
            self.invoker.throttled = 0
        notes, self._notes = self._notes, []
        return notes
