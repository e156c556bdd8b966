"""`smlt launch`: any script in n processes that find each other by SMLT_* environment variables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import smlt
from smlt.client.executors.local import threads_per_worker
from smlt.errors import TaskError
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore

GRACE_S = 5.0


def launch(script: str, arguments: list[str], workers: int, store_url: str | None) -> int:
    """Run `script` in `workers` processes, lines of output prefixed by rank; returns the exit code.

    The first process that fails ends all others, and its code is the result. On Ctrl-C all are ended and the job's keys
    deleted. TaskError when there is no such script; StoreError when the store does not answer.
    """
    if not Path(script).is_file():
        raise TaskError(f"there is no script {script}")
    with ExitStack() as stack:
        url = store_url or stack.enter_context(EmbeddedStore()).url
        job = f"launch-{os.urandom(6).hex()}"
        parameters = ParameterStore(url, job=job)
        stack.callback(parameters.close)
        parameters.check()
        stack.callback(parameters.sweep)
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_end_all, processes)
        printers = []
        for rank in range(workers):
            environment = {
                **os.environ,
                "SMLT_STORE": url,
                "SMLT_JOB": job,
                "SMLT_RANK": str(rank),
                "SMLT_WORLD_SIZE": str(workers),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_per_worker(workers))),
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(Path(smlt.__file__).parents[1]), os.environ.get("PYTHONPATH")])
                ),
            }
            process = subprocess.Popen(
                [sys.executable, script, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            processes.append(process)
            printer = threading.Thread(target=_print_lines, args=(rank, process), daemon=True)
            printer.start()
            printers.append(printer)
        code = _wait(processes)
        if code:
            _end_all(processes)
        for printer in printers:
            printer.join(2)
        return code


def _print_lines(rank: int, process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(f"[{rank}] {line.decode(errors='replace')}")
        sys.stdout.flush()


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.02)


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
