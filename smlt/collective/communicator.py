"""The public face of the collective: a worker's membership in a job, and the operations it takes part in."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal

import numpy as np

from smlt.collective.codecs import (
    EXACT_OPERATIONS,
    OPERATIONS,
    WIRE_DTYPES,
    check_codec,
    wire_codec,
    wire_size,
)
from smlt.collective.feedback import ErrorFeedback, Residual
from smlt.collective.plan import (
    CHUNK_BYTES,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    ChunkLimit,
    Plan,
    allgather_plan,
    broadcast_plan,
    reduce_plan,
)
from smlt.collective.session import Session
from smlt.collective.structure import (
    Array,
    Leaf,
    Segment,
    Signature,
    check_outs,
    deliver,
    describe_call,
    flatten,
    fuse,
    is_plain,
    prepare_reduction,
    rebuild,
    results,
    signature_of,
)
from smlt.collective.tuning import LOCAL, Tuning, check_algorithm
from smlt.collective.work import Work
from smlt.errors import CollectiveError, ConfigError
from smlt.store.parameter import ParameterStore

#: Dtype, shape, operation, codec.
PlainKey = tuple[Any, tuple[int, ...], str, str | None]

TIMEOUT_MAX_S = 7 * 24 * 3600
#: Arrays of so many kinds are remembered.
PLAIN_CALLS_MAX = 256
_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


class Communicator:
    """One worker's part in a job: `rank` of `world_size` workers that meet in the store at `store`.

    Parameters
    ----------
    store
        URL of the parameter store (redis://, rediss://, unix://), which may leave the password to a file, a variable or
        a secret manager (`smlt.store.secrets`). Not needed when `world_size` is 1.
    job
        Name that the workers share, of letters, digits, ``_`` and ``-``.
    rank, world_size
        This worker's number, 0 <= rank < world_size.
    generation
        Version of the membership; a scheduler counts it up when workers are replaced.
    timeout_s
        Deadline of every collective, in seconds. Also the longest wait for the store when a connection is lost.
    codec
        What floats travel as unless a call says otherwise: "fp32", "fp16", "bf16" or "int8" (see
        `smlt.collective.codecs`).
    worker_id
        Names this worker in the roster; unique by default.
    chunk_bytes
        Size of a chunk on the wire, at most; the same on all workers. By default `tuning` tells.
    algorithm
        "auto" lets `tuning` choose for each size. "one-shot": everybody reads everybody's (values of up to 64 KiB
        only). "hierarchical": each of several workers aggregates a shard. "centralised": rank 0 aggregates everything, as
        parameter servers do; to compare with.
    tuning
        What a message costs (see `smlt.collective.tuning`); by default what `smlt doctor --tune` has measured. All
        workers use that of whoever joined first.
    store_window_bytes
        How much of each store node's memory all workers together may take, whatever the size of what is reduced; the same on
        all workers. 0: as much as it comes to. By default SMLT_STORE_WINDOW_BYTES, else six tenths of what
        the fullest node has free of its maxmemory, where that is set and leaves room for chunks of 16 KiB.
    on_data_loss
        What to do when the store was restarted or failed over and this worker's entry in it is gone: "redo" what is under
        way from the gradients that the workers still hold, or "raise" StoreDataLost at once.

    All workers must call the same collectives in the same order, from whichever threads.

    Raises ConfigError for arguments that cannot work, StoreUnavailable, StoreAuthError, and FencedError when the rank is
    already taken by another worker.

    >>> with Communicator("redis://localhost", job="example", rank=0, world_size=2) as comm:  # doctest: +SKIP
    ...     gradient = comm.allreduce(gradient)
    """

    def __init__(
        self,
        store: str | None = None,
        *,
        job: str = "default",
        rank: int = 0,
        world_size: int = 1,
        generation: int = 1,
        timeout_s: float = 300.0,
        codec: str = "fp16",
        worker_id: str | None = None,
        chunk_bytes: int | None = None,
        algorithm: str = "auto",
        tuning: Tuning | None = None,
        store_window_bytes: int | None = None,
        on_data_loss: Literal["redo", "raise"] = "redo",
    ) -> None:
        if world_size < 1 or world_size > 65535:
            raise ConfigError(f"world_size {world_size} is not between 1 and 65535")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of the {world_size} workers: 0 to {world_size - 1}")
        if not 0 < timeout_s <= TIMEOUT_MAX_S:
            raise ConfigError(f"timeout_s {timeout_s} is not above 0 and at most {TIMEOUT_MAX_S} (a week)")
        if chunk_bytes is not None and not CHUNK_BYTES_MIN <= chunk_bytes <= CHUNK_BYTES_MAX:
            raise ConfigError(f"chunk_bytes {chunk_bytes} is not between {CHUNK_BYTES_MIN} and {CHUNK_BYTES_MAX}")
        if on_data_loss not in ("redo", "raise"):
            raise ConfigError(f'on_data_loss {on_data_loss!r} is neither "redo" nor "raise"')
        if world_size > 1 and store is None:
            raise ConfigError(f"{world_size} workers need a store: give its URL, for example redis://localhost:6379")
        self.job, self.rank, self.world_size, self.generation = job, rank, world_size, generation
        self.timeout_s, self.codec = float(timeout_s), check_codec(codec)
        self.algorithm, self.tuning = check_algorithm(algorithm), tuning or LOCAL
        self.chunks = ChunkLimit(chunk_bytes or CHUNK_BYTES, chunk_bytes or CHUNK_BYTES)
        self.worker_id = worker_id or uuid.uuid4().hex
        self.parameter_store: ParameterStore | None = None
        self._session: Session | None = None
        self._lock = threading.RLock()
        self._closed = False
        self._alone = 0  # collectives of a job of one worker
        self._plain_calls: dict[PlainKey, tuple[dict[str, Any], tuple[int, int, int]]] = {}
        self._pid = os.getpid()
        if store is not None:
            self.parameter_store = ParameterStore(store, job=job, ttl_s=max(1800.0, 2 * self.timeout_s + 60))
        if world_size > 1:
            assert self.parameter_store is not None
            self._session = Session(
                self.parameter_store,
                rank=rank,
                world_size=world_size,
                generation=generation,
                worker_id=self.worker_id,
                timeout_s=self.timeout_s,
                chunk_bytes=chunk_bytes,
                tuning=tuning,
                store_window_bytes=_window(store_window_bytes),
                on_data_loss=on_data_loss,
            )
            self.tuning, self.chunks = self._session.tuning, self._session.chunks
        _open.add(self)

    # ---- what a caller sees ----

    @property
    def step(self) -> int:
        """How many collectives this worker has begun."""
        return self._session.calls if self._session is not None else self._alone

    @property
    def chunk_bytes(self) -> int:
        """A chunk's size on the wire, at most."""
        return self.chunks.usual

    @property
    def node_count(self) -> int:
        """How many nodes the store has, as the collectives use it."""
        return len(self._session.places) if self._session is not None else 1

    @property
    def session_number(self) -> str | None:
        """The name of this meeting of the workers in the store; None for a worker alone."""
        return self._session.number if self._session is not None else None

    @property
    def session_prefix(self) -> str | None:
        """What the keys of this meeting begin with: the last worker to leave deletes them."""
        if self._session is None or self.parameter_store is None:
            return None
        return self.parameter_store.session_prefix(self._session.number)

    @property
    def usable(self) -> bool:
        """Whether more collectives can be called: not closed, and none failed in a way that ends the job."""
        return self._session.usable if self._session is not None else not self._closed

    @property
    def last_out(self) -> bool:
        """After `close`: whether this worker was the last to leave."""
        return self._session.last_out if self._session is not None else self._closed

    def allreduce(
        self,
        x: Any,
        op: str = "mean",
        codec: str | Mapping[str, str] | None = None,
        out: Any = None,
        feedback: ErrorFeedback | None = None,
    ) -> Any:
        """Reduce `x` over all workers; every worker receives the same bytes.

        Parameters
        ----------
        x
            Array, scalar, tensor, or a nested dict/list/tuple of these, fused into one collective. Same structure,
            shapes and dtypes on every worker.
        op
            "mean", "sum", "min" or "max". A mean of an integer array is exact and rounded to nearest, ties to even (the
            dtype stays); of a Python int it is a float. Booleans take "min" (all) and "max" (any) only. NaN and Inf reach
            every worker.
        codec
            What floats travel as; default the communicator's. For a dict `x`, also a dict of codecs by key.
        out
            Where to put the result, of the structure of `x`; may be `x` itself. Contiguous arrays of float32, float64 and
            integers are read and written in place without a copy.
        feedback
            What earlier calls with a lossy codec lost is added to `x`, and kept for the next call (`smlt.ErrorFeedback`).

        Returns the reduced value with the structure, types and dtypes of `x` (PyTorch tensors detached); `out` if given.

        Raises MismatchError on every worker when they called different things, WorkerLostError when one did not come
        within `timeout_s`, CollectiveTimeout, FencedError, StoreError and its children.
        """
        if feedback is None and (plain := self._plain_call(x, op, codec, out)) is not None:
            session, plan, target = plain
            session.finish(session.submit(**plan), time.monotonic() + session.timeout_s, math.inf)
            return target
        return self._begin_allreduce(x, op, codec, out, feedback).wait()

    def allreduce_async(
        self,
        x: Any,
        op: str = "mean",
        codec: str | Mapping[str, str] | None = None,
        out: Any = None,
        feedback: ErrorFeedback | None = None,
        progress: bool = True,
    ) -> Work:
        """Begin an all-reduce and return its handle at once: `wait()` gives what `allreduce` would have returned.

        Arguments and errors as for `allreduce`; errors of the collective itself come out of `wait`. A native thread moves
        the bytes meanwhile; several may be under way, blocking calls among them. Collectives are numbered in the order
        of the calls, which must be the same on all workers. Without `progress` it moves only while somebody waits, which
        spares small collectives a switch of threads. Until `wait` has returned, the memory of `x` and `out` must
        be left alone.

        >>> work = comm.allreduce_async(gradient, out=gradient)  # doctest: +SKIP
        >>> ...  # compute something else
        >>> work.wait()  # doctest: +SKIP
        """
        work = self._begin_allreduce(x, op, codec, out, feedback)
        if progress:
            self.start_progress()
        return work

    def broadcast(self, x: Any, root: int = 0, out: Any = None) -> Any:
        """Send `x` of rank `root` to every worker, exactly.

        `x` has the same structure, shapes and dtypes on every worker; its values matter on `root` only. Returns root's
        value; see `allreduce` for `out` and the errors.
        """
        if not 0 <= root < self.world_size:
            raise ConfigError(f"root {root} is not one of the {self.world_size} workers: 0 to {self.world_size - 1}")
        leaves = flatten(x, "fp32")
        outs = None
        if out is not None:
            outs = flatten(out, "fp32")
            check_outs(leaves, outs)
        segments = fuse(leaves, outs)
        plan = broadcast_plan(tuple(segment.type for segment in segments), root, self.chunk_bytes)
        return self._begin(
            "broadcast",
            f"root={root}",
            leaves,
            segments,
            plan,
            lambda: deliver(x, leaves, segments, out, outs),
        ).wait()

    def allgather(self, x: Any) -> Any:
        """Gather `x` of every worker, exactly: each leaf of shape (...) comes back as (world_size, ...), by rank.

        Numbers come back as NumPy arrays. `x` has the same structure, shapes and dtypes on every worker; errors as for
        `allreduce`.
        """
        leaves = flatten(x, "fp32")
        segments = fuse(leaves, None, target_times=self.world_size)
        plan = allgather_plan(tuple(segment.type for segment in segments), self.world_size, self.chunk_bytes)

        def give() -> Any:
            arrays = results(leaves, segments, world_size=self.world_size)
            restored = [array if leaf.is_number else leaf.restore(array) for leaf, array in zip(leaves, arrays, strict=True)]
            return rebuild(x, iter(restored))

        return self._begin("allgather", "", leaves, segments, plan, give).wait()

    def barrier(self) -> None:
        """Return when every worker has called it. Errors as for `allreduce`."""
        segments = fuse([], None)
        plan = reduce_plan((segments[0].type,), self.world_size, self.chunks, self.tuning, self.algorithm, self.node_count)
        self._begin("barrier", "", [], segments, plan, lambda: None).wait()

    @property
    def fenced(self) -> int:
        """The newer generation that has begun, as far as this worker has heard; 0 when none has."""
        return self._session.fenced if self._session is not None else 0

    def complete_fenced(self, timeout_s: float) -> bool:
        """Complete the collectives under way from what is in the store, though a newer generation has begun.

        True when all are complete: another worker has completed them, so all their aggregates are there. Then `Work.wait`
        returns their results, the same bytes as everywhere. False when they are not after `timeout_s` seconds, or the
        store cannot be reached: they stay fenced. Then `close` lets go of them and of their memory.
        """
        return self._session.complete_fenced(timeout_s) if self._session is not None else True

    def close(self) -> None:
        """Leave the job. The last worker to leave deletes what is left in the store. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            _open.discard(self)
            if self._session is not None:
                self._session.close("it was closed")
            if self.parameter_store is not None:
                self.parameter_store.close()

    def forgo_farewell(self) -> None:
        """This worker ends in an error: the others shall hear of the error itself before they hear that it has left."""
        if self._session is not None:
            self._session.in_order = False

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.forgo_farewell()
        self.close()

    def __repr__(self) -> str:
        return f"<Communicator job={self.job!r} rank={self.rank} of {self.world_size}, generation {self.generation}>"

    # ---- one collective ----

    def _plain_call(self, x: Any, op: str, codec: Any, out: Any) -> tuple[Session, dict[str, Any], Array] | None:
        """What to submit for an array like one that was reduced before, and where its result goes.

        For small arrays the way through `_begin_allreduce` takes longer than the store. None: that way, please.
        """
        if (key := _plain_key(x, op, codec)) is None:
            return None
        call = self._plain_calls.get(key)
        if call is None or self._session is None:
            return None
        if out is None:
            out = np.empty_like(x)
        elif out is not x and (
            type(out) is not np.ndarray
            or out.dtype != x.dtype
            or out.shape != x.shape
            or not out.flags.carray
            or np.may_share_memory(x, out)
        ):
            return None
        plan, (dtype, wire, itemsize) = call
        return self._session, {**plan, "segments": [(dtype, wire, x, out, itemsize, None, None)]}, out

    def _begin_allreduce(
        self, x: Any, op: str, codec: str | Mapping[str, str] | None, out: Any, feedback: ErrorFeedback | None
    ) -> Work:
        chosen = self.codec if codec is None else codec
        leaves, outs, segments = prepare_reduction(x, op, chosen, out, feedback is not None, self.codec)
        plan = reduce_plan(
            tuple(segment.type for segment in segments),
            self.world_size,
            self.chunks,
            self.tuning,
            self.algorithm,
            self.node_count,
        )
        if feedback is None or self._session is None:  # alone, nothing is encoded
            return self._begin(
                "allreduce",
                op,
                leaves,
                segments,
                plan,
                lambda: deliver(x, leaves, segments, out, outs),
                plain_key=_plain_key(x, op, codec)
                if segments[0].leaves and is_plain(leaves[0].array, segments[0].type.dtype)
                else None,
            )
        residuals = feedback.begin([segment.type for segment in segments])
        try:
            work = self._begin(
                "allreduce", op, leaves, segments, plan, lambda: deliver(x, leaves, segments, out, outs), residuals
            )
        except BaseException:
            feedback.end(complete=False)
            raise
        work.then(lambda complete: feedback.end(complete=complete))
        return work

    def _begin(
        self,
        kind: str,
        detail: str,
        leaves: list[Leaf],
        segments: list[Segment],
        plan: Plan,
        give: Callable[[], Any],
        residuals: list[Residual] | None = None,
        plain_key: PlainKey | None = None,
    ) -> Work:
        return self.begin(kind, detail, signature_of(leaves), segments, plan, give, residuals, plain_key)

    def begin(
        self,
        kind: str,
        detail: str,
        signature: tuple[Signature, ...],
        segments: list[Segment],
        plan: Plan,
        give: Callable[[], Any],
        residuals: list[Residual] | None = None,
        plain_key: PlainKey | None = None,
        timeout_s: float | None = None,
    ) -> Work:
        """For those who bring their own plan (`smlt.torch`): begin the collective `kind` over `segments`.

        `kind`, `detail` and `signature` are what all workers must agree on; `detail` names the operation where `plan` adds
        something up. `give` makes the result when the bytes are there, in the thread that waits. `timeout_s`:
        another deadline than the communicator's.
        """
        session = self._session
        if session is None:
            if self._closed:
                raise CollectiveError("this communicator can do no more: it was closed; open a new one")
            self._alone += 1
            for segment in segments:
                if segment.target is not segment.source:
                    segment.target[...] = segment.source
            return Work(None, self._alone, give)
        session.check_memory(sum(wire_size(s.type.dtype, s.type.codec, s.type.count) for s in segments))
        digest, description = describe_call(kind, detail, self.world_size, self.chunk_bytes, plan.algorithm, signature)
        call = {
            "algorithm": plan.algorithm,
            "operation": OPERATIONS.get(detail, EXACT_OPERATIONS.get(detail, 0)),
            "digest": digest,
            "description": description,
            "table": plan.table,
        }
        types = [(WIRE_DTYPES[s.type.dtype], wire_codec(s.type.dtype, s.type.codec), s.target.dtype.itemsize) for s in segments]
        memory = [
            (dtype, codec, s.source, s.target, itemsize, *(residuals[index] if residuals is not None else (None, None)))
            for index, (s, (dtype, codec, itemsize)) in enumerate(zip(segments, types, strict=True))
        ]
        if plain_key is not None:
            if len(self._plain_calls) >= PLAIN_CALLS_MAX:
                self._plain_calls.clear()
            self._plain_calls[plain_key] = call, types[0]
        return Work(session, session.submit(**call, segments=memory), give, timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        """Another deadline, in seconds, for the collectives that begin from now on."""
        if not 0 < timeout_s <= TIMEOUT_MAX_S:
            raise ConfigError(f"timeout_s {timeout_s} is not above 0 and at most {TIMEOUT_MAX_S} (a week)")
        self.timeout_s = float(timeout_s)
        if self._session is not None:
            self._session.timeout_s = self.timeout_s

    def start_progress(self) -> None:
        """From now on a native thread moves what is under way while nobody waits."""
        if self._session is not None:
            self._session.start_progress()


def _window(asked: int | None) -> int | None:
    text = os.environ.get("SMLT_STORE_WINDOW_BYTES", "") if asked is None else str(asked)
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"store_window_bytes {text!r} is no number of bytes")
    return int(text)


def _plain_key(x: Any, op: str, codec: Any) -> PlainKey | None:
    plain = type(x) is np.ndarray and type(op) is str and (codec is None or type(codec) is str) and x.flags.carray
    return (x.dtype, x.shape, op, codec) if plain else None


def forgo_farewells() -> None:
    """This process ends in an error: the others shall not hear of its leaving before its error is seen."""
    for communicator in list(_open):
        communicator.forgo_farewell()


@atexit.register
def _close_all() -> None:
    for communicator in list(_open):
        if communicator._pid == os.getpid():
            communicator.close()
