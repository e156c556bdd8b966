"""A sandbox: one process that runs the genuine runtime client and a handler, one invocation at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smlt.emulator.code import CodeStore
from smlt.emulator.environment import base_interpreter, image_interpreter, python_path, sandbox_environment
from smlt.emulator.functions import Function
from smlt.emulator.guard import Guard
from smlt.emulator.logs import LogStream, Pipes, new_stream_name
from smlt.emulator.memory import peak_bytes
from smlt.emulator.runtime_api import Invocation, Outcome, RuntimeApi

#: How long a runtime may take from its answer to its next question, and a killed process to be gone.
_GRACE_S = 10.0


@dataclass(frozen=True)
class Place:
    """Where sandboxes live and what they share: made once by the emulator."""

    folder: Path
    runtime: Path
    code: CodeStore
    guard: Guard
    endpoint_url: str
    credentials: Callable[[Function], dict[str, str]]
    put_log: Callable[[Function], Callable[[str, str, list[dict[str, object]]], None]]
    image_prefix: Callable[[str], Path]


class Sandbox:
    """Starts at once; `initialize` waits until the handler is loaded. Between invocations it is frozen.

    `ended_by` says why it was killed, "" while it was not.
    """

    def __init__(self, function: Function, place: Place) -> None:
        self.function = function
        self.fingerprint = function.fingerprint
        self.folder = place.folder / "sandboxes" / os.urandom(8).hex()
        self.tmp = self.folder / "tmp"
        self.tmp.mkdir(parents=True)
        self.log = LogStream(function, new_stream_name(function), place.put_log(function))
        self.ended_by = ""
        self.idle_since = time.monotonic()
        self.running = True  # not frozen
        self.max_memory_bytes = 0
        self.init_ms = 0.0
        self.invocations = 0
        self._guard = place.guard
        self._lock = threading.Lock()
        self.api = RuntimeApi()
        self._pipes = Pipes(self.log)
        try:
            self.process = self._start(place)
        except BaseException:
            self._pipes.started()
            self.api.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self._began = time.monotonic()  # unpacking is not the function's time
        self.pid = self.process.pid
        self._guard.add(self.pid)
        self._pipes.started()
        self._reaped = threading.Event()
        threading.Thread(target=self._wait, name="smlt-lambda-wait", daemon=True).start()

    def _start(self, place: Place) -> subprocess.Popen[bytes]:
        function = self.function
        environment = sandbox_environment(
            function,
            runtime_api=self.api.address,
            endpoint_url=place.endpoint_url,
            credentials=place.credentials(function),
            log_stream=self.log.name,
            tmp=self.tmp,
        )
        environment["_LAMBDA_TELEMETRY_LOG_FD"] = str(self._pipes.frames)  # whole messages with their times
        if function.image is None:
            task, opt = place.code.task(function.code), place.code.layers(function.layers)
            environment["PYTHONPATH"] = python_path(task, opt, place.runtime, function.environment.get("PYTHONPATH"))
            # Compiled once for all sandboxes, and not beside the code, which is read-only.
            environment["PYTHONPYCACHEPREFIX"] = str(place.folder / "pycache")
            python = [base_interpreter(), "-S", "-s"]
        else:
            task = self.folder / "task"
            task.mkdir()
            python = [image_interpreter(place.image_prefix(function.image))]
        environment |= {"LAMBDA_TASK_ROOT": str(task), "LAMBDA_RUNTIME_DIR": str(place.runtime)}
        return subprocess.Popen(
            [*python, "-m", "awslambdaric", function.handler],
            cwd=task,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._pipes.output,
            stderr=self._pipes.output,
            pass_fds=(self._pipes.frames,),
            start_new_session=True,  # its group is what is frozen and killed
        )

    @property
    def alive(self) -> bool:
        """Whether its process has not ended."""
        return not self._reaped.is_set() and not self.ended_by

    def initialize(self, timeout_s: float) -> Outcome | None:
        """Wait until the handler is loaded. None when it is, else the error as Lambda answers it.

        An error type of "Sandbox.Timedout" means that it is still at it.
        """
        began = self._began
        ready = self.api.wait_idle(max(0.0, timeout_s - (time.monotonic() - began)))
        self.init_ms = (time.monotonic() - began) * 1000
        self.measure()
        if ready:
            return None
        if not self.api.closed:
            return Outcome.error("Sandbox.Timedout", f"Error: Task timed out after {timeout_s:.2f} seconds")
        self._pipes.drain()
        return self.api.init_error or self.exit_outcome("")

    def run(self, invocation: Invocation, timeout_s: float) -> Outcome | None:
        """Thaw, hand out the event, wait for what becomes of it, freeze. None: it has timed out.

        A process that ends without an answer gives Runtime.ExitError.
        """
        self.thaw()
        self.invocations += 1
        self.api.hand_out(invocation)
        outcome = self.api.wait_outcome(timeout_s)
        if outcome is not None and not self.api.closed:
            self.freeze()
        elif outcome is None and self.api.closed:
            self._reaped.wait(_GRACE_S)
            outcome = self.exit_outcome(invocation.request_id)
        self._pipes.drain()
        return outcome

    def exit_outcome(self, request_id: str) -> Outcome:
        """How Lambda reports a process that has ended (https://docs.aws.amazon.com/lambda/latest/dg/troubleshooting-invocation.html)."""
        self._reaped.wait(_GRACE_S)
        code = self.process.returncode
        if self.ended_by.startswith("/tmp"):
            return Outcome.error("Runtime.ExitError", f"RequestId: {request_id} Error: {self.ended_by}")
        if code is not None and code < 0:
            how = f"signal: {signal.strsignal(-code) or -code}".lower()
            text = f"Runtime exited with error: {how}"
        else:
            text = f"Runtime exited with error: exit status {code}" if code else "Runtime exited without providing a reason"
        return Outcome.error("Runtime.ExitError", f"{f'RequestId: {request_id} ' if request_id else ''}Error: {text}")

    def freeze(self) -> None:
        """Stop all its processes, as Lambda does between invocations."""
        self.measure()
        self.running = False
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self.running = True
        self._signal(signal.SIGCONT)

    def measure(self) -> int:
        """Note the most memory its main process has had; the monitor adds its children. Bytes."""
        self.max_memory_bytes = max(self.max_memory_bytes, peak_bytes(self.pid) if self.alive else 0)
        return self.max_memory_bytes

    def kill(self, why: str) -> None:
        """End its processes at once (SIGKILL); whoever waits for its outcome sees it."""
        self.measure()
        self.ended_by = self.ended_by or why
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """End it and remove its folder. Safe to call twice."""
        self.kill("closed")
        self._reaped.wait(_GRACE_S)
        self._pipes.drain()

    def _signal(self, number: int) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError, PermissionError):
            if not self._reaped.is_set():  # else its number may be another's
                os.killpg(self.pid, number)

    def _wait(self) -> None:
        # Not process.wait: the group must be killed and taken off the guard's list before its number is free again.
        if hasattr(os, "waitid"):  # not on macOS before Python 3.13
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        else:
            self.process.wait()
        self._signal(signal.SIGKILL)  # what it has started ends with it
        with self._lock:
            self._guard.remove(self.pid)
            self.process.wait()
            self._reaped.set()
        self.api.close()
        shutil.rmtree(self.folder, ignore_errors=True)
