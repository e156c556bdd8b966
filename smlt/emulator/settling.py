"""Changes that take their time: a function is Pending when it is new, and its updates are InProgress, as on Lambda.

Who does not wait for it (boto3's waiters function_active_v2 and function_updated_v2) gets Lambda's ResourceConflictException.
https://docs.aws.amazon.com/lambda/latest/dg/functions-states.html
"""

from __future__ import annotations

import json
import threading
import time

from smlt.emulator.operations import Operation
from smlt.emulator.server import Reply, aws_error

_CHANGES = {
    "CreateFunction": "State",
    "UpdateFunctionCode": "LastUpdateStatus",
    "UpdateFunctionConfiguration": "LastUpdateStatus",
}
_SHOWS = {*_CHANGES, "GetFunction", "GetFunctionConfiguration"}
_REFUSED = {"UpdateFunctionCode", "UpdateFunctionConfiguration", "PublishVersion"}


class Settling:
    """Which functions are being changed. `settle_s`: how long each change takes; 0: none does."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._lock = threading.Lock()
        self._until: dict[str, tuple[str, float]] = {}  # name -> what is unsettled, and until when

    def refusal(self, operation: Operation) -> Reply | None:
        """Lambda's answer to what cannot be done yet."""
        unsettled = self._unsettled(operation)
        if unsettled and operation.name in _REFUSED:
            arn = operation.needs[0].resource
            text = f"The operation cannot be performed at this time. An update is in progress for resource: {arn}"
            return aws_error(409, "ResourceConflictException", text)
        if unsettled == "State" and operation.name == "Invoke":
            text = "The operation cannot be performed at this time. The function is currently in the following state: Pending"
            return aws_error(409, "ResourceConflictException", text)
        return None

    def concerns(self, operation: Operation) -> bool:
        """Whether the answer to the operation shows the state."""
        return self._settle_s > 0 and operation.service == "lambda" and operation.name in _SHOWS

    def shown(self, operation: Operation, status: int, body: bytes) -> bytes:
        """The answer with the state of now; a change begins with it."""
        if status >= 300:
            return body
        if operation.name in _CHANGES:
            with self._lock:
                self._until[_name(operation)] = (_CHANGES[operation.name], time.monotonic() + self._settle_s)
        unsettled = self._unsettled(operation)
        if not unsettled:
            return body
        answer = json.loads(body)
        configuration = answer.get("Configuration", answer)
        if unsettled == "State":
            configuration |= {
                "State": "Pending",
                "StateReasonCode": "Creating",
                "StateReason": "The function is being created.",
            }
        configuration["LastUpdateStatus"] = "InProgress"
        return json.dumps(answer).encode()

    def _unsettled(self, operation: Operation) -> str:
        with self._lock:
            what, until = self._until.get(_name(operation), ("", 0.0))
            return what if time.monotonic() < until else ""


def _name(operation: Operation) -> str:
    name = str(operation.arguments.get("FunctionName", ""))
    return name.split(":")[6] if name.startswith("arn:") and name.count(":") >= 6 else name.partition(":")[0]
