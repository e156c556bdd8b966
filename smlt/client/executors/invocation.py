"""One synchronous invocation of a function: tried again while it is throttled, and its answer understood.

https://docs.aws.amazon.com/lambda/latest/api/API_Invoke.html
"""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smlt.client.executors.calls import Ending
from smlt.client.invocations import Invocation, Report, parse_report
from smlt.errors import DeployError
from smlt.store.aws import error_code, translated

#: Lambda has no room at the moment: asked again after a pause, doubled each time up to the last.
THROTTLED = {"TooManyRequestsException", "ThrottlingException", "Throttling", "RequestLimitExceeded", "EC2ThrottledException"}
#: Passes as well: a function being updated, or Lambda's own trouble.
PASSING = {
    "EC2UnexpectedException",
    "ENILimitReachedException",
    "InternalFailure",
    "ResourceConflictException",
    "ResourceNotReadyException",
    "ServiceException",
    "ServiceUnavailable",
    "SubnetIPAddressLimitReachedException",
}
PAUSE_S, PAUSE_MAX_S = 0.1, 5.0
#: A function whose handler cannot be imported will not do so the next time either.
NO_START = {"Runtime.ImportModuleError", "Runtime.HandlerNotFound", "Runtime.UserCodeSyntaxError", "Runtime.InvalidEntrypoint"}
#: What a worker's exit code stands for where it has none of its own.
TIMED_OUT, KILLED = 124, -9


@dataclass
class Answer(Ending):
    """What came of an invocation."""

    ended: str = ""
    payload: dict[str, Any] = field(default_factory=dict)
    row: Invocation | None = None


class Invoker:
    """Invokes `function` (at `qualifier`) with a client of Lambda's that tries nothing again by itself."""

    def __init__(self, client: Any, function: str, qualifier: str | None = None) -> None:
        self.client, self.function, self.qualifier = client, function, qualifier
        self.throttled = 0  # times, since whoever looks has set it back

    def invoke(
        self,
        event: Mapping[str, Any],
        given_up: threading.Event,
        patience_s: float,
        refused: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Invoke, and wait for the end. Tries again for `patience_s`, or until it is given up, while nothing has begun.

        `refused` is called each time that it is to be tried again.
        """
        payload = json.dumps(event).encode()
        asked: dict[str, Any] = {"FunctionName": self.function, "LogType": "Tail", "Payload": payload}
        if self.qualifier is not None:
            asked["Qualifier"] = self.qualifier
        pause_s, deadline = PAUSE_S, time.monotonic() + patience_s
        while not given_up.is_set():
            started = time.time()
            try:
                return self._understood(self.client.invoke(**asked), started)
            except Exception as error:
                answer = self._failed(error, time.monotonic() > deadline)
                if answer is not None:
                    return answer
            refused()
            given_up.wait(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
        return Answer()

    def _failed(self, error: Exception, out_of_patience: bool) -> Answer | None:
        """None: try again. Only errors that come before anything has begun are tried again."""
        from botocore import exceptions

        code = error_code(error)
        if isinstance(error, exceptions.ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            throttled = code in THROTTLED or status == 429
            self.throttled += throttled
            passes = throttled or code in PASSING or status >= 500
        elif isinstance(error, (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError)):
            passes = True
        elif isinstance(error, (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)):
            return Answer(account="runs out of sight: the connection to its invocation was lost")
        else:
            passes = False
        if passes and not out_of_patience:
            return None
        if passes:  # it counts as a failure of this worker: others train, and the next may have room
            return Answer(code=1, account=f"could not be invoked: {translated(error, self.function)}")
        return Answer(error=translated(error, f"cannot invoke function {self.function}", DeployError))

    def _understood(self, response: Mapping[str, Any], started: float) -> Answer:
        log = base64.b64decode(response.get("LogResult", "")).decode(errors="replace")
        request_id = str(response["ResponseMetadata"].get("RequestId", ""))
        try:
            payload = json.loads(response["Payload"].read() or b"null")
        except ValueError:
            payload = None
        answer = Answer(log=log, payload=payload if isinstance(payload, dict) else {})
        report = report_in(log, request_id)
        if response.get("FunctionError"):
            self._explain(answer, report)
        elif isinstance(answer.payload.get("exit_code"), int):
            answer.code, answer.ended = answer.payload["exit_code"], str(answer.payload.get("ended", ""))
            answer.account = f"ended with exit code {answer.code}"
            if answer.ended == "fenced":  # Lambda has invoked twice, and it is the other one that goes by the worker's name
                answer.code = None
        else:
            answer.code, answer.ended = 0, "answered"
        answer.row = _row(request_id, started, answer.ended, report)
        return answer

    def _explain(self, answer: Answer, report: Report | None) -> None:
        """https://docs.aws.amazon.com/lambda/latest/dg/python-exceptions.html"""
        kind = str(answer.payload.get("errorType", ""))
        message = str(answer.payload.get("errorMessage", "")).strip()
        if kind == "Sandbox.Timedout" or "Task timed out" in message:
            answer.code, answer.ended = TIMED_OUT, "timeout"
            answer.account = f"reached its function's timeout ({message.rpartition('timed out ')[2] or message})"
        elif kind in NO_START:
            answer.code, answer.ended = 2, "error"
            answer.error = DeployError(f"function {self.function} does not start: {message}; deploy it again, with its layer")
        elif kind in ("Runtime.ExitError", "Runtime.OutOfMemory", "Sandbox.Failure") or "exited" in message:
            answer.code, answer.ended = KILLED, "killed"
            answer.account = f"was ended by its sandbox ({message})"
            if kind == "Runtime.OutOfMemory" or (report is not None and report.max_memory_mb >= report.memory_mb):
                size = f" of {report.memory_mb} MB" if report is not None else ""
                answer.account = f"ran out of its function's memory{size}; give a larger --memory"
        else:
            answer.code, answer.ended = (2 if kind == "ConfigError" else 1), "error"
            answer.account = f"failed in its function: {kind}: {message}"


def report_in(log: str, request_id: str) -> Report | None:
    """The REPORT line of an invocation in the end of its log, None when it is not there."""
    for line in reversed(log.splitlines()):
        report = parse_report(line)
        if report is not None and report.request_id == request_id:
            return report
    return None


def _row(request_id: str, started: float, outcome: str, report: Report | None) -> Invocation:
    if report is None:
        return Invocation(request_id, started=started, outcome=outcome)
    return Invocation(
        request_id,
        started=started,
        billed_ms=report.billed_ms,
        memory_mb=report.memory_mb,
        max_memory_mb=report.max_memory_mb,
        init_ms=report.init_ms,
        outcome=outcome,
    )


#: Takes a row for the run's invocations.jsonl.
Keep = Callable[[Invocation], None]
