"""`smlt logs` of a run on Lambda. CloudWatch Logs is moto's, over HTTP; the events are shaped as Lambda writes them."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import boto3
import pytest

from smlt import cli
from smlt.client.bill import bill
from smlt.client.cloudwatch import RunLogs, Sorter
from smlt.client.invocations import Invocation, append_invocation, read_invocations, with_reports
from smlt.client.logs import LogLine, follow, logs, reports
from smlt.client.runs import Run
from smlt.errors import StoreAuthError, StoreError, StoreUnavailable

GROUP = "/aws/lambda/smlt"
ONE, TWO = "2026/01/02/[$LATEST]aaaa", "2026/01/02/[$LATEST]bbbb"


@pytest.fixture
def cloud(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    settings = {
        "AWS_ENDPOINT_URL": moto_url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("logs", region_name="us-east-1")
    for group in client.describe_log_groups()["logGroups"]:
        client.delete_log_group(logGroupName=group["logGroupName"])
    client.create_log_group(logGroupName=GROUP)
    for stream in (ONE, TWO):
        client.create_log_stream(logGroupName=GROUP, logStreamName=stream)
    return client


NOW = float(int(time.time()))


def put(cloud: Any, stream: str, *lines: tuple[float, str]) -> None:
    events = [{"timestamp": int((NOW + at) * 1e3), "message": text} for at, text in lines]
    cloud.put_log_events(logGroupName=GROUP, logStreamName=stream, logEvents=events)


def report(request_id: str, billed_ms: int, end: str = "") -> str:
    numbers = (
        f"Duration: {billed_ms - 0.5:.2f} ms\tBilled Duration: {billed_ms} ms\tMemory Size: 1769 MB\tMax Memory Used: 90 MB"
    )
    return f"REPORT RequestId: {request_id}\t{numbers}\t{end}\n"


def invocation(request_id: str, at: float, *printed: str, run: str = "run", rank: int = 0, billed_ms: int = 5) -> list:  # type: ignore[type-arg]
    owner = [f"smlt run={run} worker=w{rank} rank={rank}\n"] if run else []
    texts = [f"START RequestId: {request_id} Version: $LATEST\n", *owner, *printed]
    texts += [f"END RequestId: {request_id}\n", report(request_id, billed_ms)]
    return [(at + number / 1000, text) for number, text in enumerate(texts)]


def made_run(folder: Path, state: str = "done", *rows: Invocation) -> Run:
    run = Run.create(folder / "smlt-runs", Path("task.py"), {"workers": 2, "epochs": 9}, "run")
    run.write_status(state=state, pid=0, started=NOW, ended=NOW + 100, function="smlt", log_group=GROUP)
    for row in rows:
        append_invocation(run.path, row)
    return run


def told(lines: Any) -> list[tuple[str, str]]:
    return [(line.worker, line.text) for line in lines if not line.text.startswith("REPORT")]


def test_two_sandboxes_are_told_apart_and_other_runs_are_left_out(cloud: Any, tmp_path: Path) -> None:
    put(cloud, ONE, *invocation("old", -5, "of another run\n", run="other", rank=0))
    put(cloud, ONE, *invocation("a", 1, "a begins\n", "a\ngoes\non\n", rank=0), *invocation("c", 3, "c\n", rank=0))
    put(cloud, TWO, *invocation("b", 1.0005, "b begins\n", "b ends\n", rank=1))
    put(cloud, TWO, *invocation("x", 2, "not of smlt\n", run=""))
    run = made_run(tmp_path)
    assert told(logs(run)) == [
        ("worker-0", "a begins"),
        ("worker-1", "b begins"),
        ("worker-0", "a"),
        ("worker-0", "goes"),
        ("worker-0", "on"),
        ("worker-1", "b ends"),
        ("worker-0", "c"),
    ]
    assert told(logs(run, worker=1)) == [("worker-1", "b begins"), ("worker-1", "b ends")]
    assert told(logs(run, since=NOW + 2.5)) == [("worker-0", "c")]
    found = list(reports(run))
    assert sorted((one.request_id, one.worker_id, one.rank) for one in found) == [
        ("a", "w0", 0),
        ("b", "w1", 1),
        ("c", "w0", 0),
    ]
    shown = [line.text for line in logs(run) if line.text.startswith("REPORT")]
    assert len(shown) == 3
    assert "Billed Duration: 5 ms" in shown[0]
    assert "\t" not in shown[0]


def test_repeated_and_unanswered_invocations_are_found_and_billed(cloud: Any, tmp_path: Path) -> None:
    put(cloud, ONE, *invocation("a", 1, "first time\n", billed_ms=100))
    put(
        cloud,
        TWO,
        *invocation("a", 2, "second time\n", billed_ms=40),
        *invocation("lost", 3, "no answer\n", rank=1, billed_ms=7),
    )
    run = made_run(tmp_path, "done", Invocation("a", "w0", 0, NOW + 1, outcome="done"))
    assert [text for _, text in told(logs(run))] == ["first time", "second time", "no answer"]
    rows = with_reports(read_invocations(run.path), reports(run))
    assert [(row.request_id, row.billed_ms, row.outcome) for row in rows] == [
        ("a", 100, "done"),
        ("a", 40, "duplicate"),
        ("lost", 7, "unanswered"),
    ]
    assert (bill(rows).invocations, bill(rows).unreported) == (3, 0)


def test_an_invocation_that_died_before_its_first_line_is_known_by_its_request_id(cloud: Any, tmp_path: Path) -> None:
    died = [
        (1.0, "INIT_START Runtime Version: python:3.12.v1\tRuntime Version ARN: arn:aws:lambda:us-east-1::runtime:x\n"),
        (1.1, "imported\n"),
        (1.2, "START RequestId: a Version: $LATEST\n"),
        (1.3, "[ERROR] Runtime.ImportModuleError: No module named 'torch'\n"),
        (1.4, "END RequestId: a\n"),
        (1.5, report("a", 300, "Status: error\tError Type: Runtime.ImportModuleError")),
        (1.6, "RequestId: a Error: Runtime exited with error: signal: killed\n"),
        (1.7, "2026-01-02T15:30:00.123Z zzz Task timed out after 3.00 seconds\n"),
    ]
    put(cloud, ONE, *died)
    put(cloud, TWO, (1.0, "INIT_START x\n"), (1.1, "of another\n"), *invocation("b", 1.2, run="other"))
    run = made_run(tmp_path, "done", Invocation("a", "w4", 4, NOW + 1))
    assert told(logs(run)) == [
        ("worker-4", "imported"),
        ("worker-4", "[ERROR] Runtime.ImportModuleError: No module named 'torch'"),
        ("worker-4", "RequestId: a Error: Runtime exited with error: signal: killed"),
    ]
    (found,) = reports(run)
    assert (found.status, found.error_type, found.billed_ms) == ("error", "Runtime.ImportModuleError", 300)


def test_a_tasks_own_lines_cannot_claim_another_run_or_a_report(cloud: Any, tmp_path: Path) -> None:
    forged = ["smlt run=run worker=w9 rank=9\n", report("mine", 1), "INIT\n"]
    put(cloud, ONE, *invocation("theirs", 1, *forged, run="other"))
    put(cloud, TWO, *invocation("mine", 2, "smlt run=other worker=w9 rank=9\n", report("else", 1), "end\n"))
    run = made_run(tmp_path)
    assert told(logs(run)) == [("worker-0", "smlt run=other worker=w9 rank=9"), ("worker-0", "end")]
    assert [(one.request_id, one.billed_ms) for one in reports(run)] == [("mine", 5)]


def test_hundreds_of_lines_come_over_several_pages(cloud: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cloud, ONE, *invocation("a", 1, *(f"line {number}\n" for number in range(500))))
    run = made_run(tmp_path)
    reader = RunLogs(run)
    pages = []
    plain = reader.client._make_api_call

    def by_fifty(operation: str, parameters: dict[str, Any]) -> Any:
        pages.append(operation)
        return plain(operation, {**parameters, "limit": 50})

    monkeypatch.setattr(reader.client, "_make_api_call", by_fifty)
    assert [text for _, text in told(reader.lines())] == [f"line {number}" for number in range(500)]
    assert len(pages) > 10


def test_following_shows_each_line_once_and_ends_with_the_run(cloud: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path, "running", Invocation("a", "w0", 0, NOW))
    run.write_status(pid=os.getpid())
    lines = invocation("a", 1, "one\n", "two\n", "three\n")
    put(cloud, ONE, *lines[:3])
    found = list[LogLine]()
    thread = threading.Thread(target=lambda: found.extend(RunLogs(run).follow(poll_s=0.05)), daemon=True)
    thread.start()

    def reached(count: int) -> bool:
        deadline = time.monotonic() + 20
        while len(found) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(found) >= count

    assert reached(1)
    put(cloud, ONE, lines[3])
    assert reached(2)
    put(cloud, ONE, *lines[4:])
    run.write_status(state="done")
    thread.join(20)
    assert not thread.is_alive()
    assert told(found) == [("worker-0", "one"), ("worker-0", "two"), ("worker-0", "three")]
    assert next(follow(run)).text == "one"  # a run that has ended is shown from its beginning


def test_the_command_reads_cloudwatch(
    cloud: Any, moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(cloud, ONE, *invocation("a", 1, "hello\n", rank=3))
    made_run(tmp_path)
    arguments = ["smlt", "logs", "run", "--json", "--endpoint-url", moto_url, "--runs-dir", str(tmp_path / "smlt-runs")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert cli.run() == 0
    first, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["worker"], first["text"]) == ("worker-3", "hello")
    cloud.delete_log_group(logGroupName=GROUP)
    assert cli.run() == 3
    said = capsys.readouterr().err
    assert said.startswith(f"smlt: there is no log group {GROUP}: the function has not run")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("ThrottlingException", StoreUnavailable, "AWS is asked too often (ThrottlingException): try again in a minute"),
        ("ExpiredTokenException", StoreAuthError, "the AWS credentials have expired"),
        ("AccessDeniedException", StoreAuthError, "AWS denies it"),
        ("InternalFailure", StoreError, "AWS answered InternalFailure"),
    ],
)
def test_what_aws_refuses_is_one_sentence(
    cloud: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, kind: type[StoreError], said: str
) -> None:
    from botocore.exceptions import ClientError

    reader = RunLogs(made_run(tmp_path))

    def refuse(*_: object) -> None:
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, "FilterLogEvents")

    monkeypatch.setattr(reader.client, "_make_api_call", refuse)
    with pytest.raises(kind) as raised:
        list(reader.lines())
    assert str(raised.value).startswith(f"cannot read the logs in {GROUP}: {said}")
    assert "\n" not in str(raised.value)


def test_a_stream_that_begins_in_the_middle_is_no_trouble() -> None:
    sorter = Sorter("run", {})
    events = [
        {"timestamp": 1, "logStreamName": "s", "message": text} for text in ("x", "END RequestId: q", report("q", 1), "y")
    ]
    assert list(sorter.take(events)) == []
    assert list(sorter.finish()) == []
