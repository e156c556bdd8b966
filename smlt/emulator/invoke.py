"""An invocation from its event to its report: synchronous, asynchronous with retries, duplicated when faults say so."""

from __future__ import annotations

import heapq
import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from smlt.emulator.faults import Dice
from smlt.emulator.functions import Function, FunctionNotFoundError
from smlt.emulator.logs import Report
from smlt.emulator.memory import MB
from smlt.emulator.pool import Pool, ThrottledError
from smlt.emulator.runtime_api import Invocation, Outcome, trace_id
from smlt.emulator.sandbox import Sandbox

#: How long loading a handler may take before Lambda begins anew, then within the function's timeout
#: (https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtime-environment.html#runtimes-lifecycle-ib).
INIT_TIMEOUT_S = 10.0
#: How long Lambda waits before it tries a failed asynchronous invocation a second and a third time
#: (https://docs.aws.amazon.com/lambda/latest/dg/invocation-async-error-handling.html).
RETRY_DELAYS_S = (60.0, 120.0)
_LONGEST_BACKOFF_S = 300.0


@dataclass(frozen=True)
class Record:
    """One invocation that is over, as `LambdaLocal.invocations` keeps it. Times in milliseconds, memory in MB.

    `status` is "ok", "throttled", or the error's type. `duplicate`: the second run of an invocation, whose result nobody gets.
    """

    function: str
    version: str
    request_id: str
    kind: str
    status: str
    duration_ms: float = 0.0
    billed_ms: int = 0
    init_ms: float | None = None
    memory_mb: int = 0
    max_memory_mb: int = 0
    attempt: int = 1
    duplicate: bool = False
    log_stream: str = ""


@dataclass(frozen=True)
class Answer:
    """What the caller of a synchronous invocation gets."""

    outcome: Outcome
    log_tail: bytes


@dataclass(frozen=True)
class Request:
    """An event for a function."""

    function: Function
    event: bytes
    kind: str = "RequestResponse"
    client_context: str | None = None
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    attempt: int = 1
    duplicate: bool = False


class Invoker:
    """Runs invocations in sandboxes of the pool. `report` gets a record of each."""

    def __init__(
        self, pool: Pool, dice: Dice, *, init_timeout_s: float = INIT_TIMEOUT_S, report: Callable[[Record], None]
    ) -> None:
        self._pool = pool
        self._dice = dice
        self._init_timeout_s = init_timeout_s
        self._report = report

    def invoke(self, request: Request) -> Answer:
        """Run it and wait for its end. Raises ThrottledError when it may not run now."""
        function = request.function
        try:
            if self._dice.throttles():
                raise ThrottledError("ReservedFunctionConcurrentInvocationLimitExceeded")
            unreserved = self._pool.enter(function)
        except ThrottledError:
            self._report(
                Record(function.name, function.version, request.request_id, request.kind, "throttled", attempt=request.attempt)
            )
            raise
        try:
            if not request.duplicate and self._dice.duplicates():
                self._start_duplicate(request)
            return self._run(request)
        finally:
            self._pool.leave(function, unreserved)

    def _start_duplicate(self, request: Request) -> None:
        """Run it a second time at the same time: Lambda promises at least once, not exactly once."""

        def again() -> None:
            twin = replace(request, duplicate=True)
            try:
                unreserved = self._pool.enter(twin.function)
            except ThrottledError:
                return  # no room for it
            self._dice.count("duplicate")
            try:
                self._run(twin)
            finally:
                self._pool.leave(twin.function, unreserved)

        threading.Thread(target=again, name="smlt-lambda-duplicate", daemon=True).start()

    def _run(self, request: Request) -> Answer:
        function = request.function
        sandbox = self._pool.take(function)
        cold = sandbox is None
        failed: Outcome | None = None
        if sandbox is None:
            sandbox = self._pool.make(function)
            sandbox.log.begin()
            failed = self._initialize(sandbox)
            if failed is not None and failed.error_type == "Sandbox.Timedout":
                # As Lambda does: once more, as a part of the invocation and with its timeout.
                self._pool.end(sandbox)
                sandbox = self._pool.make(function)
                sandbox.log.begin()
                return self._run_in(sandbox, request, cold=True, loading=True)
        else:
            sandbox.log.begin()
        return self._run_in(sandbox, request, cold=cold, failed=failed)

    def _initialize(self, sandbox: Sandbox) -> Outcome | None:
        runtime = sandbox.function.runtime.replace("python", "python:") or "image"
        sandbox.log.write(f"INIT_START Runtime Version: {runtime} (lambda-local)\n")
        failed = sandbox.initialize(self._init_timeout_s)
        if self._dice.faults.cold_start_s > 0:
            time.sleep(self._dice.faults.cold_start_s)
            sandbox.init_ms += self._dice.faults.cold_start_s * 1000
            self._dice.count("cold_start")
        if failed is not None:
            how = "timeout" if failed.error_type == "Sandbox.Timedout" else f"error\tError Type: {failed.error_type}"
            sandbox.log.write(f"INIT_REPORT Init Duration: {sandbox.init_ms:.2f} ms\tPhase: init\tStatus: {how}\n")
        return failed

    def _run_in(
        self, sandbox: Sandbox, request: Request, *, cold: bool, failed: Outcome | None = None, loading: bool = False
    ) -> Answer:
        """Run it in this sandbox. `failed`: loading has. `loading`: it loads within the invocation's time."""
        function, log, request_id = request.function, sandbox.log, request.request_id
        log.write(f"START RequestId: {request_id} Version: {function.version}\n")
        began = time.monotonic()
        timeout_s = float(function.timeout_s)
        if loading:
            failed = sandbox.initialize(timeout_s)
            timeout_s = max(0.0, timeout_s - (time.monotonic() - began))
        outcome: Outcome | None = failed
        if failed is not None and failed.error_type == "Runtime.ExitError":
            outcome = sandbox.exit_outcome(request_id)
        if failed is None:
            stop_killer = self._arm(sandbox)
            outcome = sandbox.run(self._invocation(request, timeout_s), timeout_s)
            stop_killer()
        elif failed.error_type == "Sandbox.Timedout":
            outcome = None
        duration_ms = (time.monotonic() - began) * 1000
        if outcome is None:
            duration_ms = function.timeout_s * 1000.0
            outcome = self._timed_out(sandbox, request)
        report = self._reported(sandbox, request, outcome, duration_ms, sandbox.init_ms if cold and not loading else None)
        tail = log.tail()
        if sandbox.alive and failed is None:
            self._pool.give_back(sandbox)
        else:
            self._pool.end(sandbox)
        self._note(request, outcome, report, log.name)
        return Answer(outcome, tail)

    @staticmethod
    def _invocation(request: Request, timeout_s: float) -> Invocation:
        deadline_ms = int((time.time() + timeout_s) * 1000)
        function = request.function
        return Invocation(
            request.request_id, request.event, deadline_ms, function.invoked_arn, trace_id(), request.client_context
        )

    def _arm(self, sandbox: Sandbox) -> Callable[[], None]:
        """Have the sandbox killed while it works, when the dice say so. Returns what calls it off."""
        after_s = self._dice.kills_after()
        if after_s is None:
            return lambda: None

        def kill() -> None:
            self._dice.count("kill")
            sandbox.kill("fault")

        timer = threading.Timer(after_s, kill)
        timer.daemon = True
        timer.start()
        return timer.cancel

    @staticmethod
    def _timed_out(sandbox: Sandbox, request: Request) -> Outcome:
        sandbox.kill("timeout")
        sandbox.close()
        text = f"Task timed out after {request.function.timeout_s:.2f} seconds"
        moment = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03d}Z"
        sandbox.log.write(f"{stamp} {request.request_id} {text}\n\n")
        return Outcome.error("Sandbox.Timedout", f"RequestId: {request.request_id} Error: {text}")

    @staticmethod
    def _reported(sandbox: Sandbox, request: Request, outcome: Outcome, duration_ms: float, init_ms: float | None) -> Report:
        status, error_type = "", ""
        if outcome.error_type == "Sandbox.Timedout":
            status = "timeout"
        elif outcome.error_type.startswith("Runtime."):
            status, error_type = "error", outcome.error_type
        if outcome.error_type == "Runtime.ExitError":
            sandbox.log.write(f"RequestId: {request.request_id} Error: {_message_of(outcome)}\n")
        report = Report(
            request.request_id,
            duration_ms,
            request.function.memory_mb,
            max(1, -(-sandbox.measure() // MB)),
            init_ms,
            status,
            error_type,
        )
        sandbox.log.write(f"END RequestId: {request.request_id}\n", report.line)
        return report

    def _note(self, request: Request, outcome: Outcome, report: Report, log_stream: str) -> None:
        self._report(
            Record(
                function=request.function.name,
                version=request.function.version,
                request_id=request.request_id,
                kind=request.kind,
                status=outcome.error_type or "ok",
                duration_ms=round(report.duration_ms, 2),
                billed_ms=report.billed_ms,
                init_ms=None if report.init_ms is None else round(report.init_ms, 2),
                memory_mb=report.memory_mb,
                max_memory_mb=report.max_memory_mb,
                attempt=request.attempt,
                duplicate=request.duplicate,
                log_stream=log_stream,
            )
        )


def _message_of(outcome: Outcome) -> str:
    return str(json.loads(outcome.body).get("errorMessage", "")).partition("Error: ")[2]


class EventQueue:
    """Asynchronous invocations: run at once, again after errors, and later when they are throttled."""

    def __init__(
        self,
        invoker: Invoker,
        *,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
        throttle_backoff_s: float = 1.0,
        current: Callable[[Function], Function],
    ) -> None:
        self._invoker = invoker
        self._retry_delays_s = tuple(retry_delays_s)
        self._throttle_backoff_s = throttle_backoff_s
        self._current = current
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Request, float, int]] = []
        self._order = itertools.count()
        self._under_way = 0
        self._closed = False
        threading.Thread(target=self._dispatch, name="smlt-lambda-events", daemon=True).start()

    def put(self, request: Request) -> None:
        """Take an event; it is run soon."""
        self._add(request, time.monotonic(), time.monotonic(), 0)

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until no event is queued, waits for a retry, or runs. False when it is not so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._heap and not self._under_way, timeout_s)

    def close(self) -> None:
        """Forget what is queued."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify_all()

    def _add(self, request: Request, due: float, born: float, throttled: int) -> None:
        with self._changed:
            if not self._closed:
                heapq.heappush(self._heap, (due, next(self._order), request, born, throttled))
                self._changed.notify_all()

    def _dispatch(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._heap or self._heap[0][0] > time.monotonic()):
                    self._changed.wait(self._heap[0][0] - time.monotonic() if self._heap else None)
                if self._closed:
                    return
                _, _, request, born, throttled = heapq.heappop(self._heap)
                self._under_way += 1
            threading.Thread(target=self._attempt, args=(request, born, throttled), daemon=True).start()

    def _attempt(self, request: Request, born: float, throttled: int) -> None:
        try:
            try:
                request = replace(request, function=self._current(request.function))
                failed = self._invoker.invoke(request).outcome.failed
            except FunctionNotFoundError:
                return  # deleted meanwhile
            except ThrottledError:
                pause = min(self._throttle_backoff_s * 2**throttled, _LONGEST_BACKOFF_S)
                self._again(request, born, pause, throttled + 1)
                return
            if failed and request.attempt <= request.function.retries and self._retry_delays_s:
                delay = self._retry_delays_s[min(request.attempt, len(self._retry_delays_s)) - 1]
                self._again(replace(request, attempt=request.attempt + 1), born, delay, 0)
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def _again(self, request: Request, born: float, pause: float, throttled: int) -> None:
        due = time.monotonic() + pause
        if due - born <= request.function.maximum_age_s:  # older events are dropped
            self._add(request, due, born, throttled)
