"""A worker's life in a job: acknowledge, take the place that the plan gives, train; after a failure the same again."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from smlt.collective.communicator import Communicator
from smlt.errors import (
    CollectiveError,
    FencedError,
    MismatchError,
    SmltError,
    StoreAuthError,
    StoreDataLost,
    StoreError,
    StoreFull,
    StoreUnavailable,
    WorkerLostError,
)
from smlt.store.coordination import FULL_S, LEASE_S, Answer, Coordination
from smlt.store.membership import Ack, Move, Plan, move_for
from smlt.store.parameter import ParameterStore
from smlt.worker.config import WorkerConfig
from smlt.worker.trainer import Trainer

#: A wait for words comes back at least this often, to see whether the scheduler is still there.
SLICE_MS = 1000
#: How long a step that another worker has completed may take to come from the store.
FINISH_S = 10.0
#: Before it has acknowledged for the first time, a worker is taken for dead only after this, or its liveness if longer.
LOADING_S = 30.0
#: A worker that finds no job at all, and has never been part of it, came when it was over already.
NO_JOB_S = 5.0
#: Between two tries to reach the store: doubled each time up to the last, and drawn between half and the whole.
PAUSE_S, PAUSE_MAX_S = 0.05, 1.0


class Orphaned(Exception):
    """The scheduler is gone."""


class JobIsOver(Exception):
    """The scheduler has ended the job, or this worker's part in it, and waits for nobody."""


class TimeIsUp(Exception):
    """The time limit comes before the next plan."""


class Member:
    """The worker `config.worker_id` of a job. Hold its `heartbeat`, a context, around all it does.

    `run` returns how it ended: "done", "stopped", "paused" or "released".
    """

    def __init__(self, config: WorkerConfig, parameters: ParameterStore) -> None:
        self.config, self.parameters = config, parameters
        self.coordination = Coordination(parameters)
        self.process = uuid.uuid4().hex  # a duplicate, started from the same configuration, has another
        self.generation = 0  # the last in which this worker had a plan
        self._known = 0  # the last that it has acknowledged
        self.rank = config.rank
        self.trainer: Trainer | None = None
        self.comm: Communicator | None = None
        self.last_out = False  # the last worker of its session to leave
        self._reported = time.monotonic()  # when the store has last taken a report
        self._orphaned = threading.Event()
        self._unscheduled: float | None = None  # since when the scheduler's lease is missing
        self.heartbeat = Heartbeat(self)

    # ---- what the trainer calls ----

    def report(self, row: dict[str, Any]) -> str:
        """Report a row; returns what the scheduler asks for."""
        row = {**row, "generation": self.generation}
        self.heartbeat.metadata = json.dumps(row)
        answer = self.coordination.report(self.generation, self.config.worker_id, self.rank, row, self.config.liveness_s)
        self.hear(answer)
        self._reported = time.monotonic()
        return answer.control

    def confirm(self) -> None:
        """FencedError when a newer generation has begun: this worker must not write what others read."""
        try:
            current = self.coordination.generation()
        except StoreUnavailable:
            if self.orphaned:  # the store has gone with the scheduler
                return
            raise
        if current != self._known:
            now = "the job is over" if current is None else f"generation {current} has begun"
            raise FencedError(f"{now}; this worker is of generation {self._known}")

    def tell_failure(self, step: int, error: str, traceback: str) -> None:
        """Record what ends the job, if it is the first of its kind, and wake the others."""
        self.coordination.fail(self._known, self.rank, step, error, traceback)

    # ---- what others tell ----

    def hear(self, answer: Answer) -> None:
        """Note whether a scheduler is there; without one for the length of a lease, stop at a checkpoint."""
        now = time.monotonic()
        if answer.scheduled:
            self._unscheduled = None
            return
        self._unscheduled = since = now if self._unscheduled is None else self._unscheduled
        if now - since > LEASE_S:
            self.orphan()

    def orphan(self) -> None:
        """The scheduler is gone: stop with all others behind a step, or give up waiting for a plan."""
        self._orphaned.set()
        if self.trainer is not None:
            self.trainer.stop_requested = True

    @property
    def orphaned(self) -> bool:
        """Whether it has been told, or has noticed, that the scheduler is gone."""
        return self._orphaned.is_set()

    # ---- a life ----

    def run(self, trainer: Trainer) -> str:
        """Train until done, stopped, paused, or released. FencedError for a duplicate, and what cannot be mended.

        After an error `close` is the caller's: once it has left, the others ask for another in its place, and whoever
        looks into that must find the error told already.
        """
        ended = self._live(trainer)
        self.close()
        return ended

    def _live(self, trainer: Trainer) -> str:
        self.trainer = trainer
        if self.orphaned:
            trainer.stop_requested = True
        try:
            while True:
                plan, move = self._gather()
                if move is Move.LEAVE and self.config.spare:
                    continue
                if move is Move.LEAVE:
                    return "released"
                try:
                    return self._take_part(plan, move)
                except SmltError as error:
                    if not self._can_be_mended(error):
                        raise
                    print(f"smlt worker {self.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    if isinstance(error, StoreDataLost):  # nothing is left to complete the step from
                        self.close()
                        trainer.rewind()
                    self._ask_for_a_new_generation(error)
        except Orphaned:
            with suppress(FencedError):
                trainer.save_alone()
            return "stopped"
        except JobIsOver:
            return "released"
        except TimeIsUp:
            if not self.config.warm:  # what is in memory goes with the process
                with suppress(FencedError):  # a newer generation has begun: it goes on there, in another invocation
                    trainer.save_alone()
            self.coordination.pause(self.config.worker_id)
            return "paused"

    def _take_part(self, plan: Plan, move: Move) -> str:
        trainer = self.trainer
        assert trainer is not None
        if move is Move.FINISH:
            self._finish(plan, trainer)
        self.close()
        trainer.rewind()
        self.rank = plan.ranks[self.config.worker_id]
        window = self.config.store_window_mb
        self.comm = Communicator(
            self.config.store_url,
            job=self.config.job,
            rank=self.rank,
            world_size=plan.world_size,
            generation=plan.generation,
            timeout_s=self.config.timeout_s,
            codec=self.config.codec,
            worker_id=self.config.worker_id,
            store_window_bytes=None if window is None else int(window * 1e6),
            on_data_loss="raise",  # the scheduler begins a new generation, in which the step is redone
        )
        trainer.attach(self.comm)
        if plan.position is None:
            trainer.begin(plan.resume)
        if plan.restore:
            self._hand_over(plan, trainer)
        return trainer.run()

    def _finish(self, plan: Plan, trainer: Trainer) -> None:
        """Complete the step under way from the store. CollectiveError when that fails: then it is given up, for a snapshot."""
        with suppress(SmltError):  # of the store, or of a report behind the commit: the position tells
            trainer.complete_step(FINISH_S)
        if trainer.position != plan.position:
            self.close()
            trainer.rewind()
            raise CollectiveError(f"step {trainer.step + 1} cannot be completed from the store")

    def _hand_over(self, plan: Plan, trainer: Trainer) -> None:
        """The donor's state to those who need it. Others wait: no collective of the training comes in between."""
        assert self.comm is not None
        if self.rank == plan.donor:
            trainer.give_snapshot(plan.generation)
        self.comm.barrier()
        if self.rank in plan.restore:
            trainer.take_snapshot(plan.generation)
        self.comm.barrier()
        if self.rank == plan.donor:
            trainer.drop_snapshot(plan.generation)

    def close(self) -> None:
        """Leave the session. Safe to call twice."""
        comm, self.comm = self.comm, None
        if comm is not None:
            comm.close()
            self.last_out = comm.last_out

    def _ask_for_a_new_generation(self, error: SmltError) -> None:
        """Tell the scheduler what went wrong here, unless it knows already: then a newer generation has begun."""
        blamed = error.ranks if isinstance(error, WorkerLostError) else ()
        pause = Pause(self.config.timeout_s)
        while True:
            try:
                current = self.coordination.generation()
                if current == self.generation:
                    text = f"rank {self.rank}: {type(error).__name__}: {error}"
                    self.coordination.fault(self.config.worker_id, self.generation, text, blamed)
                return
            except StoreUnavailable as unreachable:
                self._check_scheduler()
                pause.wait(unreachable)

    def _can_be_mended(self, error: SmltError) -> bool:
        """Whether a new generation may help. A wrong password, or workers that call different things: it cannot."""
        if isinstance(error, StoreFull):  # it passes, or it does not
            return time.monotonic() - self._reported < FULL_S
        return isinstance(error, (CollectiveError, StoreError)) and not isinstance(error, (MismatchError, StoreAuthError))

    def _ack(self) -> Ack:
        assert self.trainer is not None
        finishing = self.trainer.finishing and self.comm is not None
        return Ack(self.config.worker_id, self.trainer.position, finishing)

    def _gather(self) -> tuple[Plan, Move]:
        """Acknowledge the generation that begins, and wait for its plan. Waits block in the store: a word wakes them."""
        pause, last_id = Pause(self.config.timeout_s), "0-0"
        acknowledged, ack, began = 0, self._ack(), time.monotonic()
        while True:
            self._check_scheduler()
            try:
                current = self.coordination.generation()
                if current is None:
                    self.hear(Answer(scheduled=False))
                    if not self._known and time.monotonic() - began > NO_JOB_S:
                        raise JobIsOver
                if current is not None and current > max(self.generation, acknowledged):
                    current = self._acknowledge(current, ack)
                    acknowledged = self._known = current
                if acknowledged:
                    plan = self.coordination.plan()
                    if plan is not None and plan.generation >= acknowledged:
                        self.generation = plan.generation
                        return plan, move_for(plan, ack)
                last_id, words = self.coordination.wait_for_word(last_id, self._slice_ms())
            except StoreDataLost:
                self.hear(Answer(scheduled=False))
                acknowledged = 0  # the scheduler will begin anew, by a newer number
                pause.wait()
                continue
            except StoreUnavailable as error:
                self._check_scheduler()
                pause.wait(error)
                continue
            pause.reset()
            for kind, text in words:
                if kind == "abort":
                    raise CollectiveError(f"the job was ended: {text}")
                if kind == "over" or (kind == "released" and text == self.config.worker_id):
                    raise JobIsOver

    def _acknowledge(self, generation: int, ack: Ack) -> int:
        assert self.trainer is not None
        recent = list(self.trainer.recent)
        while True:
            current = self.coordination.acknowledge(
                generation, ack, self.process, recent, self.heartbeat.metadata, self.config.liveness_s
            )
            if current == generation:
                return generation
            generation = current

    def _slice_ms(self) -> int:
        """How long to wait for a word; TimeIsUp when the time limit is near."""
        assert self.trainer is not None
        left_s = self.trainer.time_left_s()
        if left_s <= 0:
            raise TimeIsUp
        return int(min(SLICE_MS, left_s * 1000 + 1))

    def _check_scheduler(self) -> None:
        if self.orphaned:
            raise Orphaned


class Pause:
    """Jittered exponential back-off while the store cannot be reached, for at most `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.reset()

    def reset(self) -> None:
        """It has been reached."""
        self._pause_s, self._since = PAUSE_S, time.monotonic()

    def wait(self, error: StoreError | None = None) -> None:
        """Sleep, or raise `error` when the time is up."""
        if error is not None and time.monotonic() - self._since > self.limit_s:
            raise error
        time.sleep(self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)


class Heartbeat:
    """Renews the worker's metadata key while a step takes long, from a thread that stops when the process does."""

    def __init__(self, member: Member) -> None:
        config = member.config
        self._member, self._every_s = member, config.liveness_s / 4
        self.metadata = json.dumps({"rank": config.rank})
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        timeout_s = max(0.5, min(2.0, config.liveness_s / 2))
        self._parameters = ParameterStore(member.parameters.url, job=config.job, timeout_s=timeout_s, retries=0)

    def __enter__(self) -> Heartbeat:
        self._ended.clear()
        self._thread = threading.Thread(target=self._beat, name="smlt-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()
        self._parameters.close()

    def _beat(self) -> None:
        coordination, member = Coordination(self._parameters), self._member
        while True:
            # While it loads, the user's code may hold the interpreter for longer than in a step.
            liveness_s = member.config.liveness_s if member.trainer is not None else max(LOADING_S, member.config.liveness_s)
            try:
                member.hear(coordination.beat(member.config.worker_id, member.process, self.metadata, liveness_s))
            except StoreDataLost:
                member.hear(Answer(scheduled=False))
            except (StoreError, FencedError):
                pass  # the trainer meets them too, and can do something about them
            if self._ended.wait(self._every_s):
                return
