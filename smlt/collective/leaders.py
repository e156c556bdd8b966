"""The store's part of two-level aggregation: the leaders of the machines, one worker each, in a job of as many as machines."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from smlt.collective import _native
from smlt.collective.communicator import Communicator
from smlt.collective.failure import SEPARATOR
from smlt.collective.feedback import ErrorFeedback, Residual
from smlt.collective.plan import Plan, SegmentType, reduce_plan
from smlt.collective.structure import Array, Segment, Signature, fuse
from smlt.errors import ConfigError, MismatchError, SmltError, WorkerLostError

#: Ranks in what leaders tell each other of a lost worker are the job's from here on; below they are machines.
_JOB_RANK = 1 << 17


class Leaders:
    """What a machine's leader does in the store.

    `store` is its communicator, in which a machine is a rank; `layout` has the job's ranks of each machine, by local rank.
    """

    def __init__(self, store: Communicator, world_size: int, layout: list[tuple[int, ...]]) -> None:
        self.store, self.world_size, self.layout = store, world_size, layout

    def reduce(
        self, sums: list[Segment], op: str, kind: str, signature: tuple[Signature, ...], feedback: ErrorFeedback | None
    ) -> None:
        """Reduce the machines' `sums` in their targets. Each machine has its share of the mean: the mean is their sum."""
        memory = [Segment(s.type, [], s.target, s.target) for s in sums] or fuse([], None)
        types = tuple(s.type for s in memory)
        store = self.store
        plan = reduce_plan(types, store.world_size, store.chunks, store.tuning, store.algorithm, store.node_count)
        residuals: list[Residual] | None = feedback.begin(list(types)) if feedback is not None else None
        complete = False
        try:
            named = f"{kind} {op} over {self.world_size} workers" if kind == "allreduce" else kind
            operation = "sum" if op == "mean" else op
            store.begin(named, operation, signature, memory, plan, lambda: None, residuals).wait()
            complete = True
        finally:
            if feedback is not None:
                feedback.end(complete=complete)

    def gather(self, rows: Sequence[Array], machine: int) -> None:
        """Fill `rows`, (world size, count) each, in which those of this machine's workers are filled."""
        most = max(map(len, self.layout))  # machines with fewer workers send zeros beside
        mine = list(self.layout[machine])
        own = {str(index): np.zeros((most, row.shape[1]), row.dtype) for index, row in enumerate(rows)}
        for index, row in enumerate(rows):
            own[str(index)][: len(mine)] = row[mine]
        gathered = self.store.allgather(own)
        for index, row in enumerate(rows):
            for other, ranks in enumerate(self.layout):
                row[list(ranks)] = gathered[str(index)][other, : len(ranks)]

    def disagree(self, machine: int, error: MismatchError) -> None:
        """The workers of this machine have called different things: call what nobody else can have called, so all raise."""
        detail = f"machine {machine} disagrees within itself: {error}"[:400]
        with contextlib.suppress(MismatchError):  # as it should be
            self.store.begin("nothing", detail, (), fuse([], None), self._empty_plan(), lambda: None).wait()

    def tell(self, error: BaseException) -> None:
        """A collective has failed on this machine before it came to the store: the other leaders need not wait for it."""
        session = self.store._session
        if session is None or not self.store.usable:
            return
        ranks = error.ranks if isinstance(error, WorkerLostError) else ()
        text = f"{','.join(str(_JOB_RANK + rank) for rank in ranks)}{SEPARATOR}{error or type(error).__name__}"
        with contextlib.suppress(SmltError):  # the store is gone as well, and they will see that
            work = self.store.begin("lost", "", (), fuse([], None), self._empty_plan(), lambda: None)
            session._engine.abandon(work.step, _native.LOST, text.encode()[:1000], True)
            session._flush(1.0)

    def named(self, error: WorkerLostError, step: int) -> WorkerLostError:
        """The same error with ranks of the job in place of machines."""
        told = [number - _JOB_RANK for number in error.ranks if number >= _JOB_RANK]
        if told:
            return WorkerLostError(str(error), told, step)
        machines = [number for number in error.ranks if number < len(self.layout)]
        ranks = [rank for machine in machines for rank in self.layout[machine]]
        which = "; ".join(f"machine {m} has ranks {', '.join(map(str, self.layout[m]))}" for m in machines)
        return WorkerLostError(f"{error} (between machines a rank is a machine: {which})", ranks, step)

    def _empty_plan(self) -> Plan:
        store = self.store
        nothing = (SegmentType("uint8", "fp32", 0),)
        return reduce_plan(nothing, store.world_size, store.chunks, store.tuning, store.algorithm, store.node_count)


def place_of_machine(
    rank: int, world_size: int, local_rank: int, local_size: int, machine: int | None, machines: int | None
) -> tuple[int, int]:
    """This machine's number and how many there are. ConfigError when that does not follow from the rest."""
    if machines is None:
        if world_size % local_size:
            raise ConfigError(
                f"{world_size} workers are not machines of {local_size} each: give machine and machines (SMLT_MACHINE, "
                "SMLT_MACHINES) when machines hold different numbers of workers"
            )
        machines = world_size // local_size
    if machine is None:
        machine = rank // local_size
        if machines * local_size != world_size or rank != machine * local_size + local_rank:
            raise ConfigError(
                f"rank {rank} with local rank {local_rank} of {local_size} is not how ranks go machine by machine: give "
                "machine (SMLT_MACHINE)"
            )
    if not 0 <= machine < machines <= world_size:
        raise ConfigError(f"machine {machine} is not one of {machines}, each with at least one of the {world_size} workers")
    if machines == 1 and local_size != world_size:
        raise ConfigError(f"one machine with {local_size} of {world_size} workers: give machines")
    return machine, machines


def layout_of(rows: Array, world_size: int) -> list[tuple[int, ...]]:
    """The ranks of each machine, by local rank, out of rows that are filled up with -1. ConfigError unless each is in one."""
    machines = [tuple(int(rank) for rank in row if rank >= 0) for row in rows]
    if sorted(rank for ranks in machines for rank in ranks) != list(range(world_size)):
        held = "; ".join(f"machine {m} has {', '.join(map(str, ranks))}" for m, ranks in enumerate(machines))
        raise ConfigError(f"the machines' workers are not ranks 0 to {world_size - 1}, once each: {held}")
    return machines
