"""Asynchronous invocations: accepted at once, tried again after errors and throttling."""

from __future__ import annotations

import threading

from smlt.emulator import Record
from tests.emulator.conftest import Account, until


def records(account: Account, name: str) -> list[Record]:
    return [record for record in account.local.invocations if record.function == name]


def test_an_event_is_accepted_before_it_has_run(account: Account) -> None:
    s3 = account.client("s3")
    s3.create_bucket(Bucket="what-events-leave")
    name = account.deploy(
        "import boto3\n"
        "def handler(event, context): boto3.client('s3').put_object(Bucket='what-events-leave', Key=event['key'], Body=b'x')"
    )
    answer = account.invoke(name, {"key": "done"}, InvocationType="Event")
    assert (answer["StatusCode"], answer["value"]) == (202, None)
    assert account.local.wait_for_events()
    assert s3.get_object(Bucket="what-events-leave", Key="done")["Body"].read() == b"x"


def test_a_failing_event_is_tried_twice_more_with_the_same_request_id(account: Account) -> None:
    name = account.deploy("def handler(event, context): raise ValueError")
    account.invoke(name, InvocationType="Event")
    assert account.local.wait_for_events()
    found = records(account, name)
    assert [record.attempt for record in found] == [1, 2, 3]
    assert len({record.request_id for record in found}) == 1


def test_the_functions_own_number_of_retries_counts(account: Account) -> None:
    name = account.deploy("def handler(event, context): raise ValueError")
    account.functions.put_function_event_invoke_config(FunctionName=name, MaximumRetryAttempts=2)
    account.functions.put_function_event_invoke_config(FunctionName=name, MaximumRetryAttempts=0)
    account.invoke(name, InvocationType="Event")
    assert account.local.wait_for_events()
    assert len(records(account, name)) == 1


def test_a_throttled_event_waits_for_its_turn(account: Account) -> None:
    name = account.deploy("import time\ndef handler(event, context): time.sleep(event)")
    account.functions.put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=1)
    thread = threading.Thread(target=account.invoke, args=(name, 1))
    thread.start()
    until(lambda: account.local.busy(name))
    account.invoke(name, 0, InvocationType="Event")
    thread.join()
    assert account.local.wait_for_events()
    states = [(record.kind, record.status) for record in records(account, name)]
    assert ("Event", "throttled") in states
    assert ("Event", "ok") in states


def test_events_of_a_deleted_function_are_dropped(account: Account) -> None:
    name = account.deploy("def handler(event, context): raise ValueError")
    account.functions.put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=0)
    account.invoke(name, InvocationType="Event")
    account.functions.delete_function(FunctionName=name)
    assert account.local.wait_for_events()
