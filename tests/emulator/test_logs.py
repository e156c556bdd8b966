"""Logs: Lambda's own lines, whole messages, the tail that a caller may have."""

from __future__ import annotations

import base64
import re

from smlt.emulator.logs import Report
from tests.emulator.conftest import Account, until

TALKING = """
import logging, sys
def handler(event, context):
    print("a line")
    logging.getLogger().warning("two\\nlines")
    sys.stderr.write("no end of line")
    if event: raise ValueError("bad")
"""
ID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
REPORT = re.compile(
    rf"REPORT RequestId: {ID}\tDuration: \d+\.\d\d ms\tBilled Duration: \d+ ms\tMemory Size: 128 MB\tMax Memory Used: \d+ MB\t"
    rf"(Init Duration: \d+\.\d\d ms\t)?\n"
)


def test_the_stream_holds_start_output_end_and_report(account: Account) -> None:
    name = account.deploy(TALKING)
    account.invoke(name)
    account.invoke(name)
    until(lambda: len(account.messages(name)) == 13)
    messages = account.messages(name)
    assert messages[0].startswith("INIT_START Runtime Version: python:3")
    assert re.fullmatch(rf"START RequestId: {ID} Version: \$LATEST\n", messages[1])
    assert messages[2] == "a line\n" or "a line\n" in messages[2:5]
    assert "no end of line" in messages[2:5]
    assert any(re.fullmatch(rf"\[WARNING\]\t\S+Z\t{ID}\ttwo\nlines\n", message) for message in messages[2:5])
    assert re.fullmatch(rf"END RequestId: {ID}\n", messages[5])
    cold, warm = REPORT.fullmatch(messages[6]), REPORT.fullmatch(messages[12])
    assert cold
    assert cold[2]
    assert warm
    assert not warm[2]


def test_streams_are_named_by_day_version_and_sandbox(account: Account) -> None:
    name = account.deploy(TALKING)
    account.invoke(name)
    (stream,) = account.client("logs").describe_log_streams(logGroupName=f"/aws/lambda/{name}")["logStreams"]
    assert re.fullmatch(r"\d{4}/\d\d/\d\d/\[\$LATEST\][0-9a-f]{32}", stream["logStreamName"])


def test_an_error_is_one_event_with_its_traceback(account: Account) -> None:
    name = account.deploy(TALKING)
    account.invoke(name, 1)
    (error,) = [message for message in account.messages(name) if message.startswith("[ERROR]")]
    assert error.startswith("[ERROR] ValueError: bad\nTraceback (most recent call last):\n")


def test_the_tail_is_the_last_4_kb_of_this_invocation(account: Account) -> None:
    name = account.deploy("def handler(event, context):\n    for n in range(event): print('line', n)")
    account.invoke(name, 3)
    tail = base64.b64decode(account.invoke(name, 2, LogType="Tail")["LogResult"]).decode()
    assert tail.startswith("START RequestId")
    assert "line 1\n" in tail
    assert "line 2\n" not in tail
    assert "\nREPORT RequestId" in tail
    assert len(base64.b64decode(account.invoke(name, 1000, LogType="Tail")["LogResult"])) == 4096
    assert "LogResult" not in account.invoke(name, 1)


def test_output_is_in_the_log_while_the_function_still_runs(account: Account) -> None:
    name = account.deploy("import time\ndef handler(event, context):\n    print('early')\n    time.sleep(2)\n    return 1")
    account.invoke(name, InvocationType="Event")
    until(lambda: account.local.busy(name))
    until(lambda: "early\n" in account.messages(name))
    assert account.local.busy(name)
    assert account.local.wait_for_events()


def test_a_timeout_is_in_the_log_and_in_the_report(account: Account) -> None:
    name = account.deploy("import time\ndef handler(event, context): time.sleep(20)", Timeout=1)
    account.invoke(name)
    messages = account.messages(name)
    assert any(re.fullmatch(rf"\S+Z {ID} Task timed out after 1\.00 seconds\n\n", message) for message in messages)
    assert messages[-1].endswith("Status: timeout\t\n")


def test_billed_duration_includes_the_initialisation_and_is_rounded_up() -> None:
    assert Report("id", 10.2, 128, 20, None).billed_ms == 11
    assert Report("id", 10.2, 128, 20, 99.9).billed_ms == 111
    assert Report("id", 3.0, 128, 20, None).billed_ms == 3
