"""The process that is profiled: `python -m smlt.client.profiled`, started by `smlt.client.profiling`.

One JSON object a line on stdin says what to measure, one a line on stdout is the answer. What the task prints goes to stderr.
It computes with the worker's own parts: its adapter, its data iterator, its checkpoints.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smlt.errors import SmltError
from smlt.store.object import open_object_store
from smlt.worker import checkpoint
from smlt.worker.config import WorkerConfig
from smlt.worker.data import DataIterator, Indices, dataset_length, take
from smlt.worker.evaluation import BATCH as EVALUATION_BATCH
from smlt.worker.files import LocalFiles
from smlt.worker.frameworks import seed_generators
from smlt.worker.step import resident_mb, step_seed
from smlt.worker.task import load_task
from smlt.worker.trainer import Trainer

#: Steps before any is counted: allocators and kernels find their form.
WARM_UP = 2
STEPS_MIN, STEPS_MAX = 3, 400


class Profiled:
    """A task in this process, and what its parts take."""

    def __init__(
        self,
        script: str,
        data: str | None,
        global_batch_size: int,
        threads: int,
        bucket_mb: float,
        hyperparameters: dict[str, Any] | None = None,
    ) -> None:
        cpu = time.process_time()
        task = load_task(Path(script), hyperparameters)
        if data is not None:
            task.data_files = LocalFiles(Path(data))
        imported = time.process_time()
        config = WorkerConfig(
            run="profile",
            job="profile",
            rank=0,
            world_size=1,
            object_store_url="",
            script=script,
            epochs=1,
            global_batch_size=global_batch_size,
            bucket_mb=bucket_mb,
            threads=threads,
        )
        self.trainer = Trainer(config, task, None, lambda row: "")
        self.adapter = self.trainer.adapter
        self.import_s, self.load_s = imported - cpu, time.process_time() - imported
        self.length = dataset_length(self.trainer.train)
        self.step = 0
        self.clock = Clock()

    def about(self) -> dict[str, Any]:
        """Sizes: of the data, the gradients, a checkpoint."""
        trainer, adapter = self.trainer, self.adapter
        return {
            "samples": self.length,
            "test_samples": dataset_length(trainer.test) if trainer.test is not None else 0,
            "gradients": self._gradients(),
            "buckets": self._buckets(),
            "model_bytes": sum(_bytes(value) for value in adapter.parameters().values()),
            "import_s": self.import_s,
            "load_s": self.load_s,
        }

    def _gradients(self) -> list[tuple[str, int]]:
        whole = getattr(self.adapter, "_flat", None) or self.adapter.gradient
        sizes: dict[str, int] = {}
        for value in whole.values():
            name = _dtype(value)
            sizes[name] = sizes.get(name, 0) + int(np.prod(value.shape))
        return list(sizes.items())

    def _buckets(self) -> list[tuple[str, int]]:
        early, last = getattr(self.adapter, "_early", ()), list(self.adapter.gradient.values())
        sizes = [(_dtype(value), int(np.prod(value.shape))) for value in early]
        return [*sizes, (_dtype(last[0]), sum(int(np.prod(value.shape)) for value in last))]

    # ---- steps ----

    def steps(self, batch: int, budget_s: float) -> dict[str, Any]:
        """Steps of `batch` samples for about so many seconds; medians in seconds, and the peak of memory in MB."""
        batches = self._batches(batch)
        rows: list[tuple[float, float, float, float]] = []
        _forget_peak()
        began, queued = time.perf_counter(), self.clock.queued_s()
        until = began + budget_s
        for number in range(WARM_UP + STEPS_MAX):
            row = self._step(next(batches))
            if number < WARM_UP and time.perf_counter() < until:
                continue
            rows.append(row)
            if time.perf_counter() > until and len(rows) >= (STEPS_MIN if row[1] < budget_s / 2 else 1):
                break
        load, compute, tail, apply = (statistics.median(column) for column in zip(*rows, strict=True))
        quartiles = statistics.quantiles([row[1] for row in rows], n=4) if len(rows) > 2 else [compute] * 3
        return {
            "batch": batch,
            "load_s": load,
            "compute_s": compute,
            "tail": tail / compute if compute else 0.0,
            "apply_s": apply,
            "noise": (quartiles[2] - quartiles[0]) / 2 / compute if compute else 0.0,
            "peak_mb": _peak_mb(),
            "steps": len(rows),
            "least_s": sorted(row[1] for row in rows)[len(rows) // 10],
            "queued": (self.clock.queued_s() - queued) / (time.perf_counter() - began),
        }

    def _batches(self, batch: int) -> Iterator[Indices]:
        epoch = 0
        iterator = DataIterator(self.length, lambda epoch: min(batch, self.length), 0, 0, 1)
        while True:
            for step in range(max(1, self.length // min(batch, self.length))):
                yield iterator.indices(epoch, step)[0]
            epoch += 1

    def _step(self, indices: Indices) -> tuple[float, float, float, float]:
        """(load, forward and backward, what of it was left when the first bucket was ready, optimizer), in seconds."""
        adapter, sent = self.adapter, list[float]()
        began = self.clock()
        batch = adapter.prepare(take(self.trainer.train, indices))
        loaded = self.clock()
        adapter.keep_buffers()
        seed_generators(step_seed(0, self.step, 0))
        adapter.compute(batch, 1.0, lambda bucket: sent.append(self.clock()))
        computed = self.clock()
        adapter.apply()
        self.step += 1
        return loaded - began, computed - loaded, computed - sent[0] if sent else 0.0, self.clock() - computed

    # ---- around them ----

    def used(self) -> dict[str, Any]:
        """A core's time that this process has used, in seconds."""
        return {"cpu_s": time.process_time()}

    def evaluate(self, batch: int, budget_s: float) -> dict[str, Any]:
        """evaluate() of a batch of the test set, in seconds."""
        test = self.trainer.test
        batch = min(batch, dataset_length(test), EVALUATION_BATCH)
        indices = np.arange(batch)

        def once() -> None:
            self.adapter.evaluate(self.adapter.prepare(take(test, indices)))

        return {"batch": batch, "seconds": _median_s(once, budget_s, self.clock)}

    def checkpoint(self, budget_s: float) -> dict[str, Any]:
        """A checkpoint in a directory, in seconds."""
        with tempfile.TemporaryDirectory(prefix="smlt-profile-") as folder:
            objects = open_object_store(folder)
            numbers = iter(range(1, 1_000_000))

            def once() -> None:
                tensors, rest = self.adapter.state()
                checkpoint.save(objects, "checkpoints", next(numbers), tensors, {"framework": rest}, [], 3)

            tensors, _ = self.adapter.state()
            size = sum(int(array.nbytes) for array in tensors.values())
            return {"seconds": _median_s(once, budget_s, self.clock), "bytes": size}


class Clock:
    """Seconds in which this thread ran, or waited for something else than a core that others have.

    On a busy machine a step takes longer than it does: what the thread spent in the scheduler's queue is left out, where Linux
    tells it (schedstat: time on a core, time in the queue, in ns).
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        try:
            self._file = open("/proc/thread-self/schedstat", "rb", buffering=0)  # noqa: SIM115
        except OSError:
            return

    def __call__(self) -> float:
        return time.perf_counter() - self.queued_s()

    def queued_s(self) -> float:
        """In the queue so far; 0 where it is not told."""
        if self._file is None:
            return 0.0
        self._file.seek(0)
        return int(self._file.read(100).split()[1]) * 1e-9


def _median_s(action: Callable[[], None], budget_s: float, clock: Clock) -> float:
    until, times = time.perf_counter() + budget_s, list[float]()
    while len(times) < 50 and (len(times) < 2 or time.perf_counter() < until):
        began = clock()
        action()
        times.append(clock() - began)
    return statistics.median(times[1:])


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _bytes(value: Any) -> int:
    return int(value.nbytes)


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return


def _peak_mb() -> float:
    """The most this process has held since `_forget_peak`, in MB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return resident_mb()


def _where(error: BaseException, script: str) -> str:
    """The line of the user's script at which it happened."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == script]
    return f", line {lines[-1]}" if lines else ""


def main() -> int:
    """Answer commands until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the task prints is no answer
    script, profiled = "", None
    for line in sys.stdin:
        command = json.loads(line)
        what = command.pop("do")
        try:
            if profiled is None:
                script = str(command["script"])
                profiled = Profiled(**command)
                answer = profiled.about()
            else:
                answer = getattr(profiled, what)(**command)
        except SmltError as error:
            cause = error.__cause__
            answer = {"error": f"{error}{_where(cause, script) if cause is not None else ''}", "kind": type(error).__name__}
        except Exception as error:  # the user's code; its traceback is on stderr
            traceback.print_exc()
            name = Path(script).name
            answer = {"error": f"{name}{_where(error, script)}: {type(error).__name__}: {error}", "kind": "TaskError"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
