"""The processes of one machine and the memory that they share: how they meet, reduce, and hear of each other's end.

The memory is a file of mode 0600, in /dev/shm where that can be written, else in the folder for temporary files (AWS Lambda
has no /dev/shm). Local rank 0 makes it and unlinks it as soon as all have opened it: from then on it goes with the last
process, however that ends. What a process that died before has left behind is deleted by the next that makes one.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from smlt import errors
from smlt.collective import _shared
from smlt.collective.codecs import WIRE_DTYPES
from smlt.collective.shared_file import HEADER, delete_dead, folders, map_file, reserve, sweep
from smlt.collective.structure import Array
from smlt.errors import CollectiveError, CollectiveTimeout, ConfigError, FencedError, MismatchError, SmltError, WorkerLostError

#: Of each process's ring: the blocks of all that are at work stay in the caches that cores share.
BLOCK_BYTES, BLOCKS = 256 * 1024, 4
#: The native code comes back this often, so that Ctrl-C, deadlines and the death of others are seen.
SLICE_MS = 50
#: How long a place that seems taken may be that of a meeting before this one, whose file is about to go.
TAKEN_PATIENCE_S = 5.0
#: The digest of no call: what the leader has to say instead of a result is in the description.
REFUSED = 0
_TEXT_BYTES_MAX = 700

#: Wire dtype, operation (numbers of csrc/codec.h), source, target, elements.
Part = tuple[int, int, Any, Any, int]


def part(dtype: str, operation: int, source: Array | None, target: Array | None, count: int) -> Part:
    """A run of elements of a call; arrays are contiguous and of wire dtype `dtype`."""
    return WIRE_DTYPES[dtype], operation, source, target, count


class SharedGroup:
    """One process's place among the `local_size` processes of a machine that have opened the group `name`.

    `rank` is its number in the whole job, which errors name. Raises ConfigError when the memory cannot be made or is not
    what it must be, FencedError when the place is another process's, WorkerLostError when a process does not come within
    `timeout_s` seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        local_rank: int,
        local_size: int,
        rank: int,
        timeout_s: float,
        block_bytes: int = BLOCK_BYTES,
        blocks: int = BLOCKS,
        in_folders: Sequence[Path] | None = None,
    ) -> None:
        self.name, self.local_rank, self.local_size, self.rank = name, local_rank, local_size, rank
        self.timeout_s = timeout_s
        self.ended = ""  # why no more calls can be made
        self.stopping = False  # set by another thread: the call under way ends
        self.step = 0  # for messages: the collective that calls belong to
        self._key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
        self._file_name = f"smlt-{os.geteuid()}-{self._key:016x}"
        self._folders = list(in_folders) if in_folders is not None else folders()
        self._made: Path | None = None
        deadline = time.monotonic() + timeout_s
        try:
            if local_rank == 0:
                self._memory = self._make(block_bytes, blocks)
                self._group = self._open(self._memory)
                self._group.claim(rank)
            else:
                self._memory, self._group = self._find(deadline)
            self._gather(deadline)
        finally:
            if self._made is not None:
                self._made.unlink(missing_ok=True)
        self.ranks = [self._group.look(r).rank for r in range(local_size)]

    # ---- calls ----

    def reduce(
        self, parts: Sequence[Part], *, divisor: int, takers: Sequence[int], digest: int, description: bytes, deadline: float
    ) -> None:
        """Reduce `parts` over all local ranks, in their order; the same bits for all `takers`.

        `digest` stands for what all must call alike and `description` says it in words. Raises MismatchError on all when
        they do not, after which more calls may follow; WorkerLostError, CollectiveTimeout, and what another process raised.
        """
        self._call(parts, _shared.REDUCE, 0, divisor, takers, digest, description, deadline)

    def copy(
        self, parts: Sequence[Part], *, root: int, takers: Sequence[int], digest: int, description: bytes, deadline: float
    ) -> None:
        """Copy `parts` from local rank `root` to `takers`. Raises as `reduce` does."""
        self._call(parts, _shared.COPY, root, 1, takers, digest, description, deadline)

    def refuse(self, text: str, *, root: int, deadline: float) -> None:
        """In the place of a `copy` from here that the others call: they raise MismatchError with `text`."""
        with contextlib.suppress(MismatchError):
            self._call([], _shared.COPY, root, 1, [], REFUSED, text.encode()[:_TEXT_BYTES_MAX], deadline)

    def fail(self, error: BaseException) -> None:
        """This process gives up: whoever waits for it, or will, raises the like."""
        if self.ended:
            return
        said = error if isinstance(error, SmltError) else CollectiveError(f"rank {self.rank} left: {type(error).__name__}")
        self.ended = str(said)[:_TEXT_BYTES_MAX] or type(error).__name__
        told = {"error": type(said).__name__, "text": self.ended.encode()[: _TEXT_BYTES_MAX // 2].decode(errors="ignore")}
        ranks = said.ranks[:16] if isinstance(said, WorkerLostError) else ()
        self._group.fail(json.dumps({**told, "ranks": ranks}).encode())

    def close(self) -> None:
        """Leave. The memory goes when the last has left."""
        if not self.ended:
            self._group.leave()
            self.ended = "it was closed"

    # ---- inside ----

    def _call(
        self,
        parts: Sequence[Part],
        kind: int,
        root: int,
        divisor: int,
        takers: Sequence[int],
        digest: int,
        description: bytes,
        deadline: float,
    ) -> None:
        if self.ended:
            raise CollectiveError(f"this communicator can do no more: {self.ended}; open a new one")
        mask = sum(1 << r for r in takers)
        self._group.begin(
            kind=kind, divisor=divisor, root=root, takers=mask, digest=digest, description=description, segments=parts
        )
        try:
            while (status := self._group.run(SLICE_MS)) == _shared.AGAIN:
                self._look_around(deadline)
            if status == _shared.MISMATCH:
                raise self._mismatch(root)
            if status != _shared.DONE:
                raise self._failure(status)
        except MismatchError:
            raise  # all go on alike
        except BaseException as error:
            self.fail(error)
            raise

    def _where(self) -> str:
        return f"collective {self.step} of {self.name}, rank {self.rank}"

    def _mismatch(self, root: int) -> MismatchError:
        members = [self._group.look(r) for r in range(self.local_size)]
        if members[root].digest == REFUSED:
            return MismatchError(members[root].description)
        said: dict[tuple[int, str], list[int]] = {}
        for member in members:
            said.setdefault((member.digest, member.description), []).append(member.rank)
        texts = [f"{_ranks(ranks)}: {what[:200]}" for (_, what), ranks in said.items()]
        return MismatchError(f"{self._where()}: the workers of this machine do not agree: {'; '.join(texts)}")

    def _failure(self, status: int) -> Exception:
        culprit = self._group.look(self._group.culprit()) if self._group.culprit() >= 0 else None
        if status == _shared.LEFT and culprit is not None:
            return WorkerLostError(f"{self._where()}: rank {culprit.rank} has left the job", [culprit.rank], self.step)
        if status == _shared.FAILED and culprit is not None:
            try:
                told = json.loads(culprit.failure)
                kind, text, ranks = told["error"], str(told["text"]), [int(r) for r in told["ranks"]]
            except (ValueError, KeyError, TypeError):
                return CollectiveError(f"{self._where()}: rank {culprit.rank} has failed")
            if kind == "WorkerLostError":
                return WorkerLostError(text, ranks, self.step)
            found = getattr(errors, str(kind), None)
            if not (isinstance(found, type) and issubclass(found, SmltError)):
                found = CollectiveError
            return found(text if f"rank {culprit.rank}" in text else f"{text} (says rank {culprit.rank})")
        return CollectiveError(f"{self._where()}: the shared memory holds what no worker can have written")

    def _look_around(self, deadline: float) -> None:
        """Raise when one who is waited for is dead, or the deadline has passed."""
        if self.stopping:
            raise CollectiveError(f"{self._where()} was ended: this communicator was closed")
        missing = self._group.missing()
        dead = [r for r in missing if self._is_dead(r)]
        if dead:
            member = self._group.look(dead[0])
            ranks = [self._group.look(r).rank for r in dead]
            raise WorkerLostError(
                f"{self._where()}: {_ranks(ranks)} died (local rank {dead[0]} was process {member.pid})",
                ranks,
                self.step,
            )
        if time.monotonic() < deadline:
            return
        members = {r: self._group.look(r) for r in missing}
        absent = [r for r, member in members.items() if member.pid == 0]
        if absent:
            raise WorkerLostError(
                f"{self._where()}: local {_ranks(absent)} of {self.local_size} did not come within {self.timeout_s:g} s: "
                "were they started, with the same job, local_size and user?",
                [],
                self.step,
            )
        ranks = [member.rank for member in members.values()]
        if not ranks:
            raise CollectiveTimeout(f"{self._where()}: not complete within {self.timeout_s:g} s: raise timeout_s")
        raise WorkerLostError(
            f"{self._where()}: {_ranks(ranks)} did not take part within {self.timeout_s:g} s; "
            f"alive (process {_list([member.pid for member in members.values()])}), but stuck or busy?",
            ranks,
            self.step,
        )

    def _is_dead(self, local_rank: int) -> bool:
        member = self._group.look(local_rank)
        if member.start == 0 or member.pid_namespace != _shared.process_namespace():
            return False  # not there yet; or its number means another process here
        if _shared.process_start(member.pid) == member.start:
            return False
        # It may have told why it ended, or left in order, since the native code looked: that is heard when it looks again.
        return self._group.look(local_rank).state <= _shared.JOINED

    def _gather(self, deadline: float) -> None:
        try:
            while (status := self._group.gather(SLICE_MS)) == _shared.AGAIN:
                self._look_around(deadline)
            if status != _shared.DONE:
                raise self._failure(status)
        except BaseException as error:
            self.fail(error)
            raise

    # ---- the file ----

    def _make(self, block_bytes: int, blocks: int) -> mmap.mmap:
        size = _shared.size_of(self.local_size, block_bytes, blocks)
        refusals = []
        for folder in self._folders:
            sweep(folder)
            try:
                return self._make_in(folder, size, block_bytes, blocks)
            except OSError as error:
                refusals.append(f"{folder}: {error.strerror or error}")
        raise ConfigError(
            f"the processes of this machine need {size / 1e6:.1f} MB of shared memory, which cannot be had: "
            + "; ".join(refusals)
        )

    def _make_in(self, folder: Path, size: int, block_bytes: int, blocks: int) -> mmap.mmap:
        new, path = folder / f"{self._file_name}.{os.getpid()}", folder / self._file_name
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            reserve(descriptor, size)
            memory = mmap.mmap(descriptor, size)
            _shared.format_file(memory, self.local_size, block_bytes, blocks, self._key)
            for _ in range(2):
                try:
                    os.link(new, path)  # whole, or not there
                    self._made = path
                    return memory
                except FileExistsError:
                    if (pid := delete_dead(path)) is not None:
                        raise FencedError(
                            f"{self.name}: local rank 0 of this machine is taken by process {pid}, which waits for the others"
                        ) from None
            raise FencedError(f"{self.name}: another process makes {path} again and again")
        finally:
            new.unlink(missing_ok=True)
            os.close(descriptor)

    def _open(self, memory: mmap.mmap) -> _shared.Group:
        try:
            return _shared.Group(memory, self.local_rank, self.local_size, self._key)
        except ValueError:
            found = HEADER.unpack_from(memory[: HEADER.size])[5] if len(memory) >= HEADER.size else 0
            other = 0 < found <= _shared.MEMBERS_MAX and found != self.local_size
            said = f"is for {found} processes, not {self.local_size}" if other else "is garbled"
            raise ConfigError(f"{self.name}: the shared memory that local rank 0 has made {said}") from None

    def _find(self, deadline: float) -> tuple[mmap.mmap, _shared.Group]:
        """Wait for local rank 0 to make the file, and take the place in it."""
        pause_s, taken_until = 0.001, math.inf
        while True:
            for folder in self._folders:
                memory = map_file(folder / self._file_name)
                if memory is None:
                    continue
                group = self._open(memory)
                if group.claim(self.rank) == _shared.DONE:
                    return memory, group
                taken_until = min(taken_until, time.monotonic() + TAKEN_PATIENCE_S)
                if time.monotonic() >= taken_until:
                    pid = group.look(self.local_rank).pid
                    raise FencedError(f"{self.name}: local rank {self.local_rank} of this machine is taken by process {pid}")
            if time.monotonic() >= deadline:
                raise WorkerLostError(
                    f"{self.name}, rank {self.rank}: local rank 0 of this machine did not come within {self.timeout_s:g} s: "
                    f"was it started, with the same job, machine and user? "
                    f"(looked for {self._file_name} in {_list(self._folders)})"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.02)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_list(ranks)}"


def _list(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items))
