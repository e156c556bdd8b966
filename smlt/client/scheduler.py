"""The Task Scheduler: starts the workers of a run, watches them, writes down what they report, ends what must end."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from smlt.client.artifacts import ArtifactManager
from smlt.client.executors import Executor, Worker
from smlt.client.executors.local import LocalExecutor, threads_per_worker
from smlt.client.resources import REPORTS_PER_READ, ResourceManager
from smlt.client.runs import Run
from smlt.errors import CheckpointError, ConfigError, SmltError, TaskError, WorkerLostError
from smlt.store.embedded import EmbeddedStore
from smlt.store.object import open_object_store
from smlt.store.parameter import ParameterStore, ServerInfo
from smlt.worker import checkpoint
from smlt.worker.buckets import BUCKET_MB, BUCKET_MB_MAX
from smlt.worker.checkpoint import load_latest
from smlt.worker.config import WorkerConfig
from smlt.worker.manifest import read_manifest

#: A worker that was told to end gets this long before it is killed.
GRACE_S = 10.0
#: After a Ctrl-C the workers finish their step and write a checkpoint; then they are killed.
STOP_GRACE_S = 30.0


class Progress(Protocol):
    """Who watches a run. Everything here is told from one thread."""

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        """The workers are being started."""

    def step(self, row: dict[str, Any]) -> None:
        """A global step is complete: the row of metrics.jsonl."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is complete: its metrics."""

    def warning(self, text: str) -> None:
        """Something a user should know while the run goes on."""

    def stopping(self) -> None:
        """Ctrl-C was seen: the workers finish their step."""

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """The run has ended."""


class Unwatched:
    """A run that nobody watches any more."""

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        """See Progress."""

    def step(self, row: dict[str, Any]) -> None:
        """See Progress."""

    def epoch(self, row: dict[str, Any]) -> None:
        """See Progress."""

    def warning(self, text: str) -> None:
        """See Progress."""

    def stopping(self) -> None:
        """See Progress."""

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """See Progress."""


@dataclass(frozen=True)
class RunRequest:
    """What `smlt train` was asked for. See its --help."""

    script: str
    workers: int = 1
    epochs: int = 10
    global_batch_size: int = 64
    seed: int = 0
    codec: str = "fp16"
    error_feedback: bool | None = None  # None: with int8
    bucket_mb: float = BUCKET_MB
    target_accuracy: float | None = None
    memory_mb: int | None = None
    timeout_s: float = 300.0
    object_store: str | None = None
    data: str | None = None


class TaskScheduler:
    """Runs one job. `run()` returns the final status; it raises what the failed worker raised, once."""

    def __init__(
        self,
        run: Run,
        request: RunRequest,
        progress: Progress,
        *,
        store_url: str | None = None,
        executor: Executor | None = None,
        resume: bool = False,
    ) -> None:
        self.folder, self.request, self.progress = run, request, progress
        self.store_url, self.resume = store_url, resume
        self.executor: Executor = executor if executor is not None else LocalExecutor()
        self.object_store_url = request.object_store or str(run.runs_dir)
        self.workers: list[Worker] = []
        self._steps: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)  # by step, then rank: until all have reported
        self._last_step_time = 0.0
        self._done_step = 0
        self._epoch_rows: dict[int, dict[str, Any]] = {}  # by step: until all have reported that step
        self._end: dict[int, str] = {}  # by rank: the state it ended in
        self._metrics: dict[str, float] = {}
        self._epoch = 0
        self._file: TextIO | None = None
        self._warned = False  # of a loss that is not finite

    def run(self) -> dict[str, Any]:
        """Upload, start, watch, end. On Ctrl-C the workers stop together and leave a checkpoint; a second one kills them.

        Whatever happens, no worker is left running and no key of the job in the store.
        """
        self.folder.write_status(state="running", pid=os.getpid(), started=time.time(), error=None)
        state, error_text = "failed", None
        try:
            with ExitStack() as stack:
                state = self._run(stack)
        except (KeyboardInterrupt, BrokenPipeError):  # a pipe: nobody reads the progress any more
            state = "stopped"
            raise
        except SmltError as error:
            error_text = f"{type(error).__name__}: {error}"
            raise
        except BaseException as error:
            error_text = f"{type(error).__name__}: {error}"
            raise
        finally:
            status = {
                "state": state,
                "ended": time.time(),
                "step": self._done_step,
                "epoch": self._epoch,
                "metrics": self._metrics,
                "error": error_text,
                "checkpoint_step": self._checkpoint_step(),
            }
            self.folder.write_status(**status)
            with suppress(BrokenPipeError):
                self.progress.ended(self.folder, self.folder.status)
        return self.folder.status

    # ---- the parts of a run ----

    def _run(self, stack: ExitStack) -> str:
        request = self.request
        objects = open_object_store(self.object_store_url)
        artifacts = ArtifactManager(objects, self.folder.name)
        script = Path(request.script).name
        if self.resume:
            complete = self._prepare_resume(script)
            self.folder.write_config(asdict(request))
            if complete:
                return "done"
        else:
            script = artifacts.upload_code(Path(request.script))
            self.folder.write_status(code_sha256=artifacts.code_sha256)  # a resumed run takes no other code
            if request.data is not None:
                artifacts.upload_data(Path(request.data), leave_out=(self.folder.runs_dir, Path(objects.url)))
        url = self.store_url
        if url is None:
            url = stack.enter_context(EmbeddedStore(log_path=self.folder.log_path("store"))).url
        # A name of its own for every start: keys of a former start of this run are other keys.
        job = f"{self.folder.name}-{os.urandom(3).hex()}"
        parameters = ParameterStore(url, job=job)
        stack.callback(parameters.close)
        server = parameters.check()
        self._file = stack.enter_context((self.folder.path / "metrics.jsonl").open("a", buffering=1))
        self.progress.started(self.folder, self.folder.config, server)
        stack.callback(self._clean, parameters)
        resources = ResourceManager(parameters, request.workers, request.memory_mb)
        for rank in range(request.workers):
            config = WorkerConfig(
                run=self.folder.name,
                job=job,
                rank=rank,
                world_size=request.workers,
                object_store_url=self.object_store_url,
                script=script,
                epochs=request.epochs,
                global_batch_size=request.global_batch_size,
                seed=request.seed,
                codec=request.codec,
                error_feedback=request.codec == "int8" if request.error_feedback is None else request.error_feedback,
                bucket_mb=request.bucket_mb,
                store_url=url,
                has_data=request.data is not None,
                target_accuracy=request.target_accuracy,
                resume=self.resume,
                timeout_s=request.timeout_s,
                code_sha256=self.folder.status.get("code_sha256"),
                threads=threads_per_worker(request.workers),
            )
            self.workers.append(self.executor.start(config, self.folder.log_path(f"worker-{rank}")))
        try:
            self._watch(parameters, resources, deadline=None)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            if not resources.latest:  # nothing is trained yet
                raise
            if isinstance(error, BrokenPipeError):
                self.progress = Unwatched()
            self.progress.stopping()
            parameters.request_stop()
            self._watch(parameters, resources, deadline=time.monotonic() + STOP_GRACE_S)
            if "done" not in self._end.values():
                raise
        return "done"

    def _checkpoint_step(self) -> int | None:
        """Of which step the newest checkpoint is; None when there is none."""
        try:
            return checkpoint.latest_step(open_object_store(self.object_store_url), f"{self.folder.name}/checkpoints")
        except SmltError:
            return None

    def _prepare_resume(self, script: str) -> bool:
        """See that all is there, and go back to the last checkpoint; returns whether training was complete there.

        CheckpointError names what is missing.
        """
        objects = open_object_store(self.object_store_url)
        for kind in ("code", "data") if self.request.data is not None else ("code",):
            prefix = f"{self.folder.name}/{kind}"
            names = {*read_manifest(objects, prefix), *([script] if kind == "code" else [])}
            for name in sorted(names):
                if not objects.exists(f"{prefix}/{name}"):
                    raise CheckpointError(f"run {self.folder.name} is incomplete: {kind}/{name} is missing")
        found = load_latest(objects, f"{self.folder.name}/checkpoints")
        self._done_step = int(found[1]["step"]) if found is not None else 0
        self._epoch = int(found[1]["epoch"]) if found is not None else 0
        self._metrics = found[1]["metrics"] if found is not None else {}
        self.folder.truncate_metrics(self._done_step)
        target = self.request.target_accuracy
        return self._epoch >= self.request.epochs or (target is not None and self._metrics.get("accuracy", 0.0) >= target)

    def _watch(self, parameters: ParameterStore, resources: ResourceManager, deadline: float | None) -> None:
        """Take reports until every worker has ended; raise when one failed."""
        while True:
            for row in resources.poll(block_ms=100):
                self._take(row)
            codes = [worker.poll() for worker in self.workers]
            if any(code is not None for code in codes):
                self._take_rest(resources)
            failed = [worker for worker, code in zip(self.workers, codes, strict=True) if code not in (None, 0)]
            # Its last report comes before its end: who has ended without one was ended by the script (sys.exit(0)).
            failed += [w for w, code in zip(self.workers, codes, strict=True) if code == 0 and w.rank not in self._end]
            if failed:
                self._end_after_failure(parameters, failed[0])
            if all(code == 0 for code in codes):
                return
            over = resources.over_memory()
            if over is not None:
                text = f"rank {over[0]} holds {over[1]:.0f} MB, over its limit of {resources.memory_mb:.0f} MB (--memory)"
                parameters.abort(text)
                raise WorkerLostError(text, [over[0]], self._done_step)
            lost = resources.lost()
            if lost and not all(rank in self._end for rank in lost):
                text = f"rank {lost[0]} has stopped reporting: its metadata key has expired"
                parameters.abort(text)
                raise WorkerLostError(text, lost, self._done_step)
            if deadline is not None and time.monotonic() > deadline:
                raise KeyboardInterrupt

    def _take_rest(self, resources: ResourceManager) -> None:
        """Take what a worker reported before it ended: all of it, a poll may give a part."""
        while True:
            rows = resources.poll(block_ms=1)
            for row in rows:
                self._take(row)
            if len(rows) < REPORTS_PER_READ:
                return

    def _end_after_failure(self, parameters: ParameterStore, worker: Worker) -> None:
        """Let the others end and raise the first failure with its traceback."""
        failure = parameters.failure()
        if failure is None:
            time.sleep(0.2)  # it may be on its way: the process that failed first need not be the one seen first
            failure = parameters.failure()
        rank = worker.rank if failure is None else int(failure["rank"])
        parameters.abort(f"rank {rank} failed" if failure else f"rank {rank} ended with exit code {worker.poll()}")
        self._wait_for_all(GRACE_S)
        log = self.folder.log_path(f"worker-{rank}")
        if failure is None:
            code = worker.poll()
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            raise WorkerLostError(f"worker {rank} {how}; its log: {log}\n{tail(log)}".rstrip(), [rank], self._done_step)
        kind = failure["error"].partition(":")[0]
        trace = failure["traceback"].rstrip()
        if trace:
            raise TaskError(f"worker {rank} failed at step {failure['step']}: {failure['error']}\n\n{trace}")
        import smlt.errors

        known = getattr(smlt.errors, kind, TaskError)
        error = known if isinstance(known, type) and issubclass(known, SmltError) else TaskError
        raise error(f"worker {rank} at step {failure['step']}: {failure['error'].partition(': ')[2]}")

    def _wait_for_all(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and any(worker.poll() is None for worker in self.workers):
            time.sleep(0.02)

    def _clean(self, parameters: ParameterStore) -> None:
        """No worker and no key is left, however the run ended."""
        with _undisturbed():
            for worker in self.workers:
                worker.kill()
            # When the store cannot be reached its keys are gone with it, or go with their TTL.
            with suppress(SmltError):
                parameters.sweep()

    # ---- reports ----

    def _take(self, row: dict[str, Any]) -> None:
        rank, kind = int(row["rank"]), row.get("kind")
        if kind == "end":
            self._end[rank] = str(row["state"])
        elif kind == "epoch" and rank == 0:
            # Rank 0 may be ahead of the others' reports: an epoch comes behind its last step.
            if int(row["step"]) in self._steps:
                self._epoch_rows[int(row["step"])] = row
            else:
                self._complete_epoch(row)
        elif "loss" in row:
            self._steps[int(row["step"])][rank] = row
            if len(self._steps[int(row["step"])]) == self.request.workers:
                self._complete_step(int(row["step"]))

    def _complete_step(self, step: int) -> None:
        rows = [row for _, row in sorted(self._steps.pop(step).items())]
        now = max(row["time"] for row in rows)
        seconds = now - self._last_step_time if self._last_step_time else rows[0]["compute_s"] + rows[0]["communication_s"]
        self._last_step_time, self._done_step = now, step
        record = {
            "kind": "step",
            "step": step,
            "epoch": rows[0]["epoch"],
            "loss": rows[0]["loss"],
            "samples": rows[0]["samples"],
            "samples_per_s": rows[0]["samples"] / seconds if seconds > 0 else 0.0,
            "compute_s": [row["compute_s"] for row in rows],
            "communication_s": [row["communication_s"] for row in rows],
            "communication_total_s": [row["communication_total_s"] for row in rows],
            "data_s": [row["data_s"] for row in rows],
            "rss_mb": [row["rss_mb"] for row in rows],
            "time": now,
        }
        self._record(record)
        self.progress.step(record)
        if not math.isfinite(record["loss"]) and not self._warned:
            self._warned = True
            self.progress.warning(f"the loss is {record['loss']} since step {step}: a smaller learning rate may help")
        if step in self._epoch_rows:
            self._complete_epoch(self._epoch_rows.pop(step))

    def _complete_epoch(self, row: dict[str, Any]) -> None:
        self._epoch, self._metrics = int(row["epoch"]) + 1, row["metrics"]
        record = {"kind": "epoch", "epoch": row["epoch"], "step": row["step"], "metrics": row["metrics"]}
        self._record(record)
        self.folder.write_status(epoch=self._epoch, step=row["step"], metrics=self._metrics)
        self.progress.epoch(record)

    def _record(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json_line(row) + "\n")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: what is done here leaves nothing behind, and is short."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def json_line(value: Any) -> str:
    """JSON on one line. NaN and Inf, which JSON does not know, are null."""

    def known(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: known(part) for name, part in item.items()}
        if isinstance(item, (list, tuple)):
            return [known(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(known(value))


def tail(path: Path, lines: int = 10) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def check_request(request: RunRequest) -> None:
    """ConfigError for numbers that cannot work, before anything is made."""
    for name, value in (
        ("--workers", request.workers),
        ("--epochs", request.epochs),
        ("--global-batch-size", request.global_batch_size),
    ):
        if value < 1:
            raise ConfigError(f"{name} {value} is not positive")
    if request.memory_mb is not None and request.memory_mb < 1:
        raise ConfigError(f"--memory {request.memory_mb} is not positive")
    if not request.timeout_s > 0:
        raise ConfigError(f"--timeout {request.timeout_s} is not positive")
    if not 0 <= request.bucket_mb < BUCKET_MB_MAX:
        raise ConfigError(f"--bucket-mb {request.bucket_mb} is not between 0 and {BUCKET_MB_MAX}")
    if not 0 <= request.seed < 2**63:
        raise ConfigError(f"--seed {request.seed} is not between 0 and 2**63 - 1")
    if request.target_accuracy is not None and not 0 < request.target_accuracy <= 1:
        raise ConfigError(f"--target-accuracy {request.target_accuracy} is not between 0 and 1")
    if request.workers > request.global_batch_size:
        raise ConfigError(
            f"{request.workers} workers cannot share a global batch of {request.global_batch_size}: "
            "give a larger --global-batch-size or fewer --workers"
        )
    from smlt.collective.codecs import check_codec

    check_codec(request.codec)
