"""The Trainer: minibatch, gradients, all-reduce, step, report; evaluation and checkpoint at the end of an epoch."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smlt.collective.communicator import Communicator
from smlt.collective.feedback import ErrorFeedback
from smlt.collective.work import Work
from smlt.errors import CheckpointError, CollectiveError, TaskError
from smlt.store.object import ObjectStore
from smlt.worker import checkpoint
from smlt.worker.config import WorkerConfig
from smlt.worker.data import DataIterator, dataset_length, part, take
from smlt.worker.frameworks import make_adapter, seed_generators
from smlt.worker.minibatch import MinibatchBuffer
from smlt.worker.task import Task

EVALUATION_BATCH = 256

#: Takes a report row; returns what the scheduler asks for: "" or "stop".
Report = Callable[[dict[str, Any]], str]


class Trainer:
    """Trains `task` as worker `comm.rank`. All workers call the same collectives in the same order, come what may.

    The mean of the workers' gradients, each weighted by its part of the global batch, is the gradient of the global
    batch's mean loss, also when the parts are uneven. A request to stop travels in that same all-reduce, so that all
    workers stop behind the same step. It is the step's last bucket: those before are all-reduced while backward computes.
    """

    def __init__(
        self, config: WorkerConfig, task: Task, comm: Communicator, objects: ObjectStore | None, report: Report
    ) -> None:
        self.config, self.task, self.comm, self.objects, self.report = config, task, comm, objects, report
        self.stop_requested = False
        self.step = 0  # global steps done
        self.epoch = 0
        self.state = "running"
        self.metrics: dict[str, float] = {}
        datasets = task.data()
        if not isinstance(datasets, dict) or "train" not in datasets:
            raise TaskError('data() returns {"train": ..., "test": ...}; "train" is missing')
        self.train, self.test = datasets["train"], datasets.get("test")
        bucket_mb = config.bucket_mb if comm.world_size > 1 else 0  # alone there is nothing to hide
        self.adapter = make_adapter(task, config.seed, config.threads, bucket_mb)
        self._begun: list[Work] = []  # this step's buckets on their way
        self._feedback: dict[str, ErrorFeedback] | None = None  # by bucket; "last"
        if config.error_feedback and comm.world_size > 1:  # alone nothing is encoded
            self._feedback = defaultdict(ErrorFeedback)
        self._first_sent = math.inf
        self.iterator = DataIterator(
            dataset_length(self.train), config.global_batch_size, config.seed, comm.rank, comm.world_size
        )
        if config.target_accuracy is not None and self.test is None:
            raise TaskError('--target-accuracy needs a "test" set in data() and "accuracy" in evaluate()')

    def run(self) -> str:
        """Train to the end; returns "done" or "stopped"."""
        first_step = self._restore() if self.config.resume else 0
        if self.config.target_accuracy is not None and "accuracy" not in self._metrics_of_one_sample():
            raise TaskError('--target-accuracy needs "accuracy" in what evaluate() returns')
        parameters = self.adapter.parameters()
        self.comm.broadcast(parameters, out=parameters)
        if self.state == "done":
            return self.state
        steps = self.iterator.steps(self.epoch, first_step, self.config.epochs)
        with MinibatchBuffer(steps, lambda indices: self.adapter.prepare(take(self.train, indices))) as batches:
            waiting = time.perf_counter()
            for minibatch in batches:
                data_s = time.perf_counter() - waiting
                self.epoch = minibatch.epoch
                stop = self._train_step(minibatch, data_s)
                epoch_over = minibatch.step + 1 == self.iterator.steps_per_epoch
                if epoch_over:
                    self._end_epoch()
                if stop or self.state == "done":
                    self.state = self.state if self.state == "done" else "stopped"
                    break
                waiting = time.perf_counter()
            else:
                self.state = "done"
        if self.state == "stopped" and not epoch_over:
            self._share_buffers()
            self._save(minibatch.epoch, minibatch.step + 1)
        self.report(self._row(kind="end", state=self.state))
        return self.state

    def _row(self, **values: Any) -> dict[str, Any]:
        return {"rank": self.comm.rank, "step": self.step, "epoch": self.epoch, "time": time.time(), **values}

    def _train_step(self, minibatch: Any, data_s: float) -> bool:
        """One step; returns whether the workers agreed to stop behind it.

        Of its report, `communication_s` is the time spent waiting for communication; `communication_total_s` begins when
        the first bucket leaves, and so also holds what backward hid.
        """
        config, adapter, n = self.config, self.adapter, self.comm.world_size
        seed_generators(step_seed(config.seed, self.step, self.comm.rank))
        self._first_sent = math.inf
        started = time.perf_counter()
        loss = 0.0
        if minibatch.local_size:
            loss = adapter.compute(minibatch.batch, n * minibatch.local_size / minibatch.global_size, self._send)
        else:
            adapter.skip(self._send)
        computed = time.perf_counter()
        stats = np.array([loss * minibatch.local_size, minibatch.local_size, float(self.stop_requested)])
        self._reduce_last({"gradient": adapter.gradient, "stats": stats})
        reduced = time.perf_counter()
        adapter.apply()
        applied = time.perf_counter()
        self.step += 1
        answer = self.report(
            self._row(
                loss=float(stats[0] / stats[1]),
                samples=minibatch.global_size,
                compute_s=computed - started + applied - reduced,
                communication_s=reduced - computed,
                communication_total_s=reduced - min(self._first_sent, computed),
                data_s=data_s,
                rss_mb=resident_mb(),
            )
        )
        self.stop_requested |= answer == "stop"
        return bool(stats[2] > 0)

    def _send(self, bucket: Any) -> None:
        """Take a bucket from backward, which goes on meanwhile."""
        self._first_sent = min(self._first_sent, time.perf_counter())
        try:
            feedback = self._feedback_of(str(len(self._begun)))
            self._begun.append(self.comm.allreduce_async(bucket, codec=self.config.codec, out=bucket, feedback=feedback))
        except CollectiveError:
            self._wait()  # if a bucket before has failed, that says more
            raise

    def _reduce_last(self, value: dict[str, Any]) -> None:
        """Reduce the last bucket with the step's numbers; returns when all buckets are back."""
        try:
            codecs = {"gradient": self.config.codec, "stats": "fp32"}
            self.comm.allreduce(value, codec=codecs, out=value, feedback=self._feedback_of("last"))
        except CollectiveError:
            self._wait()
            raise
        self._wait()

    def _feedback_of(self, bucket: str) -> ErrorFeedback | None:
        return self._feedback[bucket] if self._feedback is not None else None

    def _wait(self) -> None:
        begun, self._begun = self._begun, []
        for work in begun:
            work.wait()

    def _end_epoch(self) -> None:
        self._share_buffers()
        self.metrics = self._evaluate() if self.test is not None else {}
        self.report(self._row(kind="epoch", metrics=self.metrics))
        target = self.config.target_accuracy
        if target is not None and self.metrics["accuracy"] >= target:
            self.state = "done"
        last = self.epoch + 1 == self.config.epochs
        if last or self.state == "done" or (self.epoch + 1) % self.config.checkpoint_every_epochs == 0:
            self._save(self.epoch + 1, 0)

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

    def _metrics_of_one_sample(self) -> dict[str, float]:
        return self.adapter.evaluate(self.adapter.prepare(take(self.test, np.arange(1))))

    def _evaluate(self) -> dict[str, float]:
        """The task's metrics over the whole test set, each worker taking its part; exact sums of the parts."""
        indices = np.arange(dataset_length(self.test))
        mine = part(indices, self.comm.rank, self.comm.world_size)
        sums: dict[str, float] = {}
        # A worker with no part evaluates one sample of weight 0, to know the metrics' names.
        for low in range(0, max(len(mine), 1), EVALUATION_BATCH):
            batch = mine[low : low + EVALUATION_BATCH]
            metrics = self.adapter.evaluate(self.adapter.prepare(take(self.test, batch if len(batch) else indices[:1])))
            if not isinstance(metrics, dict):
                raise TaskError(f"evaluate() gave a {type(metrics).__name__}, not a dict of numbers by name")
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + (float(value) * len(batch) if len(batch) else 0.0)
        totals: dict[str, float] = self.comm.allreduce(sums, op="sum", codec="fp32") if sums else {}
        return {name: total / len(indices) for name, total in totals.items()}

    # ---- checkpoints ----

    @property
    def _prefix(self) -> str:
        return f"{self.config.run}/checkpoints"

    def _save(self, epoch: int, step_in_epoch: int) -> None:
        if self.objects is None:
            return
        parts = self._save_feedback()
        if self.comm.rank != 0:
            return
        tensors, rest = self.adapter.state()
        state = {
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "step": self.step,
            "state": self.state,
            "metrics": self.metrics,
            "seed": self.config.seed,
            "global_batch_size": self.config.global_batch_size,
            "samples": self.iterator.length,
            "feedback": self._feedback_plan() if parts else None,
            "framework": rest,
        }
        checkpoint.save(self.objects, self._prefix, self.step, tensors, state, parts)

    def _feedback_plan(self) -> dict[str, Any]:
        """Error feedback of one plan is of no use to another: it belongs to a worker and to what it aggregates."""
        return {"workers": self.comm.world_size, "codec": self.config.codec, "bucket_mb": self.config.bucket_mb}

    def _save_feedback(self) -> list[bytes]:
        """Every worker writes its own; returns the SHA-256 by rank, when all are written."""
        if self._feedback is None or self.objects is None:
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

    def _restore(self) -> int:
        """Take over the newest checkpoint; returns the step within the epoch to go on with."""
        assert self.objects is not None
        found = checkpoint.load_latest(self.objects, self._prefix)
        if found is None:
            return 0  # stopped before the first checkpoint
        tensors, state = found
        for name, value in (
            ("seed", self.config.seed),
            ("global_batch_size", self.config.global_batch_size),
            ("samples", self.iterator.length),
        ):
            if state[name] != value:
                raise CheckpointError(f"the checkpoint was made with {name} {state[name]}, this run has {value}")
        try:
            self.adapter.load_state(tensors, state["framework"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint does not fit the model: {error}") from error
        self.epoch, self.step, self.metrics = int(state["epoch"]), int(state["step"]), state["metrics"]
        if self._feedback is not None and state.get("feedback") == self._feedback_plan():
            self._restore_feedback(self.step)
        reached = self.config.target_accuracy is not None and state["metrics"].get("accuracy", 0) >= self.config.target_accuracy
        if self.epoch >= self.config.epochs or reached:
            self.state = "done"
        return int(state["step_in_epoch"])


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a worker's random numbers at a step: resuming there gives the same ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def resident_mb() -> float:
    """This process's resident memory in MB (on macOS its peak)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def train_alone(task: Task, epochs: int, global_batch_size: int, seed: int) -> Trainer:
    """Train in this process with one worker and no store; a line an epoch on stdout."""
    losses: list[float] = []

    def report(row: dict[str, Any]) -> str:
        if "loss" in row:
            losses.append(row["loss"])
        if row.get("kind") == "epoch":
            metrics = "".join(f", {name} {value:.4f}" for name, value in row["metrics"].items())
            print(f"epoch {row['epoch'] + 1}/{epochs}: loss {np.mean(losses):.4f}{metrics}", flush=True)
            losses.clear()
        return ""

    config = WorkerConfig(
        run="alone",
        job="alone",
        rank=0,
        world_size=1,
        object_store_url="",
        script=sys.argv[0],
        epochs=epochs,
        global_batch_size=global_batch_size,
        seed=seed,
    )
    with Communicator() as comm:
        trainer = Trainer(config, task, comm, None, report)
        trainer.run()
    return trainer
