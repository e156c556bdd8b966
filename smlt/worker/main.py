"""A worker process: `python -m smlt.worker.main`, its configuration as one line of JSON on stdin.

stdin stays open as a life line: when it closes, whoever started this worker is gone; it stops with the others behind a
step, at a checkpoint, or ends after ORPHAN_GRACE_S. A worker that has paused at its time limit waits for the next line, as
a warm sandbox waits for its next invocation: model and data stay in memory. With --end-with-stdin it is not the scheduler
that is gone: the worker ends at once, and the job goes on with another. Exit codes are those of the errors in `smlt.errors`;
0 when training is done, was stopped in order, or goes on without this worker.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

from smlt.errors import FencedError, SmltError, StoreError, TaskError
from smlt.store.coordination import Coordination
from smlt.store.object import ObjectStore, open_object_store
from smlt.store.parameter import ParameterStore
from smlt.store.secrets import resolve_store_url
from smlt.worker.config import WorkerConfig
from smlt.worker.data import fetch_code
from smlt.worker.files import open_data
from smlt.worker.lifeline import end_with_parent
from smlt.worker.member import Member
from smlt.worker.process import END_WITH_STDIN
from smlt.worker.stamped import stamp_output
from smlt.worker.task import load_task
from smlt.worker.trainer import Trainer

#: A worker whose scheduler is gone gets so long for its step and a checkpoint.
ORPHAN_GRACE_S = 15.0
#: What a worker ends with when its time limit has passed in the middle of something.
TIME_LIMIT_EXIT = 124


class Sandbox:
    """What stays in a process from one invocation to the next: the trainer with its model and data.

    `ends_itself`: end the process at the time limit, as a function's runtime does where there is one.
    """

    def __init__(self, *, ends_itself: bool = True) -> None:
        self.ends_itself = ends_itself
        self.trainer: Trainer | None = None
        self.member: Member | None = None
        self.scratch: tempfile.TemporaryDirectory[str] | None = None
        self.objects: ObjectStore | None = None
        self._asked_before = Counter[str]()  # of object stores of earlier runs
        self.orphaned = False

    def invoke(self, config: WorkerConfig) -> tuple[int, str]:
        """Work as `config` says; returns the exit code and how it ended. What went wrong is told to the store and to stderr."""
        parameters: ParameterStore | None = None
        self.member = None  # that of the invocation before is not who tells what goes wrong in this one
        began = time.monotonic()
        limit = _end_at_the_limit(config) if self.ends_itself else None
        if self.trainer is not None and (self.trainer.config.run, self.trainer.config.job) != (config.run, config.job):
            self.forget()
        try:
            assert config.store_url is not None
            parameters = ParameterStore(config.store_url, job=config.job)
            self.member = member = Member(config, parameters)
            if self.orphaned:
                member.orphan()
            with member.heartbeat:  # from now on: loading may take long, and a worker may freeze in it
                trainer = self._trainer(config, member)
                trainer.deadline = began + config.time_limit_s if config.time_limit_s is not None else math.inf
                signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stop_requested", True))
                ended = member.run(trainer)
            if member.orphaned and member.last_out:
                parameters.sweep()
            return 0, ended
        except FencedError as error:  # a duplicate: the job is none of its business
            print(f"smlt worker {config.rank}: {error}", file=sys.stderr, flush=True)
            return error.exit_code, "fenced"
        except SmltError as error:
            text = f"{type(error).__name__}: {error}"
            cause = error.__cause__ if isinstance(error, TaskError) else None
            trace = "".join(traceback.format_exception(cause)) if cause is not None else ""
            print(f"{trace}smlt worker {config.rank}: {text}", file=sys.stderr, flush=True)
            self._tell(config, text, trace)
            self.forget()
            return error.exit_code, "failed"
        except Exception as error:  # the user's code, or a bug here: the traceback tells which
            text, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
            print(f"{trace}smlt worker {config.rank}: {text}", file=sys.stderr, flush=True)
            self._tell(config, text, trace)
            self.forget()
            return TaskError.exit_code, "failed"
        finally:
            if self.member is not None:
                self.member.close()
            if limit is not None:
                limit.cancel()
            if parameters is not None:
                parameters.close()

    def forget(self) -> None:
        """What another job has left, or one that has failed, is of no use for the next: model, data, and the code itself."""
        self.trainer = None
        if self.scratch is None:
            return
        folder = Path(self.scratch.name).resolve()
        sys.path[:] = [place for place in sys.path if not Path(place).is_relative_to(folder)]
        for name, module in list(sys.modules.items()):
            own = getattr(module, "__dict__", {})  # not getattr: a module such as torch.classes answers to any name
            places = [own.get("__file__"), *(own.get("__path__") or ())]  # a namespace package has no file
            if any(Path(place).is_relative_to(folder) for place in places if place):
                del sys.modules[name]
        self.scratch.cleanup()
        self.scratch = None

    def requests(self) -> dict[str, int]:
        """Requests to the object store so far, by kind; a directory counts none."""
        return dict(self._asked_before + Counter(getattr(self.objects, "requests", {})))

    def _trainer(self, config: WorkerConfig, member: Member) -> Trainer:
        """The trainer that is here already, or a new one with the task from the object store."""
        if self.trainer is not None:
            self.trainer.enlist(config, member.report, member.confirm)
            return self.trainer
        self._asked_before = Counter(self.requests())
        objects = self.objects = open_object_store(config.object_store_url)
        self.scratch = tempfile.TemporaryDirectory(prefix="smlt-worker-")
        folder = Path(self.scratch.name)
        code = fetch_code(objects, f"{config.run}/code", folder / "code", config.code_sha256)
        task = load_task(code / config.script, config.hyperparameters)
        if config.has_data:
            task.data_files = open_data(objects, f"{config.data_run or config.run}/data", folder / "data")
        self.trainer = Trainer(config, task, objects, member.report, member.confirm)
        return self.trainer

    def _tell(self, config: WorkerConfig, text: str, trace: str) -> None:
        """Record the failure if it is the job's first, and end the others' waiting."""
        if self.member is None:
            return
        step = self.trainer.step if self.trainer is not None else 0
        try:
            self.member.tell_failure(step, text, trace)
        except StoreError as error:
            print(f"smlt worker {config.rank}: cannot tell the scheduler: {error}", file=sys.stderr, flush=True)

    def _anyone_has_trained(self, parameters: ParameterStore) -> bool:
        if self.trainer is not None and self.trainer.has_state:
            return True
        coordination = Coordination(parameters)
        return (coordination.generation() or 0) > 1 or coordination.plan() is not None

    def lose_the_scheduler(self, config: WorkerConfig) -> None:
        """Last words of a worker whose scheduler is gone: stop in order while there is time, then clean up."""
        self.orphaned = True
        if self.member is not None:
            self.member.orphan()
        if config.store_url is not None:  # what is missed here has a TTL
            parameters = ParameterStore(config.store_url, job=config.job).impatient()
            with contextlib.suppress(StoreError):
                if self._anyone_has_trained(parameters):  # also when this one has not: others may be at their checkpoint
                    time.sleep(ORPHAN_GRACE_S)  # the main thread ends the process when it is done
                parameters.sweep()
        self.clean()

    def clean(self) -> None:
        """The process ends: no file of it is left."""
        if self.scratch is not None:
            self.scratch.cleanup()


def _end_at_the_limit(config: WorkerConfig) -> threading.Timer | None:
    """As a function's runtime does: the process ends at the limit, whatever it is doing."""
    if config.time_limit_s is None:
        return None

    def end() -> None:
        text = f"the time limit of {config.time_limit_s:g} s has passed: starting, two steps and a checkpoint must fit into it"
        print(f"smlt worker {config.rank}: {text}", file=sys.stderr, flush=True)
        os._exit(TIME_LIMIT_EXIT)

    timer = threading.Timer(config.time_limit_s, end)
    timer.daemon = True
    timer.start()
    return timer


def main() -> int:
    """Read configurations from stdin and work."""
    stamp_output()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler decides
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    sandbox, configs = Sandbox(), list[WorkerConfig]()

    def last_words() -> None:
        if END_WITH_STDIN in sys.argv[1:]:
            sandbox.clean()
        elif configs:
            sandbox.lose_the_scheduler(configs[-1])

    end_with_parent(last_words, lines.put)
    try:
        while True:
            try:
                config = WorkerConfig.from_json(lines.get().decode())
                if config.store_url is not None:  # a password may be for this machine to look up
                    config = replace(config, store_url=resolve_store_url(config.store_url))
            except SmltError as error:
                print(f"smlt worker: {error}", file=sys.stderr)
                return error.exit_code
            configs.append(config)
            code, ended = sandbox.invoke(config)
            if ended != "paused" or not config.warm or sandbox.orphaned:
                return code
    finally:
        sandbox.forget()


if __name__ == "__main__":
    sys.exit(main())
