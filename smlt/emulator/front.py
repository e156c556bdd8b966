"""What happens to each request: noted, allowed or not, then answered here (Invoke) or by moto (all else)."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import uuid
from collections.abc import Callable, Iterable
from html import escape
from http import HTTPStatus
from typing import Any

from smlt.emulator import authorization, control
from smlt.emulator.functions import FunctionNotFoundError, find_function
from smlt.emulator.invoke import EventQueue, Invoker, Request
from smlt.emulator.operations import Operation, classify
from smlt.emulator.pool import ThrottledError
from smlt.emulator.principals import Principals
from smlt.emulator.requests_log import RequestLog
from smlt.emulator.server import Reply, aws_error
from smlt.emulator.settling import Settling

#: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html: 6 MB synchronous, 1 MB asynchronous.
EVENT_BYTES = {"RequestResponse": 6 * 1024 * 1024, "DryRun": 6 * 1024 * 1024, "Event": 1024 * 1024}

Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Front:
    """The WSGI application of the emulator."""

    def __init__(
        self,
        moto: Wsgi,
        invoker: Invoker,
        events: EventQueue,
        log: RequestLog,
        principals: Principals,
        *,
        account: str,
        account_limit: int,
        authorize: bool,
        settle_s: float,
    ) -> None:
        self._moto = moto
        self._invoker = invoker
        self._events = events
        self._log = log
        self._principals = principals
        self._account = account
        self._account_limit = account_limit
        self._authorize = authorize
        self._settling = Settling(settle_s)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if _from_a_browser(environ):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"lambda-local answers AWS clients on this machine, no web pages\n"]
        if environ["PATH_INFO"].startswith("/moto-api"):
            return self._moto(environ, start_response)
        operation = classify(environ, self._account)
        self._log.add(operation)
        reply = self._own(operation, environ)
        if reply is None:
            environ["wsgi.input"].seek(0)
            if not self._settling.concerns(operation):
                return self._moto(environ, start_response)
            return self._settled(operation, environ, start_response)
        status, headers, body = reply
        headers = {"x-amzn-RequestId": str(uuid.uuid4()), **headers}
        start_response(f"{status} {HTTPStatus(status).phrase}", list(headers.items()))
        return [body]

    def _settled(self, operation: Operation, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """moto's answer, with the state that the function has at Lambda."""
        begun: list[Any] = []
        parts = self._moto(environ, lambda status, headers, exc_info=None: begun.extend((status, headers)))
        body = b"".join(parts)
        with contextlib.suppress(AttributeError):  # WSGI: close it when it can be closed
            parts.close()  # type: ignore[attr-defined]
        status, headers = begun
        body = self._settling.shown(operation, int(status.split()[0]), body)
        start_response(status, [(name, value) for name, value in headers if name.lower() != "content-length"])
        return [body]

    def _own(self, operation: Operation, environ: dict[str, Any]) -> Reply | None:
        if self._authorize:
            try:
                authorization.check(operation, self._principals)
            except authorization.Refusal as refusal:
                return _refused(operation, refusal)
        if operation.service != "lambda":
            return None
        unsettled = self._settling.refusal(operation)
        if unsettled is not None:
            return unsettled
        if operation.name == "Invoke":
            return self._invoke(operation, environ)
        if operation.name == "InvokeWithResponseStream":
            return aws_error(400, "InvalidParameterValueException", "lambda-local has no response streaming: use Invoke")
        if self._authorize and control.lacks_network_rights(operation, self._principals):
            text = "The provided execution role does not have permissions to call CreateNetworkInterface on EC2"
            return aws_error(400, "InvalidParameterValueException", text)
        return control.answer(operation, self._account_limit)

    def _invoke(self, operation: Operation, environ: dict[str, Any]) -> Reply:
        kind = environ.get("HTTP_X_AMZ_INVOCATION_TYPE") or "RequestResponse"
        event = environ["wsgi.input"].getvalue()
        if kind not in EVENT_BYTES:
            return aws_error(400, "InvalidParameterValueException", f"There is no invocation type {kind}")
        if len(event) > EVENT_BYTES[kind]:
            text = f"Request must be smaller than {EVENT_BYTES[kind]} bytes for the InvokeFunction operation"
            return aws_error(413, "RequestTooLargeException", text)
        try:
            json.loads(event or b"{}")
            context = base64.b64decode(environ.get("HTTP_X_AMZ_CLIENT_CONTEXT", "")).decode()
        except (ValueError, binascii.Error) as error:
            return aws_error(400, "InvalidRequestContentException", f"Could not parse request body into json: {error}")
        arguments = operation.arguments
        try:
            function = find_function(arguments["FunctionName"], arguments.get("Qualifier"), operation.region, operation.account)
        except FunctionNotFoundError as error:
            return aws_error(404, "ResourceNotFoundException", str(error))
        problem = function.runs_here()
        if problem:
            return aws_error(400, "InvalidRuntimeException", problem)
        if kind == "DryRun":
            return 204, {}, b""
        request = Request(function, event or b"{}", kind, context or None)
        headers = {"x-amzn-RequestId": request.request_id, "X-Amz-Executed-Version": function.version}
        if kind == "Event":
            self._events.put(request)
            return 202, headers, b""
        try:
            answer = self._invoker.invoke(request)
        except ThrottledError as throttled:
            status, more, body = aws_error(429, "TooManyRequestsException", "Rate Exceeded.", Reason=throttled.reason)
            return status, {**more, **headers, "Retry-After": "1"}, body
        headers["Content-Type"] = "application/json"
        if answer.outcome.failed:
            headers["X-Amz-Function-Error"] = "Unhandled"
        if environ.get("HTTP_X_AMZ_LOG_TYPE") == "Tail":
            headers["X-Amz-Log-Result"] = base64.b64encode(answer.log_tail).decode()
        return 200, headers, answer.outcome.body


def _from_a_browser(environ: dict[str, Any]) -> bool:
    """Whether a web page asks, which could otherwise deploy code here and run it: moto lets all origins in, and a name that
    leads to 127.0.0.1 is anyone's to make."""
    host = environ.get("HTTP_HOST", "").rpartition(":")[0] or environ.get("HTTP_HOST", "")
    local = host in ("127.0.0.1", "localhost") or host.endswith((".localhost", ".amazonaws.com"))
    return "HTTP_ORIGIN" in environ or "HTTP_SEC_FETCH_SITE" in environ or not local


def _refused(operation: Operation, refusal: authorization.Refusal) -> Reply:
    if operation.service in ("s3", "iam", "sts", "ec2"):
        error = f"<Error><Code>{refusal.code}</Code><Message>{escape(str(refusal))}</Message></Error>"
        if operation.service in ("iam", "sts"):
            error = f"<ErrorResponse>{error}</ErrorResponse>"
        elif operation.service == "ec2":
            error = f"<Response><Errors>{error}</Errors></Response>"
        return 403, {"Content-Type": "application/xml"}, f'<?xml version="1.0" encoding="UTF-8"?>{error}'.encode()
    if operation.service == "lambda":
        return aws_error(403, refusal.code, str(refusal))
    body = json.dumps({"__type": refusal.code, "message": str(refusal)}).encode()
    return 400, {"Content-Type": "application/x-amz-json-1.1"}, body
