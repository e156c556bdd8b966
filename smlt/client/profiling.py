"""Profile a task: a few real steps of it in processes of this machine, from which a `Workload` is made."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from smlt.client.artifacts import local_modules
from smlt.client.executors.local import threads_per_worker
from smlt.client.workload import Workload
from smlt.errors import ConfigError, SmltError, TaskError
from smlt.store.secrets import without_store_secrets
from smlt.worker.buckets import BUCKET_MB
from smlt.worker.process import this_package
from smlt.worker.processors import VARIABLES

#: What measuring takes, beside importing and loading: each local batch gets its part of it.
BUDGET_S = 3.0
#: Local batches: the global batch and halves of it, so many of them, and a single sample.
SIZES = 6
#: A machine on which a process waits so much of its time for a core tells nothing of threads: then this is assumed of steps
#: that are not small.
BUSY, PARALLEL_FRACTION, SMALL_STEP_S = 0.1, 0.9, 5e-3
#: Processes that compute at once to see what a crowded machine does to a step.
CROWD_MAX = 4

#: Told what is being measured, for a progress line.
Say = Callable[[str], None]


def profile(
    script: Path,
    data: Path | None = None,
    *,
    global_batch_size: int = 64,
    epochs: int = 10,
    codec: str = "fp16",
    bucket_mb: float = BUCKET_MB,
    checkpoint_every_epochs: int = 1,
    crowd: bool = True,
    hyperparameters: Mapping[str, Any] | None = None,
    budget_s: float = BUDGET_S,
    say: Say = lambda text: None,
) -> Workload:
    """Measure the task in `script` (its files in the folder `data`) and return its workload.

    One process with one thread does real steps with several local batches, one with a thread for each core does some, too.
    `crowd`: also as many as there are cores at once, which a local run needs to be predicted. About `budget_s` seconds, and
    what importing and loading take. The model that is trained meanwhile is thrown away.

    Raises TaskError when the script cannot be imported or fails in a step; it names the line.
    """
    script = Path(script)
    modules = local_modules(script)
    if data is not None and not Path(data).is_dir():
        raise TaskError(f"--data {data}: no such folder")
    if global_batch_size < 1:
        raise ConfigError(f"global batch size {global_batch_size} is not positive")
    cores = threads_per_worker(1)
    size, files = _folder(data)
    start = {
        "script": str(script.resolve()),
        "data": str(Path(data).resolve()) if data is not None else None,
        "global_batch_size": global_batch_size,
        "bucket_mb": bucket_mb,
        "hyperparameters": dict(hyperparameters or {}),
    }
    with ExitStack() as stack:
        say("importing the script, loading the data")
        alone, *others = [
            stack.enter_context(_child(script, threads)) for threads in _threads(cores, crowd, _room_for_copies(size, cores))
        ]
        for child in (alone, *others):
            child.ask("load", **start, threads=child.threads)
        about = alone.answer()
        found = _measure(alone, others, about, min(global_batch_size, about["samples"]), cores, budget_s, say)
        found["exit_s"] = alone.end()
    return Workload(
        script=script.name,
        samples=about["samples"],
        epochs=epochs,
        global_batch_size=global_batch_size,
        gradients=tuple((str(dtype), int(count)) for dtype, count in about["gradients"]),
        buckets=tuple((str(dtype), int(count)) for dtype, count in about["buckets"]),
        codec=codec,
        bucket_mb=bucket_mb,
        test_samples=about["test_samples"],
        model_bytes=about["model_bytes"],
        checkpoint_every_epochs=checkpoint_every_epochs,
        code_bytes=sum(path.stat().st_size for path in modules),
        data_bytes=size,
        data_files=files,
        import_s=about["import_s"],
        load_s=about["load_s"],
        cores=cores,
        processor=_processor(),
        **found,
    )


def _threads(cores: int, crowd: bool, room: bool) -> list[int]:
    """Of the processes: one thread; all cores; the others of the crowd."""
    if cores == 1 or not room:
        return [1]
    return [1, cores, *([1] * (min(cores, CROWD_MAX) - 1) if crowd else [])]


def _measure(
    alone: _Child, others: Sequence[_Child], about: dict[str, Any], batch: int, cores: int, budget_s: float, say: Say
) -> dict[str, Any]:
    """The workload's measured fields."""
    for child in others:
        child.answer()  # all have loaded: nobody disturbs what is measured now
    rows: list[dict[str, Any]] = []
    for size in _sizes(batch):
        # Twice the samples, hardly less than twice the time: what cannot be measured within the budget is extrapolated.
        if len(rows) >= 3 and rows[-1]["compute_s"] * size / rows[-1]["batch"] > budget_s:
            break
        say(f"steps with {size} of {batch} samples")
        rows.append(alone("steps", batch=size, budget_s=budget_s / 2 / SIZES))
    found = _fitted(rows)
    found["evaluate"] = ()
    if about["test_samples"]:
        say("evaluation")
        points = [alone("evaluate", batch=size, budget_s=budget_s / 20) for size in (1, 256)]
        found["evaluate"] = tuple({row["batch"]: row["seconds"] for row in points}.items())
    say("a checkpoint")
    written = alone("checkpoint", budget_s=budget_s / 20)
    found |= {"checkpoint_s": written["seconds"], "checkpoint_bytes": written["bytes"]}
    if others:
        wide, *crowd = others
        largest = rows[-1]
        say(f"{cores} threads")
        threaded = wide("steps", batch=largest["batch"], budget_s=budget_s / 6)
        # Threads wait for one another: on a busy machine only the quickest steps tell what they do. Amdahl: time with c
        # threads over time with one is 1 - p (1 - 1/c).
        which = "least_s" if found["queued"] > BUSY else "compute_s"
        factor = threaded[which] / largest[which]
        if found["queued"] > BUSY and factor > 1:  # the others' doing; small steps gain nothing from threads
            factor = 1.0 if largest["least_s"] < SMALL_STEP_S else 1 - PARALLEL_FRACTION * (1 - 1 / cores)
        found["all_cores"] = factor
        found["parallel_fraction"] = max(-0.5, min(0.999, (1 - factor) / (1 - 1 / cores)))
        if crowd:
            found["crowding"] = _crowding([alone, *crowd], rows, batch, cores, budget_s, say)
    return found


def _fitted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What follows from steps of several sizes."""
    points, highest = [], 0.0
    for row in rows:  # more samples never take less: what does was disturbed before
        highest = max(highest, row["compute_s"])
        points.append((int(row["batch"]), highest))
    first, last = rows[0], rows[-1]
    span = last["batch"] - first["batch"]
    return {
        "compute": tuple(points),
        "optimizer_s": min(row["apply_s"] for row in rows),
        "tail_fraction": last["tail"],
        "load_sample_s": min(row["load_s"] / row["batch"] for row in rows),
        "base_mb": first["peak_mb"],
        "sample_mb": max(0.0, (last["peak_mb"] - first["peak_mb"]) / span) if span else 0.0,
        "queued": statistics.median(row["queued"] for row in rows),
        "noise": sorted(row["noise"] for row in rows)[len(rows) // 2],
    }


def _crowding(
    children: Sequence[_Child], rows: Sequence[dict[str, Any]], batch: int, cores: int, budget_s: float, say: Say
) -> float:
    """How many times as long a step takes while all cores do the same."""
    wanted = max(1, batch // cores)
    row = min(rows, key=lambda row: abs(row["batch"] - wanted))
    say(f"{len(children)} processes at once")
    for child in children:
        child.ask("steps", batch=row["batch"], budget_s=budget_s / 4)
    times = [float(child.answer()["compute_s"]) for child in children]
    return max(1.0, statistics.median(times) / float(row["compute_s"]))


def _sizes(batch: int) -> list[int]:
    """1 and the global batch and halves of it, ascending."""
    sizes = {1, batch}
    for power in range(1, SIZES - 1):
        sizes.add(max(1, -(-batch // 2**power)))
    return sorted(sizes)


class _Child:
    """A process that is profiled."""

    def __init__(self, script: Path, process: subprocess.Popen[str], threads: int, said: Path) -> None:
        self.script, self.process, self.threads, self.said = script, process, threads, said

    def ask(self, what: str, **values: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **values}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says how it has ended

    def answer(self) -> dict[str, Any]:
        """TaskError when the task has failed, or its process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            why = "killed: too little memory?" if code == -9 else f"exit code {code}"
            last = self.said.read_text(errors="replace").strip().splitlines()[-1:]
            raise TaskError(f"{self.script.name}: the profiled process ended ({why}){': ' if last else ''}{''.join(last)}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise _error(found["kind"], found["error"])
        return found

    def end(self) -> float:
        """Let it end in order; returns what of a core's time that takes, in seconds."""
        assert self.process.stdin is not None
        used_s, before_s = float(self("used")["cpu_s"]), _children_s()
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return 0.0
        return max(0.0, _children_s() - before_s - used_s)

    def __call__(self, what: str, **values: Any) -> dict[str, Any]:
        self.ask(what, **values)
        return self.answer()


def _children_s() -> float:
    """A core's time that children have used which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _error(kind: str, text: str) -> SmltError:
    return ConfigError(text) if kind == "ConfigError" else TaskError(text)


@contextmanager
def _child(script: Path, threads: int) -> Iterator[_Child]:
    environment = {
        **without_store_secrets(os.environ),
        **dict.fromkeys(VARIABLES, str(threads)),
        "PYTHONUNBUFFERED": "1",
        **this_package(),
    }
    with tempfile.NamedTemporaryFile(prefix="smlt-profile-", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "smlt.client.profiled"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process, which ends that one
        )
        try:
            yield _Child(script, process, threads, Path(log.name))
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue


def _folder(data: Path | None) -> tuple[int, int]:
    """Bytes and files below a folder."""
    sizes = [path.stat().st_size for path in Path(data).rglob("*") if path.is_file()] if data is not None else []
    return sum(sizes), len(sizes)


def _room_for_copies(data_bytes: int, cores: int) -> bool:
    """Whether the data, which each process may hold, fit into the machine's memory so many times."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return True
    return data_bytes * (1 + min(cores, CROWD_MAX)) < 0.5 * available


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


class ProgressLine:
    """Says on a terminal's stderr what is measured, in one line that is wiped in the end; elsewhere nothing."""

    def __init__(self) -> None:
        self.shown, self.began = sys.stderr.isatty(), time.monotonic()

    def __call__(self, text: str) -> None:
        if self.shown:
            print(f"\r\033[Kprofiling: {text} ({time.monotonic() - self.began:.0f} s)", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wipe it."""
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
