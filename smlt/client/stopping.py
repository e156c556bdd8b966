"""`smlt stop`: end a run from outside, whoever schedules it, and leave nothing that runs or is billed."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress

from smlt.client.runs import Run
from smlt.errors import ConfigError, StoreUnavailable
from smlt.store.coordination import LEASE_S, Coordination
from smlt.store.parameter import ParameterStore

#: A step, a checkpoint and the scheduler's own cleaning up.
STOP_S = 60.0
#: Workers that nobody schedules any more stop at a checkpoint by themselves within that.
ORPHANS_S = LEASE_S + 10.0
#: Between the two signals of --now: a scheduler takes the second for a second Ctrl-C.
SECOND_S = 0.3


def stop_run(run: Run, store_url: Callable[[], str | None], *, now: bool = False) -> str:
    """Stop a run; returns in a sentence what was done. By its scheduler where there is one, else through the store.

    `store_url` gives the store as this machine reaches it, None when that went with the scheduler. `now`: do not wait for
    a checkpoint. ConfigError when the scheduler is another machine's, StoreUnavailable when it does not end.
    """
    status = run.status
    if status["state"] == "running":
        return _by_the_scheduler(run, int(status["pid"]), str(status.get("host", "")), now)
    job = status.get("job")
    url = store_url() if job is not None else None
    if url is None and status["state"] == "lost":  # the embedded store goes with its last worker
        return f"run {run.name} had no scheduler any more: its workers end by themselves within {ORPHANS_S:g} s"
    if url is None:
        return f"run {run.name} is {status['state']}: nothing of it runs"
    ended = _through_the_store(url, str(job), now)
    if status["state"] == "lost":
        run.write_status(state="stopped", ended=time.time())
    if not ended:
        return f"run {run.name} is {run.status['state']}: nothing of it runs"
    return f"run {run.name} had no scheduler any more: its {ended} workers were stopped, its keys are deleted"


def _by_the_scheduler(run: Run, pid: int, host: str, now: bool) -> str:
    if host not in ("", socket.gethostname()):
        raise ConfigError(f"run {run.name} is scheduled by process {pid} on {host}: stop it there")
    deadline = time.monotonic() + STOP_S
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        if now:
            time.sleep(SECOND_S)
            os.kill(pid, signal.SIGTERM)
    while run.status["state"] == "running":
        if time.monotonic() > deadline:
            raise StoreUnavailable(f"run {run.name} has not ended within {STOP_S:g} s: process {pid}; try --now")
        time.sleep(0.05)
    while run.is_held and time.monotonic() < deadline:  # it still makes the bill: `smlt resume` would find it running
        time.sleep(0.05)
    step = run.status.get("checkpoint_step")
    where = f", with a checkpoint of step {step}" if step else ", without a checkpoint"
    return f"run {run.name} is {run.status['state']}{where}"


def _through_the_store(url: str, job: str, now: bool) -> int:
    """See off whoever still works for the job; returns how many there were."""
    with closing(ParameterStore(url, job=job)) as parameters:
        coordination = Coordination(parameters)
        workers = parameters.count_keys("worker:*")
        if workers and not now:
            coordination.request_stop()
            _wait_for_nobody(parameters, ORPHANS_S)
        if parameters.count_keys("worker:*"):
            coordination.end_job()
            _wait_for_nobody(parameters, LEASE_S)
        parameters.sweep()
        return workers


def _wait_for_nobody(parameters: ParameterStore, limit_s: float) -> None:
    """A worker's key expires when it does not renew it any more."""
    deadline = time.monotonic() + limit_s
    while parameters.count_keys("worker:*") and time.monotonic() < deadline:
        time.sleep(0.1)
