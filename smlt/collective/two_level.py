"""Two-level aggregation: workers of one machine reduce in memory that they share, one of them goes to the store.

Several processes on one virtual machine, or in one AWS Lambda sandbox of several vCPUs, share a network link. Each machine
sends one gradient instead of one for each process: its workers add theirs up in shared memory (`csrc/shared.c`), the machine's
leader (local rank 0) reduces the sum with those of the other machines through the store, and the result goes back
through the shared memory. A machine alone needs no store.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from smlt.collective import _shared
from smlt.collective.call_queue import CallQueue, QueuedWork
from smlt.collective.codecs import check_codec
from smlt.collective.communicator import TIMEOUT_MAX_S, Communicator
from smlt.collective.exchange import Exchange
from smlt.collective.feedback import ErrorFeedback
from smlt.collective.leaders import place_of_machine
from smlt.collective.shared_group import SharedGroup
from smlt.collective.structure import (
    check_outs,
    deliver,
    flatten,
    fuse,
    prepare_reduction,
    rebuild,
    results,
    signature_of,
)
from smlt.errors import CollectiveError, ConfigError, MismatchError

_open: weakref.WeakSet[TwoLevelCommunicator] = weakref.WeakSet()


class TwoLevelCommunicator:
    """One worker's part in a job whose workers share machines: as `Communicator`, whose operations it has.

    Parameters
    ----------
    store
        URL of the parameter store, as for `Communicator`; not needed when all workers are on one machine. Only the
        machine's leader connects to it.
    job, generation, timeout_s, codec
        As for `Communicator`. `codec` is what floats travel as between machines; within a machine nothing is compressed.
    rank, world_size
        This worker's number among all.
    local_rank, local_size
        This worker's number among those of its machine, and how many these are (64 at most). Local rank 0 leads.
    machine, machines
        This machine's number, and how many there are. By default, when all machines have the same number of workers and
        ranks are given machine by machine (as torchrun does), ``rank // local_size`` and ``world_size // local_size``.
    settings
        What else the leader's `Communicator` takes: `chunk_bytes`, `algorithm`, `tuning`, `on_data_loss`.

    Machines may hold different numbers of workers: a mean is over all workers. Within a machine values are added in the
    order of the local ranks, then machines in theirs; all workers receive the same bytes, and the same call gives the same
    bytes again. All workers must call the same collectives in the same order.

    Raises ConfigError for arguments that cannot work or contradict those of other workers, FencedError when the place is
    another process's, WorkerLostError when a worker of the machine does not come within `timeout_s`, StoreError.

    >>> comm = TwoLevelCommunicator(url, rank=5, world_size=8, local_rank=1, local_size=4)  # doctest: +SKIP
    >>> gradient = comm.allreduce(gradient)  # doctest: +SKIP
    """

    def __init__(
        self,
        store: str | None = None,
        *,
        job: str = "default",
        rank: int,
        world_size: int,
        local_rank: int,
        local_size: int,
        machine: int | None = None,
        machines: int | None = None,
        generation: int = 1,
        timeout_s: float = 300.0,
        codec: str = "fp16",
        worker_id: str | None = None,
        **settings: Any,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of the {world_size} workers: 0 to {world_size - 1}")
        if not 1 <= local_size <= min(world_size, _shared.MEMBERS_MAX):
            raise ConfigError(f"local_size {local_size} is not between 1 and {min(world_size, _shared.MEMBERS_MAX)}")
        if not 0 <= local_rank < local_size:
            raise ConfigError(f"local_rank {local_rank} is not one of the machine's {local_size}: 0 to {local_size - 1}")
        if not 0 < timeout_s <= TIMEOUT_MAX_S:
            raise ConfigError(f"timeout_s {timeout_s} is not above 0 and at most {TIMEOUT_MAX_S} (a week)")
        self.job, self.rank, self.world_size, self.generation = job, rank, world_size, generation
        self.local_rank, self.local_size = local_rank, local_size
        self.machine, self.machines = place_of_machine(rank, world_size, local_rank, local_size, machine, machines)
        self.timeout_s, self.codec = float(timeout_s), check_codec(codec)
        if self.machines > 1 and store is None:
            raise ConfigError(f"{self.machines} machines need a store: give its URL, for example redis://localhost:6379")
        self._pid, self._closed, self._without_farewell = os.getpid(), False, False
        self._store: Communicator | None = None  # the leader's
        self._queue = CallQueue()
        name = f"job {job}, generation {generation}, machine {self.machine}"
        self._group = SharedGroup(name, local_rank=local_rank, local_size=local_size, rank=rank, timeout_s=self.timeout_s)
        try:
            if self.machines > 1 and self.leads:
                self._store = Communicator(
                    store,
                    job=job,
                    rank=self.machine,
                    world_size=self.machines,
                    generation=generation,
                    timeout_s=timeout_s,
                    codec=codec,
                    worker_id=worker_id,
                    **settings,
                )
            self._exchange = Exchange(
                self._group,
                self._store,
                world_size=world_size,
                machine=self.machine,
                machines=self.machines,
                timeout_s=self.timeout_s,
            )
        except BaseException as error:
            self._group.fail(error)
            self.close()
            raise
        _open.add(self)

    # ---- what a caller sees ----

    @property
    def leads(self) -> bool:
        """Whether this worker goes to the store for its machine."""
        return self.local_rank == 0

    @property
    def step(self) -> int:
        """How many collectives this worker has begun."""
        return self._queue.numbered

    @property
    def usable(self) -> bool:
        """Whether more collectives can be called: not closed, and none failed in a way that ends the job."""
        ok = not self._closed and not self._group.ended and os.getpid() == self._pid
        return ok and (self._store is None or self._store.usable)

    def allreduce(
        self,
        x: Any,
        op: str = "mean",
        codec: str | Mapping[str, str] | None = None,
        out: Any = None,
        feedback: ErrorFeedback | None = None,
    ) -> Any:
        """Reduce `x` over all workers of all machines; every worker receives the same bytes.

        Arguments, result and errors as for `Communicator.allreduce`. With several machines a value is encoded twice, as
        there: a machine's sum by its leader, and the aggregate. `feedback` keeps what the leader's encoding has lost; that
        of other workers stays empty.
        """
        return self._queue.run(self._prepare_allreduce(x, op, codec, out, feedback))

    def allreduce_async(
        self,
        x: Any,
        op: str = "mean",
        codec: str | Mapping[str, str] | None = None,
        out: Any = None,
        feedback: ErrorFeedback | None = None,
    ) -> QueuedWork:
        """Begin an all-reduce and return its handle: `wait()` gives what `allreduce` would have returned.

        A thread of this process works off the calls one after the other. Until `wait` has returned, the memory of `x` and
        `out` must be left alone.
        """
        return self._queue.submit(self._prepare_allreduce(x, op, codec, out, feedback))

    def broadcast(self, x: Any, root: int = 0, out: Any = None) -> Any:
        """Send `x` of rank `root` to every worker, exactly; see `Communicator.broadcast`."""
        if not 0 <= root < self.world_size:
            raise ConfigError(f"root {root} is not one of the {self.world_size} workers: 0 to {self.world_size - 1}")
        leaves = flatten(x, "fp32")
        outs = None
        if out is not None:
            outs = flatten(out, "fp32")
            check_outs(leaves, outs)
        segments = fuse(leaves, outs)

        def call() -> Any:
            self._exchange.broadcast(segments, root, signature_of(leaves))
            return deliver(x, leaves, segments, out, outs)

        return self._queue.run(lambda step: self._collective(step, call))

    def allgather(self, x: Any) -> Any:
        """Gather `x` of every worker, exactly: (...) comes back as (world_size, ...), by rank; see `Communicator`."""
        leaves = flatten(x, "fp32")
        segments = fuse(leaves, None, target_times=self.world_size)

        def call() -> Any:
            self._exchange.allgather(segments, signature_of(leaves))
            arrays = results(leaves, segments, world_size=self.world_size)
            return rebuild(x, iter([a if leaf.is_number else leaf.restore(a) for leaf, a in zip(leaves, arrays, strict=True)]))

        return self._queue.run(lambda step: self._collective(step, call))

    def barrier(self) -> None:
        """Return when every worker has called it. Errors as for `allreduce`."""
        self._queue.run(lambda step: self._collective(step, lambda: self._exchange.reduce([], "sum", "barrier", (), None)))

    def set_timeout(self, timeout_s: float) -> None:
        """Another deadline, in seconds, for the collectives that begin from now on."""
        if not 0 < timeout_s <= TIMEOUT_MAX_S:
            raise ConfigError(f"timeout_s {timeout_s} is not above 0 and at most {TIMEOUT_MAX_S} (a week)")
        self.timeout_s = self._group.timeout_s = self._exchange.timeout_s = float(timeout_s)
        if self._store is not None:
            self._store.set_timeout(timeout_s)

    def close(self) -> None:
        """Leave the job. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        if os.getpid() != self._pid:
            return
        self._queue.stop()
        self._group.stopping = True
        if self._store is not None:
            self._store.close()
        self._queue.join()
        if not self._without_farewell:
            self._group.close()

    def forgo_farewell(self) -> None:
        """This worker ends in an error: the others shall hear of the error, or of its death, not that it has left."""
        self._without_farewell = True
        if self._store is not None:
            self._store.forgo_farewell()

    def __enter__(self) -> TwoLevelCommunicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._group.fail(error)
            if self._store is not None:
                self._store.forgo_farewell()
        self.close()

    def __repr__(self) -> str:
        return (
            f"<TwoLevelCommunicator job={self.job!r} rank={self.rank} of {self.world_size}, local rank {self.local_rank} of "
            f"{self.local_size}, machine {self.machine} of {self.machines}>"
        )

    # ---- one collective ----

    def _collective(self, step: int, call: Callable[[], Any]) -> Any:
        """Run a collective, tell the other machines how it failed in this one, and name ranks in what the store says."""
        if os.getpid() != self._pid:
            raise CollectiveError("a communicator does not survive fork: open one in the child process")
        self._group.step = step
        try:
            return call()
        except MismatchError:
            raise
        except BaseException as error:
            self._group.fail(error)
            if self._exchange.leaders is not None:
                self._exchange.leaders.tell(error)
            raise

    def _prepare_allreduce(
        self, x: Any, op: str, codec: str | Mapping[str, str] | None, out: Any, feedback: ErrorFeedback | None
    ) -> Callable[[int], Any]:
        chosen = self.codec if codec is None else codec
        leaves, outs, segments = prepare_reduction(x, op, chosen, out, feedback is not None, self.codec)

        def call() -> Any:
            self._exchange.reduce(segments, op, "allreduce", signature_of(leaves), feedback)
            return deliver(x, leaves, segments, out, outs)

        return lambda step: self._collective(step, call)


#: What `smlt.init` may return.
AnyCommunicator = Communicator | TwoLevelCommunicator


def forgo_farewells() -> None:
    """This process ends in an error: the others shall not hear of its leaving before its error is seen."""
    for communicator in list(_open):
        communicator.forgo_farewell()


@atexit.register
def _close_all() -> None:
    for communicator in list(_open):
        communicator.close()
