"""From a failed collective to the exception that says what happened, where, and what to do next."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import redis

from smlt.collective import _native
from smlt.errors import (
    CollectiveError,
    CollectiveTimeout,
    FencedError,
    MismatchError,
    StoreAuthError,
    StoreError,
    StoreFull,
    StoreUnavailable,
    WorkerLostError,
)
from smlt.store.parameter import PASSING, redact

if TYPE_CHECKING:
    from smlt.collective.session import Session

#: Separates the ranks from the words in the text of a LOST token.
SEPARATOR = "\x1f"
# Step and rank in an arrival token (csrc/wire.c).
_TOKEN_STEP, _TOKEN_RANK = struct.Struct("<Q"), struct.Struct("<H")


def failure(session: Session, status: int, message: str, step: int) -> Exception:
    """The exception for `status` and `message` of the native engine."""
    where = f"collective {step} of job {session.job}, rank {session.rank} of {session.world_size}"
    store = redact(session.parameters.url)
    if status == _native.MISMATCH:
        return MismatchError(f"{where}: the workers do not agree: {message}")
    if status == _native.LOST:
        ranks, _, text = message.partition(SEPARATOR)
        return WorkerLostError(f"{where}: {text}", [int(r) for r in ranks.split(",") if r.isdigit()], step)
    if status == _native.FENCED:
        return FencedError(f"{where}: {message}")
    if status == _native.ABORTED and message.startswith(f"timeout{SEPARATOR}"):
        return CollectiveTimeout(f"{where}: {message.partition(SEPARATOR)[2]}")
    if status == _native.ABORTED:
        return CollectiveError(f"{where} was ended: {message}")
    if status == _native.STORE_FULL:
        return StoreFull(
            f"{where}: the store at {store} is full ({message}); it needs room for about the encoded gradient times the "
            "number of workers: raise its maxmemory"
        )
    if status == _native.STORE_DENIED:
        return StoreAuthError(f"{where}: the store at {store} refused a command: {message}")
    if status == _native.NO_MEMORY:
        return MemoryError(f"{where}: {message}")
    if status == _native.STORE_REFUSES and message.startswith(("MOVED ", "ASK ")):
        return StoreError(f"{where}: {message}: the store at {store} is of a cluster: write redis+cluster://")
    if status in (_native.PROTOCOL, _native.VANISHED, _native.STORE_ERROR, _native.STORE_REFUSES):
        return StoreError(f"{where}: {message} (store {store})")
    return CollectiveError(f"{where}: {message}")


def handshake_failure(url: str, command: str, reply: str) -> StoreError | None:
    """The exception for an error reply to a command of the handshake; None when the command may be refused."""
    said = f"the store at {redact(url)} refused {command}: {reply}"
    if reply.startswith((*PASSING, "OOM ")):
        return StoreUnavailable(said)
    if command == "AUTH" or reply.startswith(("NOAUTH", "WRONGPASS")):
        return StoreAuthError(said)
    if command == "CLIENT":
        return None
    return StoreAuthError(said) if reply.startswith("NOPERM") else StoreError(said)


def farewell(session: Session) -> bytes:
    """What the others are told when they call a collective that this worker, having left, will not come to."""
    return f"{session.rank}{SEPARATOR}rank {session.rank} has left the job: it called {session.calls} collectives".encode()


def diagnose_timeout(session: Session, engine: _native.Engine, step: int, timeout_s: float) -> tuple[int, str]:
    """Which workers did not come to collective `step` before its deadline: (status, text) to abort it with."""
    if vanished := engine.vanished(step):
        return _native.VANISHED, vanished
    missing = _absent_ranks(session, engine, step)
    limit = f"within {timeout_s:g} s{session.loss_in(step)}"
    if missing:
        names = ", ".join(map(str, missing))
        text = f"rank{'s' if len(missing) > 1 else ''} {names} did not take part {limit}; started, crashed or still busy?"
        return _native.LOST, f"{','.join(map(str, missing))}{SEPARATOR}{text}"
    owner = engine.missing_owner(step)
    waited_for = f"the aggregate of rank {owner}" if owner >= 0 else "the store's confirmation"
    return _native.ABORTED, (
        f"timeout{SEPARATOR}not complete {limit} though every worker takes part: rank {session.rank} waits for {waited_for}; "
        "raise timeout_s, or look whether the store or that worker is overloaded"
    )


def _heard_of(client: Any, prefix: str, world_size: int, step: int) -> set[int]:
    """Who has said something of `step`, or a later one, on a node."""
    found = set()
    # What rank 0 was told is still in its stream; what rank 0 did shows in the streams it writes to.
    for stream in ["agg", *(f"in:{rank}" for rank in range(world_size))]:
        for _, fields in client.xrange(f"{prefix}{stream}"):
            token = fields.get(b"t", b"")
            if len(token) >= 40 and _TOKEN_STEP.unpack_from(token, 8)[0] >= step:
                found.add(_TOKEN_RANK.unpack_from(token, 32)[0])
    return found


def _absent_ranks(session: Session, engine: _native.Engine, step: int) -> list[int]:
    if session.rank == 0:  # rank 0 hears from everyone in every collective
        return [rank for rank in range(1, session.world_size) if not engine.has_joined(step, rank)]
    present = {session.rank}
    parameters = session.parameters.impatient()
    try:
        for place, url in zip(session.places, parameters.locate(session.places), strict=True):
            with parameters.nodes.connected(url) as client:
                present |= _heard_of(client, parameters.session_prefix(session.number, place), session.world_size, step)
    except (redis.RedisError, StoreError):
        return []  # the store does not answer: who is missing cannot be known
    finally:
        parameters.close()
    # Rank 0 says nothing in a small collective before it has heard from all: it is to blame only when all others came.
    others = [rank for rank in range(1, session.world_size) if rank not in present]
    if others:
        return others
    return [] if 0 in present else [0]
