"""Fixtures: one emulator for each file of tests, and functions from a few lines of source."""

from __future__ import annotations

import io
import json
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config

from smlt.emulator import LambdaLocal
from smlt.emulator.functions import RUNTIME

TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


def zipped(**modules: str) -> bytes:
    """A zip with a module for each argument; `a__b` is a/b.py."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, source in modules.items():
            archive.writestr(name.replace("__", "/") + ".py", source)
    return buffer.getvalue()


def until(condition: Callable[[], Any], timeout_s: float = 20) -> Any:
    """Wait for what the condition gives when it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
    return found


class Account:
    """Clients of one emulator, a role, and functions by their source."""

    def __init__(self, local: LambdaLocal) -> None:
        self.local = local
        self.functions = self.client("lambda")
        self.role = self.client("iam").create_role(RoleName="worker", AssumeRolePolicyDocument=json.dumps(TRUST))["Role"]["Arn"]

    def client(self, service: str, **credentials: str) -> Any:
        config = Config(retries={"total_max_attempts": 1}, max_pool_connections=40)
        keys = {**self.local.credentials, **credentials}
        return boto3.client(service, region_name="us-east-1", endpoint_url=self.local.endpoint_url, config=config, **keys)

    def deploy(self, source: str, *, modules: dict[str, str] | None = None, **settings: Any) -> str:
        """A function whose module `main` has `handler`; returns its name."""
        name = f"function-{uuid.uuid4().hex[:8]}"
        chosen = {"Runtime": RUNTIME, "Role": self.role, "Handler": "main.handler", "Timeout": 20, **settings}
        chosen.setdefault("Code", {"ZipFile": zipped(main=source, **(modules or {}))})
        given = {key: value for key, value in chosen.items() if value is not None}
        self.functions.create_function(FunctionName=name, **given)
        return name

    def invoke(self, name: str, event: Any = None, **settings: Any) -> dict[str, Any]:
        """The answer, with its payload as `value`."""
        answer = self.functions.invoke(FunctionName=name, Payload=json.dumps(event), **settings)
        text = answer["Payload"].read()
        return {**answer, "value": json.loads(text) if text else None}

    def messages(self, name: str) -> list[str]:
        """All that its sandboxes have logged, stream by stream."""
        logs, group = self.client("logs"), f"/aws/lambda/{name}"
        try:
            streams = logs.describe_log_streams(logGroupName=group)["logStreams"]
        except logs.exceptions.ResourceNotFoundException:
            return []
        found = []
        for stream in streams:
            events = logs.get_log_events(logGroupName=group, logStreamName=stream["logStreamName"], startFromHead=True)
            found += [event["message"] for event in events["events"]]
        return found


@pytest.fixture(scope="module")
def local() -> Iterator[LambdaLocal]:
    with LambdaLocal(retry_delays_s=(0.05, 0.05), throttle_backoff_s=0.05) as running:
        yield running


@pytest.fixture(scope="module")
def account(local: LambdaLocal) -> Account:
    return Account(local)
