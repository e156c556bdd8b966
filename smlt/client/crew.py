"""The workers of a run: who they are, who is lost, who takes whose place. Carries out what `Coordinator` decides."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from smlt.client.policy import FailurePolicy, reraised
from smlt.client.records import Records
from smlt.client.request import RunRequest
from smlt.client.starts import END_S, Started, Starts
from smlt.errors import StoreFull, StoreUnavailable
from smlt.store.coordination import Coordination
from smlt.store.membership import Coordinator
from smlt.store.object import open_object_store
from smlt.worker.checkpoint import load_latest

#: How often the metadata keys are looked at, and the lease renewed.
LOOK_EVERY_S = 0.5
#: A spare is started when the others have had the processor for so long.
SPARE_DELAY_S = 0.5
#: A worker that has reported its end has so long to leave.
LEAVE_S = 10.0
#: After so many of them in a row did not come up, no more spares or additional workers are started.
SPARE_FAILURES = 3


@dataclass
class Change:
    """Why and since when the membership changes; written down when training goes on."""

    reasons: list[str] = field(default_factory=list)
    noticed: float = field(default_factory=time.time)
    lost: list[int] = field(default_factory=list)  # ranks


class Crew:
    """Starts `request.workers` workers, keeps as many, and has them agree on each generation.

    `tick` does whatever is to be done now. Raises WorkerLostError when the policy says so, or nobody is left; and what a
    worker has recorded as the error that ends the job.
    """

    def __init__(
        self,
        request: RunRequest,
        starts: Starts,
        coordination: Coordination,
        scheduler_id: str,
        records: Records,
        *,
        resume: bool,
    ) -> None:
        self.request, self.records, self.started = request, records, starts
        self.coordination, self.scheduler_id = coordination, scheduler_id
        self.resume = resume
        self.coordinator = Coordinator()
        self.policy = FailurePolicy(request)
        self.size = request.workers  # wanted
        self.restarts = 0
        self.change: Change = Change(["start"])
        self._changing = True  # `change` is still to be written down
        self._progress_at = 0  # the last completed step; what is done again is no progress
        self._begins_at = 0  # the step behind which the plan begins
        self._joining: dict[str, str | None] = {}  # started beside the others, by whom they will replace; None: one more
        self._spare_failures = 0
        self.too_many: int | None = None  # so many workers could not be had
        self._looked = 0.0
        self._nothing_to_finish = False  # the store has lost its data since the last plan, and with it what was sent
        self._missing: dict[str, float] = {}  # monotonic: since when a metadata key is not there
        self._frozen = 0.0  # monotonic: since then they gather
        self.store_was_lost = False  # since whoever looks at this has set it back
        self._ended_since = 0.0
        self._finished: set[str] = set()  # of the plan's: has ended its part
        self._delete_before = 0
        self._reshaping: tuple[int, Callable[[], str]] | None = None  # asked for, until all have paused
        self._words: deque[tuple[str, str]] = deque()  # of the workers, still to be heard

    def begin(self) -> None:
        """Open the first generation and start the workers."""
        self._freeze([self.started.new(index) for index in range(self.size)])
        self.started.start_what_is_due()

    # ---- one look around ----

    def tick(self, words: list[tuple[str, str]]) -> str:
        """Do what is to be done, after `words` of the workers. Returns how the job has ended, "" while it goes on."""
        self.started.start_what_is_due()
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
        self._end_who_does_not_stop()
        self._let_join()
        if self.records.done_step > self._progress_at:
            self._progress_at = self.records.done_step
            self.policy.step_completed()
        self._went_on()
        return ""

    def ranks_to_read(self) -> int:
        """Reports may come from ranks below this one."""
        return max(self.size, self.records.world_size, len(self.coordinator.expected))

    def look_at_once(self) -> None:
        """The store was away: the next tick looks at what it has."""
        self._looked = 0.0

    def _hear(self, words: Iterable[tuple[str, str]]) -> None:
        self._words.extend(words)
        while self._words:
            kind, text = self._words[0]
            if kind == "ack":
                self._take_acks()
            elif kind == "fault":
                self._hear_of_a_fault(json.loads(text))
            elif kind == "paused" and text in self.started:
                self._renew(text)
            self._words.popleft()  # not before: when the store goes away meanwhile, it is heard again

    def _hear_of_a_fault(self, word: dict[str, Any]) -> None:
        """A worker cannot go on in the generation that is in force."""
        if int(word["generation"]) != self.coordinator.generation or self.coordinator.plan is None:
            return  # a newer one has begun since
        by_rank = {rank: worker_id for worker_id, rank in self.coordinator.ranks.items()}
        blamed = [by_rank[rank] for rank in word["ranks"] if rank in by_rank]
        for worker_id in blamed:
            self._lose(worker_id, f"did not take part: {word['text']}")
        if not blamed:
            self._end_if_the_job_failed()
            self.policy.count(-1, word["text"], None, self.records.done_step)
            self.freeze_all(word["text"])

    def _take_acks(self) -> None:
        for ack, recent in self.coordination.acks(self.coordinator.generation):
            start = self.started.get(ack.worker_id)
            if start is None:
                continue
            if not start.ready:
                self.started.events.write("ready", worker_id=ack.worker_id)
            start.ready, start.watched_from = True, time.monotonic()
            if self._nothing_to_finish:
                ack = replace(ack, finishing=False)
            if self.coordinator.acknowledge(self.coordinator.generation, ack):
                self.records.take_recent(recent)
                self.coordinator.reported(self.records.newest_step)

    def _see_who_has_ended(self) -> None:
        for worker_id, start in list(self.started.items()):
            code = start.code
            if code is None:
                if start.overdue:
                    self._lose(worker_id, f"has not come within {start.start_s:g} s")
                continue
            if not start.gone:
                start.gone = True
                continue
            rank = self.coordinator.ranks.get(worker_id)
            if self._takes_part(worker_id) and rank in self.records.ended:
                self._finished.add(worker_id)
                if self.records.ended[rank] != "paused":
                    self.started.finish(worker_id, rank, self.records.ended[rank])
            else:
                assert start.handle is not None
                self._lose(worker_id, start.handle.account(), code)

    def _takes_part(self, worker_id: str) -> bool:
        return self.coordinator.plan is not None and worker_id in self.coordinator.plan.ranks

    def _look(self) -> None:
        """See that the store has the job, and who lacks a metadata key (which expires when nobody renews it).

        A clock of the store that jumps makes them all expire: whoever lives brings its own back with the next heartbeat.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        ended = {worker_id for worker_id, rank in self.coordinator.ranks.items() if rank in self.records.ended}
        watched = [
            worker_id
            for worker_id, start in self.started.items()
            if start.handle is not None
            and (start.watched_from is None or start.watched_from <= now)
            and (worker_id not in ended or not self._takes_part(worker_id))
        ]
        seen = self.coordination.look(self.scheduler_id, watched)
        went_back = seen.generation < self.coordinator.generation
        if not seen.intact or (went_back and self.coordinator.plan is not None):  # an older snapshot, a replica that lagged
            self.store_has_lost_data()
            return
        if went_back:  # it went away when it was to be told
            self.coordination.open_generation(self.coordinator.generation, self.scheduler_id)
        elif self.coordinator.plan is not None and not seen.has_plan:
            self.coordination.publish(self.coordinator.plan, self.scheduler_id)
        for worker_id in [w for w, alive in seen.alive.items() if self.started[w].watched_from is None]:
            if seen.alive.pop(worker_id):  # the first sign of life of one that is still starting
                self.started[worker_id].watched_from = now
        self._missing = {w: self._missing.get(w, now) for w, alive in seen.alive.items() if not alive}
        for worker_id, since in list(self._missing.items()):
            if now - since >= self.request.liveness_s / 3:  # heartbeats are a quarter apart
                limit = f"--liveness {self.request.liveness_s:g}"
                self._lose(worker_id, f"has stopped reporting: its metadata key has expired ({limit})")

    def _fill_places(self) -> None:
        """Nobody is waited for who is not there, whatever was interrupted by a store that went away; spares are kept."""
        if self.coordinator.plan is None:
            for worker_id in [w for w in self.coordinator.expected if w not in self.started]:
                self.coordinator.replace(worker_id, self._successor(self.coordinator.ranks.get(worker_id, 0)))
        elif not self.records.ended and self._spare_failures <= SPARE_FAILURES:
            for _ in range(self.request.spares - len(self._spares())):
                self.started.new(self.size, spare=True, delay_s=SPARE_DELAY_S)

    def _spares(self) -> list[str]:
        return self.started.spares({*self.coordinator.expected, *self._joining})

    # ---- losing and replacing ----

    def _lose(self, worker_id: str, how: str, code: int | None = None) -> None:
        """A worker is lost: end what is left of it, and change the membership if it took part."""
        frozen, takes_part = self.coordinator.plan is None, self._takes_part(worker_id)
        needed = worker_id in self.coordinator.expected if frozen else takes_part and not self.records.ended
        if needed:
            self._end_if_the_job_failed()  # before anything is changed: when the store is away, this is all done again
        start = self._let_go(worker_id, how, code)
        if takes_part and not needed:
            # Someone has ended in order, so the last checkpoint is written: this one is no more needed.
            self._finished.add(worker_id)
            return
        if not needed:
            self._lose_one_beside(worker_id, code)
            return
        rank = self.coordinator.ranks.get(worker_id, start.config.rank if start is not None else 0)
        self.policy.count(rank, f"worker {rank} {how}", start, self.records.done_step, code)
        if not frozen:
            self._freeze(self._members())
        self.change.reasons.append(f"worker {rank} {how}")
        self.change.lost.append(rank)
        self.coordinator.replace(worker_id, self._successor(rank))
        if not self.coordinator.expected:
            raise self.policy.loss(rank, f"worker {rank} {how}, and no worker is left", start, self.records.done_step)

    def _let_go(self, worker_id: str, how: str = "is not needed", code: int | None = None) -> Started | None:
        """End what is left of a worker; what is known of it. A spare that goes on would wait for a place: it is told."""
        start = self.started.lose(worker_id, how, code)
        if start is not None and start.config.spare and start.handle is not None:
            with suppress(StoreUnavailable, StoreFull):
                self.coordination.release(worker_id)
        return start

    def _lose_one_beside(self, worker_id: str, code: int | None) -> None:
        """A spare, or one that was to join, has ended: start another, unless they do not come up."""
        joins = worker_id in self._joining
        instead_of = self._joining.pop(worker_id, None)
        self._spare_failures += code not in (None, 0)
        if not joins:
            return
        if self._spare_failures <= SPARE_FAILURES:
            self._join(instead_of)
            return
        self.too_many, self.size = self.size, len(self.coordinator.ranks)
        logs = self.started.folder.path / "logs"
        self.records.progress.warning(f"additional workers do not come up: {self.size} go on; see {logs}")

    def _members(self) -> list[str]:
        """The workers of the last plan, by rank."""
        ranks = self.coordinator.ranks
        return sorted(ranks, key=ranks.__getitem__)

    def _successor(self, index: int) -> str | None:
        """Who takes a lost worker's place: a spare that is ready, or a new one; nobody when the job shrinks."""
        if self.policy.shrinks and len(self.coordinator.expected) > 1:
            self.size = len(self.coordinator.expected) - 1
            return None
        self.restarts += 1
        if ready := [worker_id for worker_id in self._spares() if self.started[worker_id].ready]:
            return ready[0]
        return self.started.new(index, delay_s=self.policy.backoff_s)

    def _end_if_the_job_failed(self) -> None:
        """Raise what the user's code raised in the worker that failed first."""
        failure = self.coordination.failure()
        if failure is not None:
            raise reraised(failure)

    def store_has_lost_data(self) -> None:
        """The store is back, without the job: begin a generation with those who are there, and say what it must know."""
        self.store_was_lost = self._nothing_to_finish = True
        soon = time.monotonic() + 2 * self.request.liveness_s  # by then their heartbeats have come again
        for start in self.started.values():
            start.watched_from = None if start.watched_from is None else soon
        self.freeze_all("the store has lost its data")

    def freeze_all(self, reason: str) -> None:
        """Begin a generation with the same workers."""
        self._freeze(self.coordinator.expected if self.coordinator.plan is None else self._members())
        self.change.reasons.append(reason)

    def _freeze(self, expected: list[str], successors: Mapping[str, str] | None = None) -> None:
        if not self._changing or (self.change.reasons == ["start"] and self.coordinator.generation):
            self.change = Change()
        self._changing = True
        self._finished.clear()
        self._ended_since = 0.0
        self._frozen = time.monotonic()
        self.records.begin_generation(self.coordinator.freeze(expected, successors))
        self.started.events.write("freeze", generation=self.coordinator.generation)
        try:
            self.coordination.open_generation(self.coordinator.generation, self.scheduler_id)
        except StoreUnavailable:  # the next look says it again
            self.look_at_once()

    def _end_who_does_not_stop(self) -> None:
        """A wait ends (invariant 8): also for a worker that hangs while its heartbeat goes on."""
        if self.coordinator.plan is not None or time.monotonic() - self._frozen < self.request.timeout_s:
            return
        for worker_id in self.coordinator.missing():
            start = self.started.get(worker_id)
            if start is not None and start.ready:  # those that are still to come have a limit of their own
                self._lose(worker_id, f"did not stop for a new generation within {self.request.timeout_s:g} s (--timeout)")

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
            self.records.catch_up(*self._checkpoint())
        self.records.world_size = plan.world_size
        self._begins_at = max(self.records.done_step, plan.position.step if plan.position is not None else 0)
        self._delete_before = plan.generation
        self.started.events.write("plan", generation=plan.generation, world_size=plan.world_size, ranks=dict(plan.ranks))
        self.coordination.publish(plan, self.scheduler_id)
        if self._reshaping is not None:  # the request may have gone with the store's data
            self.coordination.request_pause()

    def _checkpoint(self) -> tuple[int, int, dict[str, float], list[dict[str, Any]]]:
        """Step, epoch, metrics and last rows of the newest checkpoint that is whole; of the beginning when there is none."""
        template = self.started.template
        found = load_latest(open_object_store(template.object_store_url), f"{template.run}/checkpoints")
        if found is None:
            return 0, 0, {}, []
        state = found[1]
        return int(state["step"]), int(state["epoch"]), state["metrics"], state.get("recent", [])

    def _went_on(self, *, ended: bool = False) -> None:
        """A step is complete, or all have ended: the change is over, what older generations left is of no more use.

        A step that the plan settled is not enough: who finishes it needs what the generation before has left.
        """
        plan = self.coordinator.plan
        if plan is None or not self._changing:
            return
        if self.records.done_step <= self._begins_at and not ended:
            return
        change, self._changing, self._spare_failures = self.change, False, 0
        if change.reasons != ["start"]:
            self.records.change(
                {
                    "generation": self.coordinator.generation,
                    "world_size": plan.world_size,
                    "step": self.records.done_step,
                    "reasons": change.reasons,
                    "lost_ranks": change.lost,
                    "restarts": self.restarts,
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

    @property
    def is_changing(self) -> bool:
        """Whether the membership is changing, or is about to."""
        return self._changing or self.coordinator.plan is None or bool(self._joining) or self._reshaping is not None

    def reshape(self, size: int, use: Callable[[], str]) -> None:
        """Go on with `size` workers that are started in another way: all pause at a checkpoint and are invoked again.

        `use` is called when they have: from then on the executor starts workers that way. It returns what has changed, in a few
        words. Call it while a plan is in force.
        """
        self._reshaping = size, use
        self.coordination.request_pause()

    def _invoke_again(self) -> None:
        """All have paused, at their time limit or to be started in another way: they go on in another invocation."""
        reason, members = "time limit", self._members()
        if self._reshaping is not None:
            self.coordination.withdraw_pause()  # first: when the store is away, all this is done again
            (self.size, use), self._reshaping = self._reshaping, None
            reason = use()
            for worker_id in [*self._spares(), *self._joining, *members[self.size :]]:
                self._let_go(worker_id)
            self._joining.clear()
        end_by = time.monotonic() + END_S  # for all of them: who is out of sight is not seen to end
        successors = {w: self.started.invoke_again(w, self.coordinator.ranks[w], end_by) for w in members[: self.size]}
        more = [self.started.new(index) for index in range(len(members), self.size)]
        self._freeze([*successors.values(), *more], successors)
        self.change.reasons.append(reason)
        self.started.start_what_is_due()

    def _renew(self, worker_id: str) -> None:
        """One worker has paused by itself: its time limit came while it waited for a plan."""
        rank = self.coordinator.ranks.get(worker_id, self.started[worker_id].config.rank)
        self.policy.count_pause(rank, self.started[worker_id], self.records.done_step)
        if self._takes_part(worker_id):
            self.freeze_all("time limit")
        new = self.started.invoke_again(worker_id, rank)
        if worker_id in self._joining:
            self._joining[new] = self._joining.pop(worker_id)
        elif self.coordinator.plan is None and worker_id in self.coordinator.expected:
            self.coordinator.rename(worker_id, new)

    def resize(self, size: int) -> None:
        """Go on with `size` workers. Call it while a plan is in force.

        New ones are started first; the others train on until those are ready.
        """
        for worker_id in [w for w, instead_of in self._joining.items() if instead_of is None]:
            del self._joining[worker_id]  # of an earlier call
            self._let_go(worker_id)
        members = self._members()
        if size < len(members):
            self._freeze(members[:size])
            self.change.reasons.append(f"{size} workers instead of {len(members)}")
            for worker_id in members[size:]:
                if self.started[worker_id].config.spare:  # it would wait for another place
                    self._lose(worker_id, "is not needed")
        self.size = size
        self._spare_failures = 0
        for _ in range(size - len(members)):
            self._join(None)

    def replace_when_ready(self, rank: int) -> None:
        """Start another worker for `rank`, and change over when it is ready."""
        for worker_id, held in self.coordinator.ranks.items():
            if held == rank and worker_id not in self._joining.values():
                self._join(worker_id)

    def _join(self, instead_of: str | None) -> None:
        extra = sum(other is None for other in self._joining.values())
        index = len(self.coordinator.ranks) + extra if instead_of is None else self.coordinator.ranks.get(instead_of, 0)
        self._joining[self.started.new(index, spare=True)] = instead_of

    def _let_join(self) -> None:
        """When all that were started beside the others are ready, change over."""
        if not self._joining or self.coordinator.plan is None or self.records.ended:
            return
        if not all(worker_id in self.started and self.started[worker_id].ready for worker_id in self._joining):
            return
        joining, self._joining = self._joining, {}
        ranks, members = dict(self.coordinator.ranks), self._members()
        replaced = {old: new for new, old in joining.items() if old is not None and old in ranks}
        expected = [replaced.get(worker_id, worker_id) for worker_id in members]
        expected += [new for new, old in joining.items() if old is None]
        self._freeze(expected, replaced)
        slow = ", ".join(str(ranks[old]) for old in replaced)
        self.change.reasons.append(f"rank {slow} was slow" if slow else f"{len(expected)} workers instead of {len(members)}")
        for old in replaced:
            self._lose(old, "was replaced")
