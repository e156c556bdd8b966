"""What the workers of a machine do for a collective: among themselves, and through the store by their leader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from smlt.collective import _shared
from smlt.collective.codecs import OPERATIONS
from smlt.collective.communicator import Communicator
from smlt.collective.feedback import ErrorFeedback
from smlt.collective.leaders import Leaders, layout_of
from smlt.collective.shared_group import Part, SharedGroup, part
from smlt.collective.structure import Segment, Signature, describe_call
from smlt.collective.wide import WideMean
from smlt.errors import MismatchError, WorkerLostError

#: Beyond the timeout: the leader's own deadline, in the store, comes first, and it says more.
LEADER_GRACE_S = 5.0


class Exchange:
    """One worker's part in the exchanges of `machines` machines, of which its own is number `machine`.

    `group` are the machine's workers; `store` is the communicator between machines, of the leader of one of several. Raises
    ConfigError on all when the machines' workers are not the world's; methods raise what a communicator's do.
    """

    def __init__(
        self, group: SharedGroup, store: Communicator | None, *, world_size: int, machine: int, machines: int, timeout_s: float
    ) -> None:
        self.group, self.store, self.timeout_s = group, store, timeout_s
        self.rank, self.world_size, self.local_size = group.rank, world_size, group.local_size
        self.machine, self.machines = machine, machines
        #: The ranks of each machine, by local rank.
        self.layout = self._meet()
        self.leaders = Leaders(store, world_size, self.layout) if store is not None else None
        self._others = range(1, self.local_size)

    def reduce(
        self, segments: list[Segment], op: str, kind: str, signature: tuple[Signature, ...], feedback: ErrorFeedback | None
    ) -> None:
        """Reduce `segments` of all workers in their targets."""
        digest, description = self._describe(kind, op if kind == "allreduce" else "", signature)
        if self.machines == 1:
            parts = [part(s.type.dtype, OPERATIONS[op], s.source, s.target, s.type.count) for s in segments]
            self.group.reduce(
                parts,
                divisor=self.world_size,
                takers=range(self.local_size),
                digest=digest,
                description=description,
                deadline=self._deadline(),
            )
            return
        # Means of integers are exact: their sums, in integers that hold them, are divided at the very end.
        wide = [WideMean(s) if op == "mean" and not s.type.dtype.startswith("float") else None for s in segments]
        sums = [w.segment if w is not None else s for w, s in zip(wide, segments, strict=True)]
        locally = [OPERATIONS["sum" if w is not None else op] for w in wide]
        parts = [part(s.type.dtype, o, s.source, s.target, s.type.count) for s, o in zip(sums, locally, strict=True)]
        with self._disagreement():
            self.group.reduce(
                parts,
                divisor=self.world_size,
                takers=[0],
                digest=digest,
                description=description,
                deadline=self._deadline(),
            )
        self._through_store(
            lambda leaders: leaders.reduce(sums, op, kind, signature, feedback),
            sums,
            self._others,
            digest,
            description,
        )
        for w, s in zip(wide, segments, strict=True):
            if w is not None:
                w.finish(s.target, self.world_size)

    def broadcast(self, segments: list[Segment], root: int, signature: tuple[Signature, ...]) -> None:
        """Copy rank `root`'s sources to everybody's targets."""
        digest, description = self._describe("broadcast", f"root={root}", signature)
        on_machine = next(m for m, ranks in enumerate(self.layout) if root in ranks)
        local_root = self.layout[on_machine].index(root)
        everyone = [r for r in range(self.local_size) if r != local_root]
        said: dict[str, Any] = {"digest": digest, "description": description, "deadline": self._deadline()}
        if self.rank == root:
            for segment in segments:
                if segment.target is not segment.source:
                    segment.target[...] = segment.source
        if self.machines == 1:
            self.group.copy(_whole(segments), root=local_root, takers=everyone, **said)
            return
        with self._disagreement():
            if on_machine == self.machine:
                self.group.copy(_whole(segments), root=local_root, takers=[0] if local_root else [], **said)
            else:
                self.group.copy([], root=0, takers=[], **said)
        takers = [r for r in self._others if not (on_machine == self.machine and r == local_root)]
        targets = {str(index): segment.target for index, segment in enumerate(segments)}
        self._through_store(
            lambda leaders: leaders.store.broadcast(targets, on_machine, out=targets), segments, takers, digest, description
        )

    def allgather(self, segments: list[Segment], signature: tuple[Signature, ...]) -> None:
        """Copy every worker's sources to its row of everybody's targets, (world size, count) each."""
        digest, description = self._describe("allgather", "", signature)
        rows = [s.target.reshape(self.world_size, s.type.count) for s in segments]
        mine = self.layout[self.machine]
        for row, segment in zip(rows, segments, strict=True):
            row[self.rank] = segment.source
        alone = self.machines == 1
        with self._disagreement():
            for local_rank, rank in enumerate(mine):
                takers = [r for r in (range(self.local_size) if alone else [0]) if r != local_rank]
                self.group.copy(
                    [part(s.type.dtype, 0, r[rank], r[rank], s.type.count) for s, r in zip(segments, rows, strict=True)],
                    root=local_rank,
                    takers=takers,
                    digest=digest,
                    description=description,
                    deadline=self._deadline(),
                )
        if alone:
            return
        self._through_store(lambda leaders: leaders.gather(rows, self.machine), segments, self._others, digest, description)

    def _through_store(
        self,
        call: Callable[[Leaders], object],
        segments: list[Segment],
        takers: Sequence[int],
        digest: int,
        description: bytes,
    ) -> None:
        """The leader's `call` between the machines, in its targets; then these are copied to the machine's others."""
        deadline = self._deadline() + LEADER_GRACE_S
        if self.leaders is not None:
            try:
                call(self.leaders)
            except MismatchError as error:
                self.group.refuse(str(error), root=0, deadline=deadline)
                raise
            except WorkerLostError as error:
                raise self.leaders.named(error, self.group.step) from error
            deadline = self._deadline()
        parts = [part(s.type.dtype, 0, s.target, s.target, s.target.size) for s in segments]
        self.group.copy(parts, root=0, takers=takers, digest=digest, description=description, deadline=deadline)

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_s

    def _describe(self, kind: str, detail: str, signature: tuple[Signature, ...]) -> tuple[int, bytes]:
        digest, description = describe_call(kind, detail, self.world_size, 0, 0, signature)
        return digest | 1, description  # never REFUSED

    @contextmanager
    def _disagreement(self) -> Iterator[None]:
        """When the machine's workers have called different things, the leader lets the other machines know."""
        try:
            yield
        except MismatchError as error:
            if self.leaders is not None:
                self.leaders.disagree(self.machine, error)
            raise

    def _meet(self) -> list[tuple[int, ...]]:
        """The ranks of each machine. ConfigError on all workers when these are not the world's."""
        layout = np.full((self.machines, _shared.MEMBERS_MAX), -1, np.int64)
        layout[self.machine, : self.local_size] = self.group.ranks
        if self.store is not None:
            layout = self.store.allgather(layout[self.machine])
        if self.machines > 1:
            self.group.copy(
                [part("int64", 0, layout, layout, layout.size)],
                root=0,
                takers=range(1, self.local_size),
                digest=1,
                description=b"joining",
                deadline=self._deadline() + LEADER_GRACE_S,
            )
        return layout_of(layout, self.world_size)


def _whole(segments: list[Segment]) -> list[Part]:
    return [part(s.type.dtype, 0, s.target, s.target, s.type.count) for s in segments]
