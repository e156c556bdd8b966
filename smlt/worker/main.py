"""A worker process: `python -m smlt.worker.main`, its configuration as one line of JSON on stdin.

stdin stays open as a life line: when it closes, whoever started this worker is gone, and the worker ends. Exit codes are
those of the errors in `smlt.errors`; 0 when training is done or was stopped in order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from smlt.collective.communicator import Communicator
from smlt.errors import SmltError, StoreError, TaskError
from smlt.store.object import open_object_store
from smlt.store.parameter import ParameterStore
from smlt.worker.config import WorkerConfig
from smlt.worker.data import fetch_code, fetch_data
from smlt.worker.lifeline import end_with_parent
from smlt.worker.task import load_task
from smlt.worker.trainer import Trainer


def run_worker(config: WorkerConfig) -> int:
    """Join the job, train, leave; returns the exit code. What went wrong is told to the store and to stderr."""
    trainer: Trainer | None = None
    parameters: ParameterStore | None = None
    try:
        objects = open_object_store(config.object_store_url)
        with tempfile.TemporaryDirectory(prefix="smlt-worker-") as scratch:
            if config.store_url is not None:
                parameters = ParameterStore(config.store_url, job=config.job)
            code = fetch_code(objects, f"{config.run}/code", Path(scratch) / "code", config.code_sha256)
            task = load_task(code / config.script)
            if config.has_data:
                task.data_dir = fetch_data(objects, f"{config.run}/data", Path(scratch) / "data")
            with Communicator(
                config.store_url,
                job=config.job,
                rank=config.rank,
                world_size=config.world_size,
                generation=config.generation,
                timeout_s=config.timeout_s,
                codec=config.codec,
            ) as comm:

                def report(row: dict[str, Any]) -> str:
                    return comm.parameter_store.report(config.rank, row) if comm.parameter_store is not None else ""

                trainer = Trainer(config, task, comm, objects, report)
                signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stop_requested", True))
                trainer.run()
        return 0
    except SmltError as error:
        text = f"{type(error).__name__}: {error}"
        cause = error.__cause__ if isinstance(error, TaskError) else None
        trace = "".join(traceback.format_exception(cause)) if cause is not None else ""
        print(f"{trace}smlt worker {config.rank}: {text}", file=sys.stderr, flush=True)
        _tell(parameters, config, trainer, text, trace)
        return error.exit_code
    except Exception as error:  # the user's code, or a bug here: the traceback tells which
        text, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        print(f"{trace}smlt worker {config.rank}: {text}", file=sys.stderr, flush=True)
        _tell(parameters, config, trainer, text, trace)
        return TaskError.exit_code


def _tell(parameters: ParameterStore | None, config: WorkerConfig, trainer: Trainer | None, text: str, trace: str) -> None:
    """Record the failure if it is the job's first, and end the others' waiting."""
    if parameters is None:
        return
    step = trainer.step if trainer is not None else 0
    try:
        if parameters.fail(config.rank, step, text, trace):
            parameters.abort(f"rank {config.rank} failed at step {step}: {text}")
    except StoreError as error:
        print(f"smlt worker {config.rank}: cannot tell the scheduler: {error}", file=sys.stderr, flush=True)


def _clean_up(config: WorkerConfig) -> None:
    """Last words of a worker whose scheduler is gone: what the job has in the store. What is missed has a TTL."""
    if config.store_url is not None:
        parameters = ParameterStore(config.store_url, job=config.job).impatient()
        with contextlib.suppress(StoreError):
            parameters.sweep()


def main() -> int:
    """Read the configuration from stdin and work."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler decides
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # unbuffered: nothing is taken from the life line
        if not byte:
            break
        line += byte
    try:
        config = WorkerConfig.from_json(line.decode())
    except SmltError as error:
        print(f"smlt worker: {error}", file=sys.stderr)
        return error.exit_code
    end_with_parent(lambda: _clean_up(config))
    return run_worker(config)


if __name__ == "__main__":
    sys.exit(main())
