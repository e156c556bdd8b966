"""What is made of an invocation that goes wrong on this side. The client and the function are fakes here."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, ConnectTimeoutError, IncompleteReadError
from commandline import eventually

from smlt.client.executors.aws_lambda import LambdaExecutor
from smlt.client.executors.invocation import Invoker
from smlt.client.executors.preparation import Target
from smlt.client.invocations import Invocation
from smlt.client.policy import FailurePolicy
from smlt.client.request import RunRequest
from smlt.client.starts import Started
from smlt.errors import CheckpointError, DeployError, WorkerLostError
from smlt.worker.config import WorkerConfig

CONFIG = WorkerConfig("run", "job", 0, 1, "", "", 1, 1, warm=False)
TARGET = Target(cast(Any, None), None, 1769, 1)


def prepare(memory_mb: int) -> Target:
    if memory_mb > 10_240:
        raise DeployError(f"a function has no {memory_mb} MB")
    return replace(TARGET, qualifier=f"smlt-{memory_mb}mb", memory_mb=memory_mb)


class Body:
    """An answer; or what is left of one when the connection is cut in the middle of it."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content

    def read(self) -> bytes:
        if self.content is None:
            raise IncompleteReadError(actual_bytes=1, expected_bytes=2)
        return self.content


class Client:
    def __init__(self, content: bytes | None) -> None:
        self.content = content

    def invoke(self, **_: Any) -> dict[str, Any]:
        return {"ResponseMetadata": {"RequestId": "one"}, "Payload": Body(self.content)}


def test_an_answer_that_is_cut_off_is_out_of_sight_and_ends_no_run() -> None:
    answer = Invoker(Client(None), "function").invoke({}, threading.Event(), 1.0)
    assert (answer.code, answer.error) == (None, None)
    assert "out of sight" in answer.account


def test_an_invocation_that_cannot_be_written_down_ends_the_run(tmp_path: Path) -> None:
    def keep(row: Invocation) -> None:
        raise CheckpointError("the disk is full")

    executor = LambdaExecutor(Invoker(Client(b'{"exit_code": 0, "ended": "done"}'), "function"), 1, TARGET, prepare, keep)
    worker = executor.start(CONFIG, tmp_path / "log")
    assert eventually(lambda: not worker.runs)
    with pytest.raises(CheckpointError, match="the disk is full"):
        worker.poll()


@pytest.mark.parametrize(
    ("on", "advice"), [("local", "--time-limit"), ("lambda", "deploy the function with a larger --timeout")]
)
def test_a_time_limit_that_comes_before_training_is_told_with_what_makes_it_longer(
    tmp_path: Path, on: str, advice: str
) -> None:
    policy = FailurePolicy(RunRequest("script", on=on, max_restarts=0))
    with pytest.raises(WorkerLostError, match=f"its time limit comes before it can train.*{advice}"):
        policy.count_pause(0, Started(CONFIG, tmp_path / "log", 0.0), 0)


class Unreachable:
    """Lambda, that a first try does not reach, and whose second answer does not come."""

    def __init__(self) -> None:
        self.errors: list[Exception] = [
            ConnectTimeoutError(endpoint_url="http://lambda"),
            ConnectionClosedError(endpoint_url="http://lambda"),
        ]

    def invoke(self, **_: Any) -> dict[str, Any]:
        raise self.errors.pop(0)


def test_a_connection_that_never_was_is_tried_again_and_one_that_is_lost_is_not() -> None:
    client = Unreachable()
    answer = Invoker(client, "function").invoke({}, threading.Event(), 1.0)
    assert client.errors == []
    assert (answer.code, answer.error) == (None, None)
    assert "out of sight" in answer.account


class Throttled:
    def invoke(self, **_: Any) -> dict[str, Any]:
        raise ClientError({"Error": {"Code": "TooManyRequestsException"}}, "Invoke")


def test_a_worker_that_is_throttled_for_long_is_lost_for_that_not_for_its_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smlt.client.starts.SIGN_S", 0.6)
    monkeypatch.setattr("smlt.client.executors.invocation.PAUSE_MAX_S", 0.2)
    executor = LambdaExecutor(Invoker(Throttled(), "function"), 1, TARGET, prepare, lambda row: None, patience_s=0.9)
    worker = executor.start(CONFIG, tmp_path / "log")
    start = Started(CONFIG, tmp_path / "log", 0.0, worker, time.monotonic())
    while worker.runs:
        assert not start.overdue
        time.sleep(0.01)
    assert start.code == 1
    assert "could not be invoked: function: AWS is asked too often" in worker.account()


def test_another_memory_is_made_ready_beside_the_run_and_used_from_then_on() -> None:
    invoker = Invoker(Client(b"{}"), "function")
    executor = LambdaExecutor(invoker, 1, TARGET, prepare, lambda row: None)
    assert executor.make_ready(1769)  # it has it
    assert eventually(lambda: executor.make_ready(3538))
    assert (invoker.qualifier, executor.threads(1)) == (None, 1)
    executor.use(3538)
    assert (invoker.qualifier, executor.threads(1)) == ("smlt-3538mb", 2)


def test_a_memory_that_cannot_be_had_is_told_each_time_it_is_asked_for() -> None:
    executor = LambdaExecutor(Invoker(Client(b"{}"), "function"), 1, TARGET, prepare, lambda row: None)
    for _ in range(2):
        with pytest.raises(DeployError, match="no 20000 MB"):
            eventually(lambda: executor.make_ready(20_000))
