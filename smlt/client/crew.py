"""The workers of a run: who they are, who is lost, who takes whose place. Carries out what `Coordinator` decides."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smlt.client.executors import Executor, Worker
from smlt.client.records import Records
from smlt.client.request import RunRequest
from smlt.client.runs import Run
from smlt.errors import SmltError, TaskError, WorkerLostError
from smlt.store.coordination import Coordination
from smlt.store.membership import Coordinator
from smlt.store.object import open_object_store
from smlt.worker.checkpoint import load_latest
from smlt.worker.config import WorkerConfig

#: A worker that has not acknowledged so long after it was started does not come.
START_S = 120.0
#: How often the metadata keys are looked at, and the lease renewed.
LOOK_EVERY_S = 0.5
#: Before a replacement is started: nothing the first time, then this, doubled each time in a row, up to the last.
BACKOFF_S, BACKOFF_MAX_S = 0.5, 30.0
#: A spare is started when the others have had the processor for so long.
SPARE_DELAY_S = 0.5
#: A worker that has reported its end has so long to leave.
LEAVE_S = 10.0


@dataclass
class Started:
    """One start of a worker."""

    config: WorkerConfig
    log: Path
    not_before: float  # monotonic; it is started then
    handle: Worker | None = None
    started: float = 0.0
    ready: bool = False  # it has acknowledged a generation: model and data are in its memory
    watched: bool = False  # its metadata key has been there since the store last lost its data
    gone: bool = False  # it has ended; its last reports are read before that is looked into


@dataclass
class Change:
    """Why and since when the membership changes; written down when training goes on."""

    reasons: list[str] = field(default_factory=list)
    noticed: float = field(default_factory=time.time)
    lost: list[int] = field(default_factory=list)  # ranks


class Crew:
    """Starts `request.workers` workers, keeps as many, and has them agree on each generation.

    `template` is the configuration of every worker; rank, worker id and the like are filled in here. `tick` does whatever is to
    be done now. Raises WorkerLostError when the policy says so, or nobody is left; TaskError for what a worker's code raised.
    """

    def __init__(
        self,
        request: RunRequest,
        folder: Run,
        executor: Executor,
        coordination: Coordination,
        scheduler_id: str,
        template: WorkerConfig,
        records: Records,
        *,
        resume: bool,
    ) -> None:
        self.request, self.folder, self.executor, self.records = request, folder, executor, records
        self.coordination, self.scheduler_id, self.template = coordination, scheduler_id, template
        self.resume = resume
        self.coordinator = Coordinator()
        self.size = request.workers  # wanted
        self.started: dict[str, Started] = {}
        self.restarts = 0
        self.change: Change | None = Change(["start"])
        self._in_a_row: int = 0  # losses since the last completed step
        self._progress_at = 0  # that step
        self._joining: dict[str, str | None] = {}  # started beside the others, by whom they will replace; None: one more
        self._looked = 0.0
        self._nothing_to_finish = False  # the store has lost its data since the last plan, and with it what was sent
        self.store_was_lost = False  # since whoever looks at this has set it back
        self._number = 0
        self._ended_since = 0.0
        self._finished: set[str] = set()  # of the plan's: has ended its part
        self._delete_before = 0

    # ---- starting ----

    def begin(self) -> None:
        """Open the first generation and start the workers."""
        expected = [self._new(index) for index in range(self.size)]
        self._freeze(expected)
        self._start_what_is_due()

    def _new(self, index: int, *, spare: bool = False, delay_s: float = 0.0) -> str:
        """Another worker, to be started in `delay_s`; its id."""
        self._number += 1
        worker_id = f"w{self._number}-{os.urandom(4).hex()}"
        config = replace(self.template, rank=index, worker_id=worker_id, spare=spare)
        log = self.folder.log_path(f"worker-{index}")
        self.started[worker_id] = Started(config, log, time.monotonic() + delay_s)
        return worker_id

    def _start_what_is_due(self) -> None:
        now = time.monotonic()
        for start in self.started.values():
            if start.handle is None and start.not_before <= now:
                start.handle, start.started = self.executor.start(start.config, start.log), now

    # ---- one look around ----

    def tick(self, words: list[tuple[str, str]]) -> str:
        """Do what is to be done, after `words` of the workers. Returns how the job has ended, "" while it goes on."""
        self._start_what_is_due()
        self._hear(words)
        self._see_who_has_ended()
        self._fill_places()
        if state := self._ended():
            if state != "paused":
                self._went_on(ended=True)  # a change behind the last step is one too
                return state
            self._invoke_again()
        self._look()
        self._resume_if_complete()
        self._let_join()
        if self.records.done_step > self._progress_at:
            self._progress_at, self._in_a_row = self.records.done_step, 0
            self._went_on()
        return ""

    def _hear(self, words: list[tuple[str, str]]) -> None:
        for kind, text in words:
            if kind == "ack":
                self._take_acks()
            elif kind == "fault":
                word: dict[str, Any] = json.loads(text)
                if int(word["generation"]) != self.coordinator.generation or self.coordinator.plan is None:
                    continue  # a newer generation has begun since
                by_rank = {rank: worker_id for worker_id, rank in self.coordinator.ranks.items()}
                blamed = [by_rank[rank] for rank in word["ranks"] if rank in by_rank]
                if blamed:
                    for worker_id in blamed:
                        self._lose(worker_id, f"did not take part: {word['text']}")
                else:
                    self._end_if_the_task_failed()
                    self._count_a_loss(word["text"], None)
                    self.freeze_all(word["text"])
            elif kind == "paused" and text in self.started and self._is_needed(text):
                if self.coordinator.plan is not None:
                    self.freeze_all("time limit")
                self.coordinator.rename(text, self._next_invocation(text))

    def _take_acks(self) -> None:
        for ack, recent in self.coordination.acks(self.coordinator.generation):
            start = self.started.get(ack.worker_id)
            if start is None:
                continue
            start.ready = start.watched = True
            if self._nothing_to_finish:
                ack = replace(ack, finishing=False)
            if self.coordinator.acknowledge(self.coordinator.generation, ack):
                self.records.take_recent(recent)
                self.coordinator.reported(self.records.done_step)

    def _see_who_has_ended(self) -> None:
        for worker_id, start in list(self.started.items()):
            code = None if start.handle is None else start.handle.poll()
            if code is None:
                if start.handle is not None and not start.ready and time.monotonic() - start.started > START_S:
                    self._lose(worker_id, f"has not come within {START_S:g} s")
                continue
            if not start.gone:
                start.gone = True
                continue
            rank = self.coordinator.ranks.get(worker_id)
            if self._takes_part(worker_id) and rank in self.records.ended:
                self._finished.add(worker_id)
                if self.records.ended[rank] != "paused":
                    del self.started[worker_id]
            elif self._is_needed(worker_id):
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                self._lose(worker_id, how, code)
            else:
                del self.started[worker_id]

    def _takes_part(self, worker_id: str) -> bool:
        return self.coordinator.plan is not None and worker_id in self.coordinator.plan.ranks

    def _is_needed(self, worker_id: str) -> bool:
        """Whether the job counts on this worker now, or will."""
        if worker_id in self._joining:
            return True
        return self._takes_part(worker_id) if self.coordinator.plan is not None else worker_id in self.coordinator.expected

    def ranks_to_read(self) -> int:
        """Reports may come from ranks below this one."""
        return max(self.size, self.records.world_size, len(self.coordinator.expected))

    def look_at_once(self) -> None:
        """The store was away: the next tick looks at what it has."""
        self._looked = 0.0

    def _look(self) -> None:
        """See that the store has the job, and who lacks a metadata key (which expires when nobody renews it)."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        ended = {worker_id for worker_id, rank in self.coordinator.ranks.items() if rank in self.records.ended}
        watched = [w for w, start in self.started.items() if start.watched and (w not in ended or not self._takes_part(w))]
        seen = self.coordination.look(self.scheduler_id, watched)
        if not seen.intact:
            self.store_has_lost_data()
            return
        if seen.generation < self.coordinator.generation:  # it went away when it was to be told
            self.coordination.open_generation(self.coordinator.generation, self.scheduler_id)
        elif self.coordinator.plan is not None and not seen.has_plan:
            self.coordination.publish(self.coordinator.plan, self.scheduler_id)
        for worker_id, alive in seen.alive.items():
            if not alive:
                self._lose(worker_id, f"has stopped reporting: its metadata key has expired ({self.request.liveness_s:g} s)")

    def _fill_places(self) -> None:
        """Nobody is waited for who is not there, whatever was interrupted by a store that went away; spares are kept."""
        if self.coordinator.plan is None:
            for worker_id in [w for w in self.coordinator.expected if w not in self.started]:
                self.coordinator.replace(worker_id, self._successor(self.coordinator.ranks.get(worker_id, 0)))
        elif not self.records.ended:
            for _ in range(self.request.spares - len(self._spares())):
                self._new(self.size, spare=True, delay_s=SPARE_DELAY_S)

    def _spares(self) -> list[str]:
        """Workers that wait for a place."""
        busy = {*self.coordinator.expected, *self._joining}
        return [worker_id for worker_id, start in self.started.items() if start.config.spare and worker_id not in busy]

    # ---- losing and replacing ----

    def _lose(self, worker_id: str, how: str, code: int | None = None) -> None:
        """A worker is lost: end what is left of it, and change the membership if it took part."""
        start = self.started.pop(worker_id, None)
        if start is not None and start.handle is not None:
            start.handle.kill()
        rank = self.coordinator.ranks.get(worker_id)
        if self._takes_part(worker_id) and self.records.ended:
            # Someone has ended in order, so the last checkpoint is written: this one is no more needed.
            self._finished.add(worker_id)
            return
        if worker_id in self._joining:
            self._new_joiner(self._joining.pop(worker_id))
            return
        needed = self._takes_part(worker_id) or (self.coordinator.plan is None and worker_id in self.coordinator.expected)
        if not needed:
            return
        config = start.config if start is not None else self.template
        name = f"worker {rank if rank is not None else config.rank}"
        self._end_if_the_task_failed()
        self._count_a_loss(f"{name} {how}", start)
        if code in (2, 5, 6):  # a configuration, a task or a checkpoint that cannot work will not the next time either
            raise self._loss(f"{name} {how}", start)
        if self.coordinator.plan is not None:
            self._freeze(sorted(self.coordinator.ranks, key=self.coordinator.ranks.__getitem__))
        assert self.change is not None
        self.change.reasons.append(f"{name} {how}")
        self.change.lost.append(config.rank if rank is None else rank)
        self.coordinator.replace(worker_id, self._successor(config.rank if rank is None else rank))
        if not self.coordinator.expected:
            raise self._loss(f"{name} {how}, and no worker is left", start)

    def _successor(self, index: int) -> str | None:
        """Who takes a lost worker's place: a spare that is ready, or a new one; nobody when the job shrinks."""
        if self.request.on_failure == "shrink" and len(self.coordinator.expected) > 1:
            self.size = len(self.coordinator.expected) - 1
            return None
        self.restarts += 1
        if ready := [worker_id for worker_id in self._spares() if self.started[worker_id].ready]:
            return ready[0]
        delay_s = min(BACKOFF_S * 2.0 ** (self._in_a_row - 2), BACKOFF_MAX_S) if self._in_a_row > 1 else 0.0
        return self._new(index, delay_s=delay_s)

    def _count_a_loss(self, what: str, start: Started | None) -> None:
        self._in_a_row += 1
        if self.request.on_failure == "stop" or self._in_a_row > self.request.max_restarts:
            raise self._loss(what, start)

    def _loss(self, what: str, start: Started | None) -> SmltError:
        times = f" ({self._in_a_row} failures in a row without a step between)" if self._in_a_row > 1 else ""
        if start is None:
            return WorkerLostError(f"{what}{times}", [], self.records.done_step)
        text = f"{what}{times}; its log: {start.log}\n{tail(start.log)}".rstrip()
        return WorkerLostError(text, [start.config.rank], self.records.done_step)

    def _end_if_the_task_failed(self) -> None:
        """Raise what the user's code raised in the worker that failed first."""
        failure = self.coordination.failure()
        if failure is None:
            return
        kind = failure["error"].partition(":")[0]
        if trace := failure["traceback"].rstrip():
            raise TaskError(f"worker {failure['rank']} failed at step {failure['step']}: {failure['error']}\n\n{trace}")
        import smlt.errors

        known = getattr(smlt.errors, kind, TaskError)
        error = known if isinstance(known, type) and issubclass(known, SmltError) else TaskError
        raise error(f"worker {failure['rank']} at step {failure['step']}: {failure['error'].partition(': ')[2]}")

    def store_has_lost_data(self) -> None:
        """The store is back, without the job: begin a generation with those who are there, and say what it must know."""
        self.store_was_lost = self._nothing_to_finish = True
        for start in self.started.values():
            start.watched = False  # their keys are gone; they come back with an acknowledgement
        self.freeze_all("the store has lost its data")

    def freeze_all(self, reason: str) -> None:
        """Begin a generation with the same workers."""
        expected = self.coordinator.expected
        if self.coordinator.plan is not None:
            expected = sorted(self.coordinator.ranks, key=self.coordinator.ranks.__getitem__)
        self._freeze(expected)
        assert self.change is not None
        self.change.reasons.append(reason)

    def _freeze(self, expected: list[str], successors: dict[str, str] | None = None) -> None:
        if self.change is None or (self.change.reasons == ["start"] and self.coordinator.generation):
            self.change = Change()
        self.records.ended.clear()
        self._finished.clear()
        self._ended_since = 0.0
        self.coordinator.freeze(expected, successors)
        self.coordination.open_generation(self.coordinator.generation, self.scheduler_id)

    # ---- resuming ----

    def _resume_if_complete(self) -> None:
        coordinator = self.coordinator
        if coordinator.plan is not None:
            return
        self._take_acks()
        ever = self.resume or self.records.done_step > 0
        plan = coordinator.make_plan(ever)
        if plan is None:
            return
        self._nothing_to_finish = False
        if plan.position is not None:
            self.records.settle(plan.position.step)
        elif ever:
            self.records.go_back(*self._checkpoint())
        self.records.world_size = plan.world_size
        self.coordination.publish(plan, self.scheduler_id)
        self._delete_before = plan.generation

    def _checkpoint(self) -> tuple[int, int, dict[str, float]]:
        """Step, epoch and metrics of the newest checkpoint that is whole; of the beginning when there is none."""
        found = load_latest(open_object_store(self.template.object_store_url), f"{self.folder.name}/checkpoints")
        return (0, 0, {}) if found is None else (int(found[1]["step"]), int(found[1]["epoch"]), found[1]["metrics"])

    def _went_on(self, *, ended: bool = False) -> None:
        """A step is complete, or all have ended: the change is over, what older generations left is of no more use.

        A step that the plan settled is not enough: who finishes it needs what the generation before has left.
        """
        plan = self.coordinator.plan
        if plan is None or self.change is None:
            return
        if plan.position is not None and self.records.done_step <= plan.position.step and not ended:
            return
        change, self.change = self.change, None
        if change.reasons != ["start"]:
            self.records.change(
                {
                    "generation": self.coordinator.generation,
                    "world_size": plan.world_size,
                    "step": self.records.done_step,
                    "reasons": change.reasons,
                    "lost_ranks": change.lost,
                    "noticed": change.noticed,
                    "recovery_s": time.time() - change.noticed,
                }
            )
        self.coordination.delete_before(self._delete_before)

    # ---- pausing, growing, shrinking ----

    def _ended(self) -> str:
        """How the job has ended: when every worker of the plan has, in the same state."""
        plan = self.coordinator.plan
        if plan is None or not self.records.ended:
            return ""
        state = next(iter(self.records.ended.values()))
        self._ended_since = self._ended_since or time.monotonic()
        late = time.monotonic() - self._ended_since > LEAVE_S
        for worker_id, rank in plan.ranks.items():
            if worker_id not in self._finished and not (rank in self.records.ended and (state == "paused" or late)):
                return ""
        return state

    def _invoke_again(self) -> None:
        """All have paused at their time limit: they go on in another invocation."""
        ranks = self.coordinator.ranks
        successors = {w: self._next_invocation(w) for w in sorted(ranks, key=ranks.__getitem__)}
        self._freeze(list(successors.values()), successors)
        assert self.change is not None
        self.change.reasons.append("time limit")
        self._start_what_is_due()

    def _next_invocation(self, worker_id: str) -> str:
        """Invoke a worker again that has paused, warm where the process is still there; its new id."""
        before = self.started.pop(worker_id, None)
        new = self._new(self.coordinator.ranks.get(worker_id, 0))
        if before is not None and before.handle is not None:
            start = self.started[new]
            if self.request.warm and before.handle.invoke(start.config):
                start.handle, start.started = before.handle, time.monotonic()
            elif not self.request.warm:
                self._ending(before.handle)
        return new

    def _ending(self, handle: Worker) -> None:
        """A cold worker ends by itself when it has paused; not longer than that takes."""
        deadline = time.monotonic() + 5.0
        while handle.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        handle.kill()

    @property
    def steady(self) -> bool:
        """Whether a plan is in force and nobody is to join: the size can be changed."""
        return self.coordinator.plan is not None and not self._joining

    def resize(self, size: int) -> None:
        """Go on with `size` workers. New ones are started first; the others train on until those are ready."""
        if size > self.size:
            for _ in range(size - self.size):
                self._new_joiner(None)
        elif size < self.size and self.coordinator.plan is not None:
            ranks = self.coordinator.ranks
            keep = sorted(ranks, key=ranks.__getitem__)[:size]
            leaving = [worker_id for worker_id in ranks if worker_id not in keep]
            self._freeze(keep)
            assert self.change is not None
            self.change.reasons.append(f"{size} workers instead of {self.size}")
            for worker_id in leaving:
                if self.started[worker_id].config.spare:  # it would wait for another place
                    self._lose(worker_id, "is not needed")
        else:
            return
        self.size = size

    def replace_when_ready(self, rank: int) -> None:
        """Start another worker for `rank`, and change over when it is ready."""
        for worker_id, held in self.coordinator.ranks.items():
            if held == rank and worker_id not in self._joining.values():
                self._new_joiner(worker_id)

    def _new_joiner(self, instead_of: str | None) -> None:
        index = self.coordinator.ranks.get(instead_of, self.size) if instead_of is not None else self.size
        self._joining[self._new(index, spare=True)] = instead_of

    def _let_join(self) -> None:
        """When all that were started beside the others are ready, change over."""
        if not self._joining or self.coordinator.plan is None or self.records.ended:
            return
        if not all(worker_id in self.started and self.started[worker_id].ready for worker_id in self._joining):
            return
        joining, self._joining = self._joining, {}
        ranks = self.coordinator.ranks
        replaced = {old: new for new, old in joining.items() if old is not None and old in ranks}
        expected = [replaced.get(w, w) for w in sorted(ranks, key=ranks.__getitem__)]
        expected += [new for new, old in joining.items() if old is None]
        self._freeze(expected, replaced)
        assert self.change is not None
        slow = ", ".join(str(ranks[old]) for old in replaced)
        self.change.reasons.append(f"rank {slow} was slow" if slow else f"{len(expected)} workers instead of {len(ranks)}")
        for old in replaced:
            self._lose(old, "was replaced")

    # ---- the end ----

    def kill_all(self) -> None:
        """No worker is left."""
        for start in self.started.values():
            if start.handle is not None:
                start.handle.kill()


def tail(path: Path, lines: int = 10) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
