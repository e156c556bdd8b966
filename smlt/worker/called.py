"""A worker as a call: what an engine that runs Python functions elsewhere (Lithops, Ray) is given to run.

The worker is a child process of the call, so that it has its own threads, signals and output, whatever the engine has made of
the process that it calls in. It ends at once when the call's process does: the others do not stop with it, it is replaced.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from dataclasses import replace
from typing import IO, Any

from smlt._version import __version__
from smlt.errors import ConfigError, SmltError
from smlt.store.secrets import resolve_store_url
from smlt.worker.config import WorkerConfig
from smlt.worker.process import END_WITH_STDIN, worker_command, worker_environment

#: So much of the end of a worker's output comes back with its exit code.
LOG_BYTES = 256 << 10
#: A process that the task has started may hold the output open.
LAST_OUTPUT_S = 2.0


def work(config_json: str, version: str) -> dict[str, Any]:
    """Run a worker to its end: {"exit_code": int, negative for a signal; "log": the end of its output}.

    `config_json`: a WorkerConfig, whose store's URL is resolved here: a password may come from a secret manager, a file or a
    variable of this machine. `version`: that of the package on the other side, which must be the one here.
    """
    try:
        if version != __version__:
            raise ConfigError(f"here is smlt {__version__}, but the run is by smlt {version}: install the same")
        config = WorkerConfig.from_json(config_json)
        config = replace(config, store_url=resolve_store_url(config.store_url))
    except SmltError as error:
        return {"exit_code": error.exit_code, "log": f"smlt worker: {error}\n"}
    process = subprocess.Popen(
        worker_command(END_WITH_STDIN),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=worker_environment(config.threads),
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    output = bytearray()
    reader = threading.Thread(target=_keep_end, args=(process.stdout, output), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended already: its exit code tells
            process.stdin.write(config.to_json().encode() + b"\n")
            process.stdin.flush()
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also what the task has started
        process.wait()
    reader.join(LAST_OUTPUT_S)
    return {"exit_code": code, "log": bytes(output).decode(errors="replace")}


def _keep_end(stream: IO[bytes], output: bytearray) -> None:
    while data := os.read(stream.fileno(), 1 << 16):
        output += data
        del output[:-LOG_BYTES]
