"""What can happen to a run. Each fault strikes and returns when it is over; whether the run goes on is looked at by others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import redis

from bench.chaos.run import REPOSITORY, LostRun, Run, lives

#: A duplicate or a zombie that has not ended by itself so long after it could know is a finding.
END_S = 40.0


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        process.send_signal(number)


def kill(run: Run) -> str:
    """SIGKILL one worker."""
    victim = run.chance.choice(run.workers())
    _signal(victim, signal.SIGKILL)
    return f"worker process {victim.pid}"


def kill_two(run: Run) -> str:
    """SIGKILL two workers at once."""
    victims = run.chance.sample(run.workers(), 2)
    for victim in victims:
        _signal(victim, signal.SIGKILL)
    return f"worker processes {[victim.pid for victim in victims]}"


def kill_all(run: Run) -> str:
    """SIGKILL every worker: the run has only its checkpoints."""
    for victim in run.workers():
        _signal(victim, signal.SIGKILL)
    return "all workers"


def pause(run: Run) -> str:
    """SIGSTOP a worker for less than its liveness, then let it go on."""
    victim, seconds = run.chance.choice(run.workers()), run.chance.uniform(0.1, 0.5) * run.request.liveness_s
    _signal(victim, signal.SIGSTOP)
    time.sleep(seconds)
    _signal(victim, signal.SIGCONT)
    return f"{seconds:.2f} s"


def freeze(run: Run) -> str:
    """SIGSTOP a worker for good: it is noticed by its metadata key."""
    victim = run.chance.choice(run.workers())
    _signal(victim, signal.SIGSTOP)
    return f"worker process {victim.pid}"


def zombie(run: Run) -> str:
    """SIGSTOP a worker that nobody can end, wait until it has been replaced, and let it go on."""
    victim, step = run.chance.choice(run.workers()), run.step()
    (run.folder / "immortal" / str(victim.pid)).touch()
    _signal(victim, signal.SIGSTOP)
    run.wait_for_progress(step + 1, "zombie")
    time.sleep(run.chance.uniform(0, 1))
    _signal(victim, signal.SIGCONT)
    _must_end(victim, "zombie")
    return f"worker process {victim.pid}"


def _must_end(process: psutil.Process, what: str) -> None:
    deadline = time.monotonic() + END_S
    while lives(process):
        if time.monotonic() > deadline:
            raise LostRun(f"{what} {process.pid} has not ended by itself within {END_S:g} s")
        time.sleep(0.02)


def duplicate(run: Run) -> str:
    """Start a second process from the very configuration of a worker that lives, as an at-least-once invocation does."""
    victim = run.chance.choice(run.workers())
    config = (run.folder / "workers" / str(victim.pid)).read_text()
    environment = {
        **os.environ,
        "CHAOS_PACE": str(run.pace),
        "CHAOS_EXAMPLES": str(REPOSITORY / "examples"),
        "PYTHONPATH": str(REPOSITORY),
    }
    with (run.folder / "duplicates.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "smlt.worker.main"], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
        )
    assert process.stdin is not None
    process.stdin.write(config.encode() + b"\n")
    process.stdin.flush()
    try:
        code = process.wait(END_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise LostRun(f"a duplicate of worker process {victim.pid} has not ended within {END_S:g} s") from error
    if code not in (0, 4):  # fenced, or, when its worker was replaced meanwhile, released
        raise LostRun(f"a duplicate of worker process {victim.pid} ended with exit code {code}")
    return f"of worker process {victim.pid}: exit code {code}"


def slow(run: Run) -> str:
    """A worker gets a fifth of the time for two seconds."""
    victim, deadline = run.chance.choice(run.workers()), time.monotonic() + 2
    while time.monotonic() < deadline:
        _signal(victim, signal.SIGSTOP)
        time.sleep(0.04)
        _signal(victim, signal.SIGCONT)
        time.sleep(0.01)
    return f"worker process {victim.pid}"


def restart_store(run: Run) -> str:
    """SIGKILL the store and start it again, empty."""
    os.kill(run.store.pid, signal.SIGKILL)
    while run.store.alive:
        time.sleep(0.005)
    time.sleep(run.chance.uniform(0, 0.5))
    run.store.restart()
    return "empty"


def flush(run: Run) -> str:
    """FLUSHALL: the store's data are gone, its connections are not."""
    with redis.Redis.from_url(run.store.url) as client:
        client.flushall()
    return ""


def stall_store(run: Run) -> str:
    """The store answers nobody for a while."""
    milliseconds = run.chance.randint(200, 1500)
    with redis.Redis.from_url(run.store.url) as client:
        client.execute_command("CLIENT", "PAUSE", milliseconds, "ALL")
        time.sleep(milliseconds / 1000)
    return f"{milliseconds} ms"


def fill_store(run: Run) -> str:
    """The store refuses writes for want of memory for a while."""
    seconds = run.chance.uniform(0.1, 0.6)
    with redis.Redis.from_url(run.store.url) as client:
        before = client.config_get("maxmemory")["maxmemory"]
        client.config_set("maxmemory", 1)
        time.sleep(seconds)
        client.config_set("maxmemory", before)
    return f"{seconds:.2f} s"


def cut(run: Run) -> str:
    """Connections end in the middle of a message: some are closed, some reset."""
    chosen = [c for c in run.proxy.connections if not c._ended.is_set()]
    for connection in run.chance.sample(chosen, min(len(chosen), 6)):
        way = run.chance.choice([connection.up, connection.down])
        way.at(run.chance.randint(1, 20_000), run.chance.choice(["close", "reset"]))
    time.sleep(0.5)
    return "6 connections"


def freeze_network(run: Run) -> str:
    """No byte goes to the store or comes from it for a while, and no connection ends."""
    seconds = run.chance.uniform(0.2, 1.5)
    run.proxy.freeze()
    time.sleep(seconds)
    run.proxy.thaw()
    return f"{seconds:.2f} s"


def kill_scheduler(run: Run) -> str:
    """SIGKILL the scheduler; when its workers have gone, another one resumes the run."""
    workers = run.workers()
    assert run.process is not None
    run.process.kill()
    run.process.wait()
    for worker in workers:
        _must_end(worker, "a worker whose scheduler is gone")
    run.start(resume=True)
    return ""


KINDS: dict[str, Callable[[Run], str]] = {
    "kill": kill,
    "kill-two": kill_two,
    "kill-all": kill_all,
    "pause": pause,
    "freeze": freeze,
    "zombie": zombie,
    "duplicate": duplicate,
    "slow": slow,
    "restart-store": restart_store,
    "flush": flush,
    "stall-store": stall_store,
    "fill-store": fill_store,
    "cut": cut,
    "freeze-network": freeze_network,
    "kill-scheduler": kill_scheduler,
}
