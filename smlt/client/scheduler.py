"""The Task Scheduler: starts a run's workers, writes down what they report, mends what breaks, ends what must end."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from smlt.client.artifacts import ArtifactManager
from smlt.client.crew import Crew
from smlt.client.events import Events, Journal
from smlt.client.executors import Executor, RunContext
from smlt.client.executors.registry import find
from smlt.client.records import Records
from smlt.client.request import RunRequest, check_workers, smallest_batch
from smlt.client.resources import ResourceManager
from smlt.client.runs import Run
from smlt.client.settling import add_use, settle
from smlt.client.starts import Starts
from smlt.client.steering import Steering
from smlt.client.watching import Progress, heard_by, unwatched
from smlt.errors import CheckpointError, ConfigError, GoalMissed, SmltError, StoreError, StoreUnavailable, WorkerLostError
from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore
from smlt.store.object import ObjectStore, open_object_store
from smlt.store.parameter import ParameterStore
from smlt.worker import checkpoint
from smlt.worker.config import WorkerConfig
from smlt.worker.manifest import NAME as MANIFEST
from smlt.worker.manifest import read_manifest

#: Where this scheduler runs: its pid means something there only.
HOST = socket.gethostname()
#: A look around at least this often.
TICK_MS = 100
#: After a Ctrl-C the workers finish their step and write a checkpoint; then they are killed.
STOP_GRACE_S = 30.0
#: Workers without a scheduler get so long to stop at a checkpoint when a run is resumed.
ORPHANS_STOP_S = 20.0
#: Between two tries to reach the store: doubled each time up to the last, and drawn between half and the whole.
PAUSE_S, PAUSE_MAX_S = 0.05, 1.0
#: How often the progress of an upload that takes long is told.
UPLOAD_EVERY_S = 2.0


class TaskScheduler:
    """Runs one job. `run()` returns the final status; it raises what ended the job, once."""

    def __init__(
        self,
        run: Run,
        request: RunRequest,
        progress: Progress,
        *,
        store_url: str | None = None,
        executor: Executor | None = None,
        resume: bool = False,
        steering: Steering | None = None,
    ) -> None:
        self.folder, self.request = run, request
        self.events = Events(run)
        self.progress: Progress = heard_by(progress, Journal(self.events))
        self.store_url, self.resume, self.steering = store_url, resume, steering
        self.executor = executor
        self.scheduler_id = f"{os.getpid()}-{os.urandom(4).hex()}"
        self.object_store_url = request.object_store or str(run.runs_dir)
        self.crew: Crew | None = None
        self.records: Records | None = None
        self._store: EmbeddedStore | None = None
        self._objects: ObjectStore | None = None
        self._stop_by: float | None = None  # monotonic: Ctrl-C was seen; then the workers are killed
        self._stop_said = False  # to the workers of this generation
        self._told_of_upload = 0.0  # monotonic
        self._shown: set[int] = set()  # stragglers that the user knows of

    def run(self) -> dict[str, Any]:
        """Upload, start, watch, end. On Ctrl-C the workers stop together and leave a checkpoint; a second one kills them.

        Whatever happens, no worker is left running and no key of the job in the store.
        """
        with self.folder.hold():
            return self._run_alone()

    def _run_alone(self) -> dict[str, Any]:
        self.folder.take_scale_request()  # one that came too late for an earlier start is not for this one
        self.folder.write_status(state="running", pid=os.getpid(), host=HOST, started=time.time(), ended=None, error=None)
        self.events.write("begin", pid=os.getpid(), host=HOST, resumed=self.resume, workers=self.request.workers)
        state, error_text = "failed", None
        try:
            with ExitStack() as stack:
                state = self._run(stack)
            if state == "stopped":
                if self.steering is not None and self.steering.stopped_for:
                    raise GoalMissed(self.steering.stopped_for)
                raise KeyboardInterrupt
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
            records, crew = self.records, self.crew
            status = {
                "state": state,
                "ended": time.time(),
                "step": records.done_step if records is not None else 0,
                "epoch": records.epoch if records is not None else 0,
                "metrics": records.metrics if records is not None else {},
                "restarts": crew.restarts if crew is not None else 0,
                "error": error_text,
                "checkpoint_step": self._checkpoint_step(),
            }
            self.folder.write_status(**status)
            self.events.write("over", state=state, error=error_text)
            self._write_bill()
            with suppress(BrokenPipeError):
                self.progress.ended(self.folder, self.folder.status)
        return self.folder.status

    # ---- the parts of a run ----

    def _run(self, stack: ExitStack) -> str:
        request = self.request
        objects = self._objects = open_object_store(self.object_store_url)
        artifacts = ArtifactManager(objects, self.folder.name, self._uploading)
        script = Path(request.script).name
        records = self.records = Records(self.folder, self.progress, request.workers)
        stack.callback(records.close)
        if self.resume:
            if self._upload_was_cut_off(objects):
                self._upload_data(artifacts)
            complete = self._prepare_resume(script, records)
            self.folder.write_config(asdict(request))
            if complete:
                return "done"
        else:
            script = artifacts.upload_code(Path(request.script))
            self.folder.write_status(code_sha256=artifacts.code_sha256)  # a resumed run takes no other code
            if request.data is not None:
                self._upload_data(artifacts)
        url = self.store_url
        if url is None:
            self._store = stack.enter_context(EmbeddedStore(log_path=self.folder.log_path("store")))
            url = self._store.url
        workers_url = request.store or url  # elsewhere they reach it by another way, or look its password up themselves
        if request.store is None and request.on == "lambda" and self._store is not None:
            workers_url = self._store.tcp_url
        if self.executor is None:
            self.executor = self._open_executor(workers_url)
        stack.callback(self.executor.close)
        # A name of its own for every start: keys of a former start of this run are other keys.
        job = f"{self.folder.name}-{os.urandom(3).hex()}"
        parameters = ParameterStore(url, job=job)
        stack.callback(parameters.close)
        server = parameters.check()
        self.folder.write_status(job=job)
        self.progress.started(self.folder, self.folder.config, server)
        coordination = Coordination(parameters)
        limit_mb = None if self.executor.traits.keeps_memory else request.memory_mb
        resources = ResourceManager(coordination, limit_mb)
        starts = Starts(self.executor, self.folder, self._template(job, script, workers_url), self.events)
        crew = self.crew = Crew(request, starts, coordination, self.scheduler_id, records, resume=self.resume)
        stack.callback(self._clean, parameters, crew)
        begins_at = records.newest_step
        crew.begin()
        while True:
            try:
                return self._watch(crew, records, resources)
            except (KeyboardInterrupt, BrokenPipeError) as error:
                if self._stop_by is not None or records.newest_step <= begins_at:  # asked twice, or nothing is trained yet
                    raise
                if isinstance(error, BrokenPipeError):
                    self.progress = records.progress = unwatched(self.progress)
                self._stop_by = time.monotonic() + STOP_GRACE_S
                self.progress.stopping()

    def _open_executor(self, workers_url: str) -> Executor:
        life_line = self._store.life_line if self._store is not None else None
        context = RunContext(self.folder, self.request, workers_url, self.object_store_url, life_line)
        made = find(self.request.on).open(context)
        wanted = self.request.workers + self.request.spares
        if made.concurrency is not None and wanted > made.concurrency:
            made.close()
            raise ConfigError(f"{wanted} workers: {self.request.on} may run {made.concurrency} at once: give fewer --workers")
        return made

    def _upload_data(self, artifacts: ArtifactManager) -> None:
        folder = Path(self.request.data or "")
        artifacts.upload_data(folder, leave_out=(self.folder.runs_dir, Path(artifacts.objects.url)))

    def _upload_was_cut_off(self, objects: ObjectStore) -> bool:
        """Whether the data are not all in the object store, and are here to be sent."""
        data = self.request.data
        return data is not None and Path(data).is_dir() and not objects.exists(f"{self.folder.name}/data/{MANIFEST}")

    def _uploading(self, sent: int, total: int) -> None:
        now = time.monotonic()
        self._told_of_upload = self._told_of_upload or now
        if now - self._told_of_upload > UPLOAD_EVERY_S:
            self._told_of_upload = now
            self.progress.uploading(sent, total)

    def _template(self, job: str, script: str, url: str) -> WorkerConfig:
        request = self.request
        assert self.executor is not None
        traits = self.executor.traits
        limits_s = [limit for limit in (request.time_limit_s, traits.time_limit_s) if limit is not None]
        return WorkerConfig(
            run=self.folder.name,
            job=job,
            rank=0,
            world_size=request.workers,
            object_store_url=self.object_store_url,
            script=script,
            epochs=request.epochs,
            global_batch_size=request.global_batch_size,
            seed=request.seed,
            codec=request.codec,
            error_feedback=request.codec == "int8" if request.error_feedback is None else request.error_feedback,
            bucket_mb=request.bucket_mb,
            store_window_mb=request.store_window_mb,
            store_url=url,
            hyperparameters=dict(request.hyperparameters) or None,
            has_data=request.data is not None or request.data_run is not None,
            data_run=request.data_run,
            target_accuracy=request.target_accuracy,
            batch_schedule=request.batch_schedule,
            lr_rule=request.lr_rule,
            patience=request.patience,
            stop_metric=request.stop_metric,
            stop_mode=request.stop_mode,
            timeout_s=request.timeout_s,
            liveness_s=request.liveness_s,
            time_limit_s=min(limits_s, default=None),
            warm=request.warm and traits.is_warm,
            checkpoints_kept=request.keep_checkpoints,
            code_sha256=self.folder.status.get("code_sha256"),
            threads=request.threads or self.executor.threads(request.workers),
        )

    def _write_bill(self) -> None:
        if self.executor is None or not self.executor.traits.is_billed:
            return
        try:
            requests = Counter(self.executor.requests) + Counter(
                getattr(self._objects, "requests", {})
            )  # code and data were sent from here
            add_use(self.folder, requests, time.time() - float(self.folder.status["started"]))
            try:
                settle(self.folder, from_log=True)
            except StoreError as error:  # no right to read the log, say
                self.progress.warning(f"the bill is without what only the log tells: {error}")
                settle(self.folder, from_log=False)
        except SmltError as error:  # a price that is not there is no reason to call a run failed
            self.progress.warning(f"the run has no bill: {error}")

    def _checkpoint_step(self) -> int | None:
        """Of which step the newest checkpoint is; None when there is none."""
        try:
            return checkpoint.latest_step(open_object_store(self.object_store_url), f"{self.folder.name}/checkpoints")
        except SmltError:
            return None

    def _prepare_resume(self, script: str, records: Records) -> bool:
        """See that all is there, and go back to the last checkpoint; returns whether training was complete there.

        CheckpointError names what is missing.
        """
        objects = open_object_store(self.object_store_url)
        prefixes = [f"{self.folder.name}/code"]
        if self.request.data is not None or self.request.data_run is not None:
            prefixes.append(f"{self.request.data_run or self.folder.name}/data")
        for prefix in prefixes:
            kind = prefix.rpartition("/")[2]
            names = {*read_manifest(objects, prefix), *([script] if kind == "code" else [])}
            there = set(objects.list(f"{prefix}/"))
            for name in sorted(names):
                if f"{prefix}/{name}" not in there:
                    raise CheckpointError(f"run {self.folder.name} is incomplete: {kind}/{name} is missing")
        found = checkpoint.load_latest(objects, f"{self.folder.name}/checkpoints")
        if found is None:
            records.go_back(0, 0, {})
            return False
        state = found[1]
        records.catch_up(int(state["step"]), int(state["epoch"]), state["metrics"], state.get("recent", []))
        target = self.request.target_accuracy
        return records.epoch >= self.request.epochs or (target is not None and records.metrics.get("accuracy", 0.0) >= target)

    # ---- watching ----

    def _watch(self, crew: Crew, records: Records, resources: ResourceManager) -> str:
        """Take reports and tend the crew until the job has ended; returns how. Lives through a store that goes away."""
        pause, since = PAUSE_S, 0.0
        while True:
            if self._stop_by is not None and time.monotonic() > self._stop_by:
                raise KeyboardInterrupt
            try:
                if since:
                    self._mend_store(crew)
                if self._stop_by is not None and not self._stop_said:
                    crew.coordination.request_stop()
                    self._stop_said = True
                rows, words = resources.poll(crew.ranks_to_read(), TICK_MS)
                for row in rows:
                    records.take(row)
                generation = crew.coordinator.generation
                state = crew.tick(words)
                if state:
                    return state
                if crew.coordinator.generation != generation:
                    self._after_a_change(crew, resources)
                self._check_resources(crew, resources)
                self._take_requests(crew)
                self._steer(crew)
                pause, since = PAUSE_S, 0.0
            except StoreUnavailable as error:
                since = since or time.monotonic()
                if time.monotonic() - since > self.request.timeout_s:
                    raise StoreUnavailable(f"{error}; gave up after {self.request.timeout_s:g} s") from error
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, PAUSE_MAX_S)

    def _mend_store(self, crew: Crew) -> None:
        """The store did not answer: start the embedded one again if it has died; then see whether the job is still there."""
        if self._store is not None and not self._store.alive:
            self.progress.warning("the embedded store has died and is started again")
            self._store.restart()
        crew.look_at_once()

    def _after_a_change(self, crew: Crew, resources: ResourceManager) -> None:
        """A generation has begun: who is slow or large is seen anew, and a request to stop is made again."""
        resources.begin_anew(crew.size)
        if crew.store_was_lost:
            crew.store_was_lost = False
            resources.streams_are_new()
        self._stop_said = False

    def _check_resources(self, crew: Crew, resources: ResourceManager) -> None:
        assert self.executor is not None
        for note in self.executor.notes():
            self.progress.warning(note)
        over = resources.over_memory()
        if over is not None:
            text = f"rank {over[0]} holds {over[1]:.0f} MB, over its limit of {resources.memory_mb:.0f} MB (--memory)"
            raise WorkerLostError(text, [over[0]], crew.records.done_step)
        slow = resources.stragglers()
        for rank, times in slow.items():
            if rank not in self._shown:
                self.progress.warning(f"worker {rank} is a straggler: its steps take {times:.1f} times the others'")
            limit = self.request.replace_stragglers
            if limit is not None and times >= limit:
                crew.replace_when_ready(rank)
        self._shown = set(slow)

    def _take_requests(self, crew: Crew) -> None:
        """What `smlt scale` has asked for; it waits while the membership changes."""
        if crew.coordinator.plan is None or crew.records.ended:
            return
        wanted = self.folder.take_scale_request()
        if wanted is None:
            return
        try:
            if self.steering is not None:
                raise ConfigError("the run chooses its workers itself, toward its goal")
            check_workers(wanted, smallest_batch(self.request, self.folder.status))
            limit = self.executor.concurrency if self.executor is not None else None
            if limit is not None and wanted + self.request.spares > limit:
                who, what = ("the function", "have") if self.request.on == "lambda" else (self.request.on, "run")
                kind = "invocations" if self.request.on == "lambda" else "workers"
                raise ConfigError(f"{wanted} workers: {who} may {what} {limit} {kind} at once")
        except ConfigError as error:
            self.progress.warning(f"smlt scale: {error}")
            return
        crew.resize(wanted)
        self._go_on_with(workers=wanted)

    def _go_on_with(self, **changes: Any) -> None:
        """Resumed, the run goes on as it is now."""
        self.request = replace(self.request, **changes)
        self.folder.write_config(asdict(self.request))

    def _steer(self, crew: Crew) -> None:
        """Let the controller look whether a round is over, and write down what it has changed."""
        if self.steering is None or self._stop_by is not None:
            return
        assert self.executor is not None
        if not self.steering.tick(crew, self.executor, crew.records, self.progress):
            self._stop_by = time.monotonic() + STOP_GRACE_S
            self.progress.stopping()
        chosen = self.steering.choice
        memory_mb = chosen.memory_mb if self.request.on == "lambda" else self.request.memory_mb
        if (chosen.workers, memory_mb) != (self.request.workers, self.request.memory_mb):
            self._go_on_with(workers=chosen.workers, memory_mb=memory_mb)

    def _clean(self, parameters: ParameterStore, crew: Crew) -> None:
        """No worker, no key and no snapshot is left, however the run ended."""
        with _undisturbed():
            crew.started.kill_all()
            assert self.executor is not None
            with suppress(SmltError):
                self.executor.drain(crew.coordination.end_job)
            # When the store cannot be reached its keys are gone with it, or go with their TTL.
            with suppress(SmltError):
                parameters.sweep()
            with suppress(SmltError):
                objects = open_object_store(self.object_store_url)
                objects.delete(*objects.list(f"{self.folder.name}/snapshots/"))


def take_over(run: Run, store_url: str) -> None:
    """See the workers of a run's last start off, if its scheduler is gone and they are still there.

    They stop at a checkpoint by themselves when they notice; who has not after ORPHANS_STOP_S is fenced.
    """
    job = run.status.get("job")
    if not job:
        return
    with closing(ParameterStore(store_url, job=str(job))) as parameters:
        coordination = Coordination(parameters)
        generation = coordination.generation()
        if generation is None:
            return
        coordination.request_stop()
        deadline = time.monotonic() + ORPHANS_STOP_S
        while coordination.generation() is not None and parameters.count_keys("worker:*") and time.monotonic() < deadline:
            time.sleep(0.1)
        coordination.end_job()
        parameters.sweep()


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
