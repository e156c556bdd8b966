"""Workers that are calls: an executor that has its engine run each worker in one call, and waits for it in a thread."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smlt.client.executors import Executor, Worker, account_of
from smlt.errors import SmltError, StoreError
from smlt.worker.config import WorkerConfig

#: So long workers that are told that the job is over may take to leave: a step, at most.
DRAIN_S = 10.0
#: How often a call looks whether its worker has been given up.
LOOK_S = 0.05


@dataclass
class Ending:
    """What came of a call. `code` None: its worker may run on out of sight, or it was given up unstarted."""

    code: int | None = None
    account: str = ""  # how it ended, behind "worker 3"
    error: SmltError | None = None  # why none can be started
    log: str = ""  # the end of what it printed


class CallWorker(Worker):
    """One call, in a thread of its own. The call ends its worker, if it can, when `given_up` is set."""

    def __init__(self, call: Callable[[CallWorker], Ending], config: WorkerConfig, log_path: Path) -> None:
        self.config, self._call, self.log_path = config, call, log_path
        self.given_up = threading.Event()
        self._ending: Ending | None = None
        self._refused = 0.0
        threading.Thread(target=self._run, name=f"smlt-{config.worker_id}", daemon=True).start()

    @property
    def runs(self) -> bool:
        """Whether it may still be running."""
        return self._ending is None

    @property
    def is_out_of_sight(self) -> bool:
        """Whether its connection is lost: it may run on, and its end will not be seen."""
        return self._ending is not None and self._ending.code is None and self._ending.error is None

    def poll(self) -> int | None:
        ending = self._ending
        if ending is None:
            return None
        if ending.error is not None:
            raise ending.error
        return ending.code  # None when it is out of sight: its metadata key tells

    def refused(self) -> float:
        return self._refused

    def was_refused(self) -> None:
        """It is to be tried again."""
        self._refused = time.monotonic()

    def account(self) -> str:
        ending = self._ending
        return account_of(0) if ending is None else ending.account or account_of(ending.code or 0)

    def kill(self) -> None:
        self.given_up.set()

    def _run(self) -> None:
        try:
            ending = self._call(self)
            if ending.log:
                with self.log_path.open("a") as file:
                    file.write(ending.log)
        except SmltError as error:
            ending = Ending(error=error)
        except OSError as error:  # nothing more can be written down: the disk is full, say
            ending = Ending(error=StoreError(f"{error.filename or self.log_path}: {error.strerror or error}"))
        except Exception as error:  # the engine's: this worker is lost, and the policy says what that means
            ending = Ending(code=1, account=f"was not run to its end: {type(error).__name__}: {error}")
        self._ending = ending


class CallingExecutor(Executor):
    """An executor that has a `call` for each worker."""

    def __init__(self) -> None:
        self._running: set[CallWorker] = set()

    @abstractmethod
    def call(self, worker: CallWorker) -> Ending:
        """Run a worker with `worker.config` to its end, in a thread. A look at `worker.given_up` every LOOK_S will do."""

    def start(self, config: WorkerConfig, log_path: Path) -> CallWorker:
        worker = CallWorker(self.call, config, log_path)
        self._running = {other for other in self._running if other.runs or other.is_out_of_sight} | {worker}
        return worker

    def drain(self, tell: Callable[[], None]) -> None:
        if not any(worker.runs or worker.is_out_of_sight for worker in self._running):
            return
        if not self.traits.kills:
            tell()
        deadline = time.monotonic() + DRAIN_S
        while any(worker.runs for worker in self._running) and time.monotonic() < deadline:
            time.sleep(0.02)
