"""One meeting of the workers: this worker's place in the roster, its connections, its engine, and who waits for what."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from smlt.collective import _native
from smlt.collective.connection import Connections
from smlt.collective.failure import diagnose_timeout, failure, farewell
from smlt.collective.patience import Patience, pause_s, silence_s
from smlt.collective.plan import CHUNK_BYTES, CHUNK_BYTES_TUNED_MIN, CHUNK_ELEMENTS, ChunkLimit
from smlt.collective.tuning import Tuning, window_bytes
from smlt.collective.tuning import chunk_bytes as tuned_chunk_bytes
from smlt.collective.tuning import load as load_tuning
from smlt.collective.window import Terms, automatic_window_bytes, check_unbounded, check_window, limit_chunks
from smlt.errors import CollectiveError, ConfigError, FencedError, StoreDataLost, StoreError, StoreUnavailable
from smlt.store.parameter import ParameterStore, redact
from smlt.store.url import is_cluster

if TYPE_CHECKING:
    from smlt.collective.work import Work

#: The native loop comes back this often, so that Ctrl-C and deadlines are seen.
SLICE_MS = 50


class Session:
    """A worker's membership in a job of at least two workers, from registration to leaving.

    Collectives are begun by `submit` and waited for by `finish`, from any thread. Raises what `Communicator` raises.
    """

    def __init__(
        self,
        parameters: ParameterStore,
        *,
        rank: int,
        world_size: int,
        generation: int,
        worker_id: str,
        timeout_s: float,
        chunk_bytes: int | None,
        tuning: Tuning | None,
        store_window_bytes: int | None,
        on_data_loss: str,
    ) -> None:
        self.parameters, self.job = parameters, parameters.job
        self.rank, self.world_size, self.generation, self.worker_id = rank, world_size, generation, worker_id
        self.timeout_s = timeout_s
        self.calls = 0  # collectives begun
        self.on_data_loss = on_data_loss
        self._lost_in = range(0)  # collectives that were under way when the store lost its data
        self.ended = ""  # why no more collectives can be called
        self.last_out = False  # this worker was the last to leave
        self.in_order = True  # no collective has failed
        self._pid = os.getpid()
        self.closed = False  # the connections are closed for good
        self.works: weakref.WeakSet[Work] = weakref.WeakSet()  # to be settled at the end, whoever waits for them or not
        self._forgotten: deque[int] = deque()
        self._order = threading.Lock()  # numbers are given in the order of the calls
        self._reconnecting = threading.Lock()
        self._closing = threading.Event()  # pauses end
        self._patience = Patience(timeout_s)
        self._background: threading.Thread | None = None
        self.servers = parameters.survey()
        self._proposed = self._propose(tuning, store_window_bytes)
        self.number, agreed, self.places = parameters.register(
            rank=rank,
            world_size=world_size,
            generation=generation,
            worker_id=worker_id,
            tuning=self._proposed.to_json(),
            places=parameters.propose_places(),
        )
        self._refreshed = time.monotonic()
        try:
            self.terms = self._agree(Terms.from_json(agreed), store_window_bytes)
            self.chunks = self._choose_chunks(chunk_bytes)
            self._run_ids = [self.servers[0].run_id] if len(self.places) == 1 else parameters.run_ids(self.places)
            self._connections = Connections(
                timeout_s=min(10.0, timeout_s),
                silence_s=silence_s(timeout_s),
                name=f"smlt-{parameters.job}-{rank}",
            )
            self._engine = _native.Engine(
                rank,
                world_size,
                generation,
                [parameters.session_prefix(self.number, place).encode() for place in self.places],
                parameters.key("ctl").encode(),
                int(parameters.ttl_s * 1000),
                CHUNK_ELEMENTS,
                self.chunk_bytes,
                window_bytes(self.tuning),
                self.terms.store_window_bytes,
            )
            self._engine.set_silence(int(silence_s(timeout_s) * 1000))
            self._connections.open(parameters.locate(self.places))
            self._engine.connected(self._connections.descriptors())
        except BaseException:
            self._leave_roster(impatient=False)
            raise

    def _propose(self, tuning: Tuning | None, store_window_bytes: int | None) -> Terms:
        if store_window_bytes:
            window = check_window(store_window_bytes, self.world_size, self.servers)
        else:
            window = automatic_window_bytes(self.world_size, self.servers) if store_window_bytes is None else 0
        return Terms(tuning or load_tuning(self.parameters.url), window)

    def _agree(self, terms: Terms, asked: int | None) -> Terms:
        if asked is not None and asked != terms.store_window_bytes:
            raise ConfigError(
                f"job {self.job}: store_window_bytes is {asked} here (rank {self.rank}) and {terms.store_window_bytes} with "
                "the workers already there: give all the same"
            )
        return terms

    def _choose_chunks(self, asked: int | None) -> ChunkLimit:
        usual = asked or tuned_chunk_bytes(self.tuning, CHUNK_BYTES_TUNED_MIN, CHUNK_BYTES)
        window = self.terms.store_window_bytes
        return limit_chunks(usual, window, self.world_size, len(self.places)) if window else ChunkLimit(usual, usual)

    @property
    def chunk_bytes(self) -> int:
        """A chunk's size on the wire, at most."""
        return self.chunks.usual

    @property
    def tuning(self) -> Tuning:
        """What a message costs, as the worker who joined first has it."""
        return self.terms.tuning

    def check_memory(self, encoded_bytes: int) -> None:
        """ConfigError when the store's memory has no room for a collective of so many bytes a worker."""
        if not self.terms.store_window_bytes:
            check_unbounded(encoded_bytes, self.world_size, self.servers)

    @property
    def usable(self) -> bool:
        """Whether more collectives can be called."""
        return not self.ended and os.getpid() == self._pid and not self.fenced

    @property
    def fenced(self) -> int:
        """The newer generation that has begun, 0 when none has."""
        return self._engine.fenced_by()

    # ---- collectives ----

    def submit(self, **plan: Any) -> int:
        """Begin a collective (see `_native.Engine.submit`); returns its step. CollectiveError when none can be begun."""
        with self._order:
            self.check_usable()
            self._refresh()
            self._retire_forgotten()
            try:
                step = self._engine.submit(**plan)
            except ValueError:  # the plan does not fit, or the engine takes no more
                self._check_engine()
                raise
            self.calls += 1
            return step

    def forget(self, step: int) -> None:
        """Nobody will wait for this collective: let go of its memory when it has ended. For use from finalizers."""
        self._forgotten.append(step)

    def check_usable(self) -> None:
        """CollectiveError when no more collectives can be called."""
        if self.ended:
            raise CollectiveError(f"this communicator can do no more: {self.ended}; open a new one")
        if os.getpid() != self._pid:
            raise CollectiveError("a communicator does not survive fork: open one in the child process")

    def start_progress(self) -> None:
        """From now on collectives move while nobody waits for them."""
        if self._connections.tls and self._background is None:
            self._background = threading.Thread(target=self._drive_tls, name="smlt-progress", daemon=True)
            self._background.start()
        elif not self._connections.tls:
            self._engine.start()

    def has_ended(self, step: int) -> bool:
        """Whether a collective has ended, one way or another."""
        return self._engine.has_ended(step)

    def finish(self, step: int, deadline: float, until: float, timeout_s: float | None = None) -> bool:
        """Move bytes until the collective has ended; raise when it failed, or when `deadline` (monotonic) has passed.

        False when it has not ended at `until`, which is no failure. `timeout_s` is how long it had, for the message.
        After FencedError, until `close`, the collective is as it was and may be waited for again: `complete_fenced` may
        complete it.
        """
        if os.getpid() != self._pid:
            raise CollectiveError("a communicator does not survive fork: its collectives are the parent's to wait for")
        try:
            while True:
                status, message = self._engine.state(step)
                if status != _native.ACTIVE:
                    break
                now = time.monotonic()
                if now >= deadline:
                    if reply := self._patience.reply:
                        raise self._given_up(f"the store at {self._where} answered: {reply}")
                    status, message = diagnose_timeout(self, self._engine, step, timeout_s or self.timeout_s)
                    self._engine.abandon(step, status, message.encode()[:1000], True)
                    break
                if now >= until:
                    return False
                left_ms = int((min(deadline, until) - now) * 1000)
                if self._run(step, max(1, min(SLICE_MS, left_ms))) == _native.CONNECTION_LOST:
                    self._reconnect(step, deadline)
        except BaseException as error:
            # Ctrl-C, or the store is gone for good: the other workers hear of it if that is still possible.
            self.in_order = False
            self.ended = f"collective {step} was interrupted ({type(error).__name__})"
            text = f"rank {self.rank} left collective {step}: {type(error).__name__}"
            self._engine.abandon(step, _native.ABORTED, text.encode(), not isinstance(error, StoreError))
            if not isinstance(error, StoreUnavailable):
                self._flush(1.0)
            self._engine.retire(step)
            raise
        if status == _native.OK:
            self._engine.retire(step)
            return True
        if status == _native.FENCED:
            raise failure(self, status, message, step)
        if status != _native.MISMATCH:  # after a mismatch all workers go on alike
            self.in_order = False
            self.ended = self.ended or f"collective {step} failed: {message}"
            self._engine.abandon(step, status, message.encode()[:1000], False)
        self._flush(2.0)
        self._engine.retire(step)
        raise failure(self, status, message, step)

    def complete_fenced(self, timeout_s: float) -> bool:
        """See `Communicator.complete_fenced`."""
        deadline = time.monotonic() + timeout_s
        _, failures = self._engine.standing()
        self._engine.complete_fenced(True)
        try:
            _, registered, _ = self.parameters.look(rank=self.rank, worker_id=self.worker_id, session=self.number)
            if not registered:
                return False  # the store has lost the session, and the aggregates with it
            while not self.closed:
                step, now_failed = self._engine.standing()
                if now_failed != failures or step == 0:
                    return now_failed == failures
                left_ms = int((deadline - time.monotonic()) * 1000)
                if left_ms <= 0:
                    return False
                if self._run(step, min(SLICE_MS, left_ms)) == _native.CONNECTION_LOST:
                    self._reconnect(step, deadline)
        except (StoreError, FencedError):
            return False  # what the store holds cannot be had
        finally:
            self._engine.complete_fenced(False)
        return False

    def start_trace(self, capacity: int) -> None:
        """Note from now on what time is spent on."""
        self._engine.start_trace(capacity)

    def take_trace(self) -> list[tuple[int, int, int, int, int, int]]:
        """End the trace; its events (`smlt.collective.trace`)."""
        return self._engine.take_trace()

    def close(self, why: str) -> None:
        """Leave the job; collectives under way end in error. The last worker to leave deletes what is left in the store."""
        self.ended = self.ended or why
        self._closing.set()
        if os.getpid() != self._pid:
            return
        self._engine.stop()
        if self._background is not None:
            self._background.join()
        # In a generation that is over nobody waits for a word from this worker.
        fenced = bool(self.fenced)
        self._engine.leave(farewell(self), self.in_order and not fenced)
        self._flush(0.2 if fenced else 2.0)
        with self._reconnecting:
            self.closed = True
            self._engine.disconnect()
            self._connections.close()
        for work in list(self.works):
            work.settle()
        self._engine.let_go()
        self._leave_roster(impatient=fenced or not self.in_order)

    # ---- inside ----

    def _check_engine(self) -> None:
        """FencedError when a newer generation has begun; what has made the engine useless, if something has."""
        status, message = self._engine.fatal()
        if status != _native.OK:
            raise failure(self, status, message, self.calls + 1)
        if self.fenced:
            raise FencedError(
                f"generation {self.fenced} of job {self.job} has begun; this worker (rank {self.rank}) is of generation "
                f"{self.generation}: complete what is under way, close this communicator and join the new generation"
            )

    def _run(self, step: int, timeout_ms: int, flush: bool = False) -> int:
        if self._connections.tls:
            return self._connections.run(self._engine, step, timeout_ms, flush)
        return self._engine.run(step, timeout_ms, flush)

    def _drive_tls(self) -> None:
        while not self.ended:
            if self._engine.wait_for_work(SLICE_MS):
                self._connections.run(self._engine, None, SLICE_MS, flush=False)

    def _reconnect(self, step: int, deadline: float) -> None:
        """Open the lanes anew, until the collective's deadline, and redo what was not confirmed (invariant 5)."""
        with self._reconnecting:
            if self.closed or self._engine.run(step, 0) != _native.CONNECTION_LOST:
                return  # another thread has done it, or has ended the collective
            status, reply = self._engine.refusal()
            if status != _native.OK:
                elsewhere = reply.startswith(("MOVED ", "ASK ")) and not is_cluster(self.parameters.url)
                if elsewhere or not self._patience.refused(status, reply, self._engine.ends()):
                    self._engine.give_up()
                    return
                self._pause(self._patience.attempt - 1, deadline, f"the store at {self._where} answered: {reply}")
            for attempt in range(1_000_000):
                if self._closing.is_set():
                    return
                try:
                    urls = self.parameters.locate(self.places, max(deadline - time.monotonic(), 0.1))
                    self._connections.open(urls, deadline)
                    data_lost = self._look_after_data()
                    break
                except StoreDataLost:
                    raise
                except StoreUnavailable as error:
                    self._pause(attempt, deadline, str(error))
            self._engine.reconnected(data_lost)
            self._engine.connected(self._connections.descriptors())

    def _look_after_data(self) -> list[int]:
        """On new connections: which nodes have lost data, so that all that is under way there is to be done again.

        StoreDataLost when that is not wanted, StoreUnavailable when the store cannot be asked.
        """
        who: dict[str, Any] = {"rank": self.rank, "worker_id": self.worker_id, "session": self.number}
        # On a connection of its own: the control plane's may be as dead as those that were lost.
        parameters = self.parameters.impatient()
        try:
            run_id, registered, generation = parameters.look(**who)
            run_ids = [run_id] if len(self.places) == 1 else parameters.run_ids(self.places)
            if not registered and generation <= self.generation:
                if self.on_data_loss == "raise":
                    raise StoreDataLost(
                        f"the store at {self._where} was restarted or failed over and has lost the data of job {self.job} "
                        f"(rank {self.rank}); what was under way can be done again by whoever holds the gradients"
                    )
                size, tuning = self.world_size, self.terms.to_json()
                if not parameters.restore(
                    world_size=size, generation=self.generation, tuning=tuning, places=self.places, **who
                ):
                    _, _, generation = parameters.look(**who)
        finally:
            parameters.close()
        if generation > self.generation:
            self._engine.fence(generation)
            return []
        lost = [node for node, run_id in enumerate(run_ids) if run_id != self._run_ids[node] or (node == 0 and not registered)]
        self._run_ids = run_ids
        if lost:
            first, _ = self._engine.standing()
            self._lost_in = range(first, self.calls + 1) if first else range(0)
        return lost

    def loss_in(self, step: int) -> str:
        """For the message when collective `step` does not complete: that the store has lost data in it, if so."""
        if step not in self._lost_in:
            return ""
        return " (the store has lost the job's data meanwhile: what another worker had completed by then cannot be redone)"

    def _pause(self, attempt: int, deadline: float, why: str) -> None:
        """Before the next try to connect; StoreUnavailable when the deadline would pass."""
        pause = pause_s(attempt)
        if time.monotonic() + pause >= deadline:
            raise self._given_up(why)
        self._closing.wait(pause)

    def _given_up(self, why: str) -> StoreUnavailable:
        return StoreUnavailable(f"{why}; gave up after {self.timeout_s:g} s")

    @property
    def _where(self) -> str:
        return redact(self.parameters.url)

    def _flush(self, limit_s: float) -> None:
        """Send what is queued (deletions, aborts) and hear that it arrived; on failure the keys' TTL does the work."""
        deadline = time.monotonic() + limit_s
        while not self._engine.flushed() and self._engine.fatal()[0] == _native.OK:
            left = deadline - time.monotonic()
            if left <= 0 or self._run(0, int(left * 1000) + 1, flush=True) == _native.CONNECTION_LOST:
                return

    def _retire_forgotten(self) -> None:
        for _ in range(len(self._forgotten)):
            step = self._forgotten.popleft()
            if self._engine.has_ended(step) and not self.fenced:
                self._engine.retire(step)
            else:
                self._forgotten.append(step)

    def _refresh(self) -> None:
        """Renew the roster's TTL now and then."""
        if time.monotonic() - self._refreshed > self.parameters.ttl_s / 4:
            self._refreshed = time.monotonic()
            self.parameters.refresh(self.generation, self.number)

    def _leave_roster(self, *, impatient: bool) -> None:
        parameters = self.parameters.impatient() if impatient else self.parameters
        try:
            self.last_out = parameters.leave(
                rank=self.rank, generation=self.generation, worker_id=self.worker_id, session=self.number
            )
        except StoreError:
            return  # the store is gone or ending: everything there has a TTL
        finally:
            parameters.close()
