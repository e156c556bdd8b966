"""Groups of workers, as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from smlt import Communicator


class Outcome:
    """What a worker's function returned or raised."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None


def in_parallel(functions: list[Callable[[], Any]], timeout_s: float = 60) -> list[Outcome]:
    """Run one function a thread. The collectives release the GIL: threads are workers with sockets of their own."""
    outcomes = [Outcome() for _ in functions]

    def run(function: Callable[[], Any], outcome: Outcome) -> None:
        try:
            outcome.value = function()
        except BaseException as error:
            outcome.error = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in zip(functions, outcomes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive(), "a worker hangs"
    return outcomes


class Group:
    """The workers of a job, as threads of this process."""

    def __init__(self, url: str, job: str, world_size: int, **settings: Any) -> None:
        self.members = [
            Communicator(url, job=job, rank=rank, world_size=world_size, **{"timeout_s": 20, **settings})
            for rank in range(world_size)
        ]

    def attempt(self, function: Callable[[Communicator], Any]) -> list[Outcome]:
        return in_parallel([lambda comm=comm: function(comm) for comm in self.members])  # type: ignore[misc]

    def run(self, function: Callable[[Communicator], Any]) -> list[Any]:
        """The function's value on every worker; the first error is raised."""
        outcomes = self.attempt(function)
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        in_parallel([comm.close for comm in self.members])
