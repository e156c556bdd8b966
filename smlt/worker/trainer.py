"""The Trainer: minibatch, gradients, all-reduce, step, report; evaluation and checkpoint at the end of an epoch."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from smlt.collective.communicator import Communicator
from smlt.collective.feedback import ErrorFeedback
from smlt.errors import CheckpointError, CollectiveError, FencedError, SmltError, TaskError
from smlt.store.membership import COMMITTED, EPOCH_ENDED, SHARED, Position
from smlt.store.object import ObjectStore
from smlt.worker import checkpoint, evaluation
from smlt.worker.config import WorkerConfig
from smlt.worker.data import DataIterator, dataset_length, take
from smlt.worker.frameworks import make_adapter, seed_generators
from smlt.worker.global_batch import GlobalBatch
from smlt.worker.minibatch import Minibatch, MinibatchBuffer
from smlt.worker.step import StepUnderWay, resident_mb, step_seed
from smlt.worker.task import Task

#: Rows of the last steps go into checkpoints and acknowledgements: a report may be lost with whoever was to read it.
RECENT_ROWS = 256
#: What holds for checkpoints that were written when there was but one global batch.
BEFORE_SCHEDULES = {"batch_schedule": None, "lr_rule": "none"}
#: Before a time limit: this many of the longest recent steps, and so much beside.
STEPS_AHEAD, SPARE_TIME_S = 2.0, 0.3

#: Takes a report row; returns what the scheduler asks for: "" or "stop".
Report = Callable[[dict[str, Any]], str]


class Trainer:
    """Trains `task` as one of the workers. All workers call the same collectives in the same order, come what may.

    It outlives communicators: `attach` gives it the one of the next generation, `run` goes on from `position`. The mean of
    the workers' gradients, each weighted by its part of the global batch, is the gradient of the global batch's mean
    loss, also when the parts are uneven. A request to stop travels in that same all-reduce, so that all workers stop
    behind the same step. It is the step's last bucket: those before are all-reduced while backward computes.

    `confirm` raises when this worker may no longer write what others read, because a newer generation has begun.
    """

    def __init__(
        self,
        config: WorkerConfig,
        task: Task,
        objects: ObjectStore | None,
        report: Report,
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.task, self.objects, self.report, self.confirm = config, task, objects, report, confirm
        self.stop_requested = False
        self.pause_requested = False
        self.deadline = math.inf  # monotonic: the worker's time limit
        self.step = 0  # global steps committed
        self.epoch = 0
        self.step_in_epoch = 0
        self.phase = COMMITTED
        self.has_state = False  # the model is where `position` says, not just built
        self.state = "running"
        self.metrics: dict[str, float] = {}
        self.history: list[tuple[int, float]] = []  # with patience: epoch, the metric it is about
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT_ROWS)
        datasets = task.data()
        if not isinstance(datasets, dict) or "train" not in datasets:
            raise TaskError('data() returns {"train": ..., "test": ...}; "train" is missing')
        self.train, self.test = datasets["train"], datasets.get("test")
        self.adapter = make_adapter(task, config.seed, config.threads, config.bucket_mb)
        self._under_way: StepUnderWay | None = None
        self._feedback: dict[str, ErrorFeedback] | None = None  # by bucket; "last"
        self._rank = -1  # of the last communicator
        self._saved_step = -1
        self._longest_s = deque[float](maxlen=20)
        self._epoch_end_s = self._save_s = 0.0
        self.comm: Communicator
        self.batch = GlobalBatch(config, task, self.adapter)
        self.iterator = self._iterator(0, 1)
        if config.target_accuracy is not None:
            self._check_metric("accuracy", "--target-accuracy")
        if config.patience is not None:
            self._check_metric(config.stop_metric, "--patience")

    def _iterator(self, rank: int, world_size: int) -> DataIterator:
        return DataIterator(dataset_length(self.train), self.batch.of, self.config.seed, rank, world_size)

    def _check_metric(self, name: str, option: str) -> None:
        if self.test is None:
            raise TaskError(f'{option} needs a "test" set in data() and "{name}" in evaluate()')
        if name not in evaluation.metrics_of_one_sample(self.adapter, self.test):
            raise TaskError(f'{option} needs "{name}" in what evaluate() returns')

    # ---- generations ----

    @property
    def position(self) -> Position | None:
        """How far this worker's state is, None before it has any."""
        return Position(self.step, self.phase) if self.has_state else None

    @property
    def finishing(self) -> bool:
        """Whether all this worker has to send for the next step is sent, so that others may have completed it."""
        return self._under_way is not None and self._under_way.sent

    def attach(self, comm: Communicator) -> None:
        """Take part in `comm` from now on: its rank and world size cut the batches."""
        self.comm = comm
        self.pause_requested = False  # if it still holds, the next report brings it
        before, self._rank = self._rank, comm.rank
        config = self.config
        self.iterator = self._iterator(comm.rank, comm.world_size)
        if config.error_feedback and comm.world_size > 1 and self._feedback is None:  # alone nothing is encoded
            self._feedback = defaultdict(ErrorFeedback)
        elif self._feedback is not None and before != comm.rank:  # a warm sandbox: the rank that it had holds another shard
            self._feedback = defaultdict(ErrorFeedback)
            if self.has_state and self._saved_step == self.step:
                self._restore_feedback(self.step)
        self.state = "running"

    def enlist(self, config: WorkerConfig, report: Report, confirm: Callable[[], None]) -> None:
        """Go on for another invocation, with the model and the data that are here."""
        self.config, self.report, self.confirm = config, report, confirm
        self.stop_requested = False

    def begin(self, resume: bool) -> None:
        """Begin with all others: from the newest checkpoint if there may be one, else from the beginning."""
        if resume:
            self._load_newest()
            steps = self.comm.allgather(np.array(self.step)).tolist()
            if len(set(steps)) > 1:  # a read has failed on one of them; in the next generation the newest is the donor
                raise CollectiveError(f"the workers begin at different steps: {steps}, by what each finds of the checkpoints")
        parameters = self.adapter.parameters()
        self.comm.broadcast(parameters, out=parameters)
        self.adapter.set_parameters(parameters)
        self.has_state = True

    def complete_step(self, timeout_s: float) -> bool:
        """Commit the step under way, which another worker has completed, from the store; False when it is not there."""
        step = self._under_way
        if step is None or not step.sent or not self.comm.complete_fenced(timeout_s):
            return False
        with suppress(FencedError):  # the row goes with the acknowledgement
            self._apply(step)
        return True

    def rewind(self) -> None:
        """Take back the step under way, if there is one: it will be computed again. The communicator must be closed."""
        step, self._under_way = self._under_way, None
        if step is None:
            return
        for work, feedback in zip(step.works, step.feedbacks, strict=False):
            with suppress(SmltError):
                work.wait()
            if feedback is not None and work.complete:
                feedback.undo()
        self.adapter.restore_buffers()

    def run(self) -> str:
        """Train from `position` to the end; returns "done", "stopped", or "paused" before the time limit.

        When a collective or the store fails, this raises, `position` holds, and after `rewind` it can be called again.
        """
        if self._is_complete():
            self.state = "done"
        elif self.step_in_epoch == self.iterator.steps_in(self.epoch):
            self._end_epoch()
        if self.state == "running":
            self._train()
        if self.state in ("stopped", "paused"):
            if self._saved_step == self.step:  # at the end of an epoch only rank 0 knows when that is written
                self.comm.barrier()
            else:
                if self.state == "stopped" and self.step_in_epoch:  # paused, they go on with what each of them has
                    self._share_buffers()
                self._save(self.epoch, self.step_in_epoch, wait=True)
        self.report(self._row(kind="end", state=self.state))
        return self.state

    def _is_complete(self) -> bool:
        return self.epoch >= self.config.epochs or (self.step_in_epoch == 0 and self._is_good_enough())

    def _is_good_enough(self) -> bool:
        """Whether the last epoch has ended training before the last one: at its target, or for want of progress."""
        target, early_stop = self.config.target_accuracy, self.config.early_stop
        reached = target is not None and self.metrics.get("accuracy", 0.0) >= target
        return reached or (early_stop is not None and early_stop.reached([value for _, value in self.history]))

    def _train(self) -> None:
        """Train to the end, or until the workers agree to stop or pause."""
        while self.state == "running":
            if self.step_in_epoch == 0:
                self._begin_epoch()
            self._train_until(self.batch.known_until(self.epoch, self.config.epochs))

    def _begin_epoch(self) -> None:
        growth = self.batch.begin(self.epoch, self.metrics, self.comm)
        self._longest_s = deque((seconds * max(1.0, growth) for seconds in self._longest_s), maxlen=self._longest_s.maxlen)

    def _train_until(self, epoch: int) -> None:
        """Train with minibatches loaded ahead as far as the global batch is known: to the beginning of `epoch`."""
        steps = self.iterator.steps(self.epoch, self.step_in_epoch, epoch)
        with MinibatchBuffer(steps, lambda indices: self.adapter.prepare(take(self.train, indices))) as batches:
            waiting = time.perf_counter()
            for minibatch in batches:
                asked = self._train_step(minibatch, time.perf_counter() - waiting)
                over = self.step_in_epoch == self.iterator.steps_in(self.epoch)
                if over:
                    self._end_epoch()
                self._longest_s.append(time.perf_counter() - waiting)
                if self.state == "running" and asked:
                    self.state = asked
                if self.state != "running":
                    return
                if over and self.epoch < epoch:
                    self._begin_epoch()
                waiting = time.perf_counter()

    def _row(self, **values: Any) -> dict[str, Any]:
        row = {"rank": self.comm.rank, "step": self.step, "epoch": self.epoch, "time": time.time(), **values}
        self.recent.append(row)
        return row

    # ---- a step ----

    def _train_step(self, minibatch: Minibatch, data_s: float) -> str:
        """One step; returns what the workers agreed to do behind it: "", "stopped" or "paused".

        Of its report, `communication_s` is the time spent waiting for communication; `communication_total_s` begins when
        the first bucket leaves, and so also holds what backward hid.
        """
        adapter, n = self.adapter, self.comm.world_size
        adapter.keep_buffers()
        step = self._under_way = StepUnderWay(minibatch, data_s, time.perf_counter())
        seed_generators(step_seed(self.config.seed, self.step, self.comm.rank))
        loss = 0.0
        if minibatch.local_size:
            loss = adapter.compute(minibatch.batch, n * minibatch.local_size / minibatch.global_size, self._send)
        else:
            adapter.skip(self._send)
        step.computed = time.perf_counter()
        step.stats = np.array(
            [loss * minibatch.local_size, minibatch.local_size, float(self.stop_requested), float(self._must_pause())]
        )
        self._send_last(step)
        return self._apply(step)

    def _apply(self, step: StepUnderWay) -> str:
        """Wait for the step's buckets, take the optimizer's step, commit, report."""
        for work in step.works:
            work.wait()
        reduced = time.perf_counter()
        self.adapter.apply()
        applied = time.perf_counter()
        self._under_way = None
        self.step += 1
        self.step_in_epoch += 1
        self.phase = COMMITTED
        stats = step.stats
        asked = "stopped" if stats[2] > 0 else "paused" if stats[3] > 0 else ""
        answer = self.report(
            self._row(
                loss=float(stats[0] / stats[1]),
                samples=step.minibatch.global_size,
                global_batch_size=self.batch.size,
                epoch_steps=self.iterator.steps_in(self.epoch),
                lr_factor=self.batch.lr_factor,
                compute_s=step.computed - step.started + applied - reduced,
                communication_s=reduced - step.computed,
                communication_total_s=reduced - min(step.first_sent, step.computed),
                data_s=step.data_s,
                rss_mb=resident_mb(),
            )
        )
        self.stop_requested |= answer == "stop"
        self.pause_requested |= answer == "pause"
        return asked

    def _send(self, bucket: Any) -> None:
        """Take a bucket from backward, which goes on meanwhile."""
        step = self._under_way
        assert step is not None
        step.first_sent = min(step.first_sent, time.perf_counter())
        self._submit(step, bucket, self.config.codec, str(len(step.works)), progress=True)

    def _send_last(self, step: StepUnderWay) -> None:
        """Send the last bucket with the step's numbers."""
        codecs = {"gradient": self.config.codec, "stats": "fp32"}
        # Whoever waits moves the bytes itself: that spares a switch of threads.
        self._submit(step, {"gradient": self.adapter.gradient, "stats": step.stats}, codecs, "last", progress=False)
        step.sent = True

    def _submit(self, step: StepUnderWay, value: Any, codec: Any, bucket: str, *, progress: bool) -> None:
        feedback = self._feedback[bucket] if self._feedback is not None else None
        try:
            work = self.comm.allreduce_async(value, codec=codec, out=value, feedback=feedback, progress=progress)
        except CollectiveError:
            for earlier in step.works:  # if a bucket before has failed, that says more
                earlier.wait()
            raise
        step.works.append(work)
        step.feedbacks.append(feedback)

    def time_left_s(self) -> float:
        """Until this worker has to leave, to be gone before its time limit with a checkpoint written."""
        return self.deadline - time.monotonic() - 2 * self._save_s - SPARE_TIME_S

    def _must_pause(self) -> bool:
        """Whether it was asked for, or the next step might not end before the time limit."""
        longest_s = max(self._longest_s, default=0.0)
        if self.step_in_epoch + 1 == self.iterator.steps_in(self.epoch):
            longest_s *= self.batch.growth_behind(self.epoch)
        return self.pause_requested or self.time_left_s() < STEPS_AHEAD * longest_s + self._epoch_end_s

    # ---- the end of an epoch ----

    def _end_epoch(self) -> None:
        began = time.perf_counter()
        if self.phase < SHARED:
            self._share_buffers()
            self.phase = SHARED
        self.metrics = evaluation.evaluate(self.adapter, self.test, self.comm) if self.test is not None else {}
        if self.config.patience is not None:  # an end that is redone counts once
            value = self.metrics.get(self.config.stop_metric, math.nan)
            self.history = [*(entry for entry in self.history if entry[0] < self.epoch), (self.epoch, value)]
        held = {"global_batch_size": self.batch.size, "lr_factor": self.batch.lr_factor}
        self.report(self._row(kind="epoch", metrics=self.metrics, **held))
        self._epoch_end_s = time.perf_counter() - began
        done = self.epoch + 1 == self.config.epochs or self._is_good_enough()
        if done or (self.epoch + 1) % self.config.checkpoint_every_epochs == 0:
            self._save(self.epoch + 1, 0, wait=done)
        self.epoch += 1
        self.step_in_epoch, self.phase = 0, EPOCH_ENDED
        if done:
            self.state = "done"

    def _share_buffers(self) -> None:
        """Give all workers the same state where gradients do not reach: of floats the mean, of counts the largest.

        Each worker's running means saw its own samples only. In float64 the mean of equal float32 values is that value, so
        buffers that are constants stay as they are.
        """
        buffers = self.adapter.buffers()
        for op, floats in (("mean", True), ("max", False)):
            chosen = {name: array for name, array in buffers.items() if (array.dtype.kind == "f") == floats}
            if chosen:
                self.comm.allreduce(chosen, op=op, codec="fp32", out=chosen)
        self.adapter.set_buffers(buffers)

    # ---- checkpoints and snapshots ----

    @property
    def _prefix(self) -> str:
        return f"{self.config.run}/checkpoints"

    def _save(self, epoch: int, step_in_epoch: int, *, wait: bool) -> None:
        """Write a checkpoint; with `wait`, no worker goes on before it is there."""
        if self.objects is None:
            return
        began = time.perf_counter()
        parts = self._save_feedback()
        if self.comm.rank == 0:
            self._write(epoch, step_in_epoch, parts)
        if wait:
            self.comm.barrier()
        self._saved_step = self.step
        self._save_s = time.perf_counter() - began

    def save_alone(self) -> None:
        """Write a checkpoint without the others, who are gone or cannot be reached. Of what they held nothing is in it."""
        if self.objects is None or not self.has_state or self._saved_step == self.step:
            return
        over = self.step_in_epoch == self.iterator.steps_in(self.epoch)
        if not over:  # the end of an epoch takes all workers: the checkpoint before it will do
            self._write(self.epoch, self.step_in_epoch, [], alone=self.config.worker_id)

    def _write(self, epoch: int, step_in_epoch: int, parts: list[bytes], *, alone: str = "") -> None:
        assert self.objects is not None
        tensors, rest = self.adapter.state()
        state = self._state(epoch, step_in_epoch, rest)
        state["feedback"] = self._feedback_plan() if parts else None
        checkpoint.save(
            self.objects, self._prefix, self.step, tensors, state, parts, self.config.checkpoints_kept, self.confirm, alone
        )

    def _state(self, epoch: int, step_in_epoch: int, framework: dict[str, Any]) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "step": self.step,
            "phase": EPOCH_ENDED if self.step and not step_in_epoch else self.phase,
            "metrics": self.metrics,
            "seed": self.config.seed,
            "global_batch_size": self.config.global_batch_size,
            "batch_schedule": self.config.batch_schedule,
            "lr_rule": self.config.lr_rule,
            "batch": self.batch.state(),
            "history": self.history,
            "samples": self.iterator.length,
            "recent": list(self.recent),
            "framework": framework,
        }

    def _snapshot_key(self, generation: int) -> str:
        return f"{self.config.run}/snapshots/{generation:09d}"

    def give_snapshot(self, generation: int) -> None:
        """As the donor: write the state for those who join in `generation`."""
        if self.objects is None:
            raise CheckpointError("a donor needs an object store")
        tensors, rest = self.adapter.state()
        checkpoint.put(self.objects, self._snapshot_key(generation), tensors, self._state(self.epoch, self.step_in_epoch, rest))

    def take_snapshot(self, generation: int) -> None:
        """Take over the donor's state. CheckpointError when it is not whole or does not fit."""
        assert self.objects is not None
        self._load(*checkpoint.load(self.objects, self._snapshot_key(generation)))
        self._feedback = None if self._feedback is None else defaultdict(ErrorFeedback)

    def drop_snapshot(self, generation: int) -> None:
        """Everyone has it."""
        assert self.objects is not None
        checkpoint.delete(self.objects, self._snapshot_key(generation))

    def _feedback_plan(self) -> dict[str, Any]:
        """Error feedback of one plan is of no use to another: it belongs to a worker and to what it aggregates."""
        return {"workers": self.comm.world_size, "codec": self.config.codec, "bucket_mb": self.config.bucket_mb}

    def _save_feedback(self) -> list[bytes]:
        """Every worker writes its own; returns the SHA-256 by rank, when all are written."""
        if self._feedback is None or self.objects is None or self.comm.world_size == 1:
            return []
        tensors = {
            f"{bucket}.{name}": array
            for bucket, feedback in self._feedback.items()
            for name, array in feedback.state_dict().items()
        }
        digest = checkpoint.save_feedback(self.objects, self._prefix, self.step, self.comm.rank, tensors)
        return [row.tobytes() for row in self.comm.allgather(np.frombuffer(digest, np.uint8))]

    def _restore_feedback(self, step: int) -> None:
        assert self.objects is not None
        assert self._feedback is not None
        states: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, array in (checkpoint.load_feedback(self.objects, self._prefix, step, self.comm.rank) or {}).items():
            bucket, _, name = key.partition(".")
            states[bucket][name] = array
        for bucket, state in states.items():
            self._feedback[bucket].load_state_dict(state)

    def _load_newest(self) -> None:
        """Take over the newest checkpoint, if one was written."""
        assert self.objects is not None
        found = checkpoint.load_latest(self.objects, self._prefix)
        if found is None:
            return  # stopped before the first checkpoint
        tensors, state = found
        for name, value in (
            ("seed", self.config.seed),
            ("global_batch_size", self.config.global_batch_size),
            ("batch_schedule", self.config.batch_schedule),
            ("lr_rule", self.config.lr_rule),
            ("samples", self.iterator.length),
        ):
            found_value = state.get(name, BEFORE_SCHEDULES.get(name))
            if found_value != value:
                raise CheckpointError(f"the checkpoint was made with {name} {found_value}, this run has {value}")
        self._load(tensors, state)
        self._saved_step = self.step
        if self._feedback is not None and state.get("feedback") == self._feedback_plan():
            self._restore_feedback(self.step)

    def _load(self, tensors: Any, state: dict[str, Any]) -> None:
        try:
            self.adapter.load_state(tensors, state["framework"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint does not fit the model: {error}") from error
        self.step, self.phase = int(state["step"]), int(state.get("phase", COMMITTED))
        self.epoch, self.step_in_epoch, self.metrics = int(state["epoch"]), int(state["step_in_epoch"]), state["metrics"]
        self.batch.load_state(state.get("batch"))
        self.history = [(int(epoch), float(value)) for epoch, value in state.get("history", [])]
        self.recent.clear()
        self.recent.extend(state.get("recent", []))
        self._under_way, self.has_state = None, True
