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

from smlt.client.executors.local import threads_per_worker
from smlt.errors import TaskError
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore
from smlt.store.secrets import without_store_secrets
from smlt.worker.process import this_package

GRACE_S = 5.0


def launch(
    script: str,
    arguments: list[str],
    workers: int,
    store_url: str | None,
    timeout_s: float | None = None,
    two_level: bool = False,
) -> int:
    """Run `script` in `workers` processes, lines of output prefixed by rank; returns the exit code.

    The first process that fails ends all others, and its code is the result (128 + n when signal n killed it); a line on
    stderr names it. On Ctrl-C all are ended. The job's keys are deleted in any case. With `two_level` they reduce in shared
    memory, and there is no store unless `store_url` gives one.
    TaskError when there is no such script; StoreError when the store does not answer.
    """
    if not Path(script).is_file():
        raise TaskError(f"there is no script {script}")
    with ExitStack() as stack:
        job = f"launch-{os.urandom(6).hex()}"
        url = store_url
        if url is None and not two_level:
            url = stack.enter_context(EmbeddedStore()).url
        if url is not None:
            parameters = ParameterStore(url, job=job)
            stack.callback(parameters.close)
            parameters.check()
            stack.callback(parameters.sweep, derived=True)
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_end_all, processes)
        printers: list[_Printer] = []
        for rank in range(workers):
            environment = {
                **without_store_secrets(os.environ),
                **({} if url is None else {"SMLT_STORE": url}),
                "SMLT_JOB": job,
                "SMLT_RANK": str(rank),
                "SMLT_WORLD_SIZE": str(workers),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_per_worker(workers))),
                "PYTHONUNBUFFERED": "1",
                **({"SMLT_LOCAL_RANK": str(rank), "SMLT_LOCAL_SIZE": str(workers)} if two_level else {}),
                **({} if timeout_s is None else {"SMLT_TIMEOUT_S": str(timeout_s)}),
                **this_package(),
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "smlt.worker.launched", script, *arguments],
                env=environment,
                stdin=subprocess.PIPE,  # the life line: it closes when this process ends, however that comes about
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            processes.append(process)
            printers.append(_Printer(rank, process))
        rank, code = _wait(processes, printers)
        if code:
            _end_all(processes)
        for printer in printers:
            printer.thread.join(2)  # a grandchild may hold the pipe open
        if code:
            how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
            print(f"smlt: rank {rank} {how}; the others were ended", file=sys.stderr)
        return code if code >= 0 else 128 - code


class _Printer:
    """Prints a process's output, its rank before each line, in a thread."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self.rank, self.output = rank, process.stdout
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._print, daemon=True)
        self.thread.start()

    def _print(self) -> None:
        for line in self.output:
            try:
                # One write: lines of several ranks do not mix.
                sys.stdout.write(f"[{self.rank}] {line.decode(errors='replace').rstrip()}\n")
                sys.stdout.flush()
            except OSError as error:
                self.error = error
                return


def _wait(processes: list[subprocess.Popen[bytes]], printers: list[_Printer]) -> tuple[int, int]:
    """Wait for the first failure or the end of all: (rank, exit code)."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank, code
        if all(code == 0 for code in codes):
            return 0, 0
        for printer in printers:
            if printer.error is not None:
                raise printer.error  # nobody reads our output any more
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
