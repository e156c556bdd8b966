"""Ways to start workers. An executor turns a WorkerConfig into a running worker and says how it fares.

Executors are plug-ins: classes that are registered as entry points of the group `smlt.executors` (`registry`). Inherit from
the protocols below, and say what there is no default for: docs/executors.md has an example. `calls` is for engines whose
workers are calls that return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from smlt.store.secrets import resolve_store_url
from smlt.worker.config import WorkerConfig

if TYPE_CHECKING:
    from smlt.client.request import RunRequest
    from smlt.client.runs import Run


@dataclass(frozen=True)
class Traits:
    """What an executor can do, and what the scheduler must know of where its workers run."""

    kills: bool = True  # `kill` ends a worker; else it leaves when it next looks into the store, and `drain` waits for it
    is_warm: bool = False  # `invoke` works: a worker that has paused waits in its process, with model and data
    keeps_memory: bool = False  # workers have no more than --memory by themselves; else the scheduler looks after it
    is_billed: bool = False  # each worker has a row in invocations.jsonl, of which `smlt bill` makes a bill
    time_limit_s: float | None = None  # a worker is ended after so long: it pauses before, and is started again
    start_s: float = 0.0  # how long a first sign of life may take, where that may be more than a minute


@dataclass(frozen=True)
class RunContext:
    """What a run tells its executor."""

    run: Run
    request: RunRequest  # `request.on_options`: what --on-option has said, its keys among the executor's `options`
    store_url: str  # as workers are given it; with a password where the executor's `place` has left it to this machine
    object_store_url: str
    life_line: int | None = None  # a file that the embedded store lives by: as long as any process has it open


class Worker(Protocol):
    """A started worker."""

    def poll(self) -> int | None:
        """Its exit code (negative: a signal), None while it runs or when its end is not seen: then its silence tells.

        Called ten times a second: it must not wait. Raises the SmltError that keeps any worker from being started.
        """

    def account(self) -> str:
        """How it has ended, behind "worker 3": "was killed by signal 9"."""

    def kill(self) -> None:
        """End it now; where that is not to be had, care for it no more."""

    def refused(self) -> float:
        """When (monotonic) it was last refused a place to run, and is to be tried again; 0: never."""
        return 0.0

    def invoke(self, config: WorkerConfig) -> bool:
        """Give a worker that has paused its next invocation; False when it is not there any more."""
        return False


class Executor(Protocol):
    """Starts workers somewhere. The first line of the class's docstring is what `smlt executors` says of it.

    `concurrency`: how many may run at once; None: as many as are wanted. `requests`: what all of them have asked of the object
    store, by kind, where that is billed. `options`: the keys that --on-option may have, each with what it means.
    """

    options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    traits: Traits = Traits()
    concurrency: int | None = None
    requests: Mapping[str, int] = MappingProxyType({})

    @classmethod
    def lacks(cls) -> str:
        """What is to be done before it can be used, "" for nothing: "pip install 'smlt[ray]'". Called without a run."""
        return ""

    @classmethod
    def place(cls, request: RunRequest, store: str | None) -> tuple[RunRequest, str | None]:
        """Before a run is made: the request as it is carried out, and the store as this machine reaches it; None: embedded.

        `store`: what --store says, as it was given. Raises ConfigError for what cannot work.
        """
        return replace(request, store=None), resolve_store_url(store)

    @classmethod
    def open(cls, context: RunContext) -> Self:
        """The executor of a run. Raises ConfigError for what cannot work; `close` is called when the run is over."""
        raise NotImplementedError

    def start(self, config: WorkerConfig, log_path: Path) -> Worker:
        """Start a worker, at once or in a thread; what it prints goes to `log_path`, by the time that it has ended."""
        raise NotImplementedError

    def threads(self, world_size: int) -> int:
        """How many threads each of so many workers should compute with."""
        return 1

    def make_ready(self, memory_mb: int) -> bool:
        """Begin to make ready for workers of so much memory; whether it is done. Raises the SmltError that prevents it."""
        return True

    def use(self, memory_mb: int) -> None:
        """Start workers with so much memory from now on. It has been made ready."""

    def drain(self, tell: Callable[[], None]) -> None:
        """Wait, not for long, until no worker runs that `kill` could not end. `tell` lets them know that the job is over."""

    def notes(self) -> list[str]:
        """What a user should know of the last while, each thing once."""
        return []

    def close(self) -> None:
        """The run is over: give back what `open` has taken."""


def account_of(code: int) -> str:
    """How a process has ended."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
