"""Invocations: what a caller gets, warm and cold sandboxes, freezing, versions, limits of payloads."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import ClientError

from tests.emulator.conftest import Account, until

COUNTING = """
import os
count = 0
def handler(event, context):
    global count
    count += 1
    return {"count": count, "pid": os.getpid(), "event": event, "arn": context.invoked_function_arn}
"""


def test_a_handler_gets_the_event_and_the_caller_its_value(account: Account) -> None:
    answer = account.invoke(account.deploy(COUNTING), {"some": ["event", 1]})
    assert answer["StatusCode"] == 200
    assert "FunctionError" not in answer
    assert answer["ExecutedVersion"] == "$LATEST"
    assert answer["value"]["event"] == {"some": ["event", 1]}


def test_a_warm_sandbox_is_reused(account: Account) -> None:
    name = account.deploy(COUNTING)
    first, second = account.invoke(name)["value"], account.invoke(name)["value"]
    assert (first["count"], second["count"]) == (1, 2)
    assert first["pid"] == second["pid"]


def test_concurrent_invocations_have_sandboxes_of_their_own(account: Account) -> None:
    name = account.deploy("import os, time\ndef handler(event, context):\n    time.sleep(1)\n    return os.getpid()")
    with ThreadPoolExecutor(4) as threads:
        pids = {answer["value"] for answer in threads.map(lambda _: account.invoke(name), range(4))}
    assert len(pids) == 4


def test_a_sandbox_is_frozen_between_invocations(account: Account) -> None:
    name = account.deploy(
        "import threading, time\n"
        "ticks = 0\n"
        "def tick():\n"
        "    global ticks\n"
        "    while True:\n"
        "        time.sleep(0.001)\n"
        "        ticks += 1\n"
        "threading.Thread(target=tick, daemon=True).start()\n"
        "def handler(event, context):\n"
        "    began = ticks\n"
        "    time.sleep(event)\n"
        "    return [began, ticks]\n"
    )
    began, end = account.invoke(name, 0.5)["value"]
    awake = end - began
    account.invoke(account.deploy("import time\ndef handler(event, context): time.sleep(1)"))
    thawed, _ = account.invoke(name, 0)["value"]
    assert awake > 10
    assert thawed - end < awake / 2, "it went on for a second while nobody had invoked it"


def test_new_code_and_new_configuration_are_cold_starts(account: Account) -> None:
    from tests.emulator.conftest import zipped

    name = account.deploy(COUNTING)
    account.invoke(name)
    account.functions.update_function_code(
        FunctionName=name, ZipFile=zipped(main=COUNTING.replace("count += 1", "count += 10"))
    )
    assert account.invoke(name)["value"]["count"] == 10
    account.functions.update_function_configuration(FunctionName=name, Environment={"Variables": {"A": "b"}})
    assert account.invoke(name)["value"]["count"] == 10


def test_idle_sandboxes_of_a_deleted_function_end(account: Account) -> None:
    name = account.deploy(COUNTING)
    pid = account.invoke(name)["value"]["pid"]
    assert pid in account.local.sandboxes
    account.functions.delete_function(FunctionName=name)
    until(lambda: pid not in account.local.sandboxes)


def test_versions_and_aliases_are_invoked_by_qualifier_and_arn(account: Account) -> None:
    from tests.emulator.conftest import zipped

    name = account.deploy("def handler(event, context): return context.function_version + ' one'")
    version = account.functions.publish_version(FunctionName=name)["Version"]
    account.functions.create_alias(FunctionName=name, Name="live", FunctionVersion=version)
    account.functions.update_function_code(
        FunctionName=name, ZipFile=zipped(main="def handler(event, context): return context.function_version + ' two'")
    )
    arn = account.functions.get_function(FunctionName=name)["Configuration"]["FunctionArn"].removesuffix(":$LATEST")
    assert account.invoke(name)["value"] == "$LATEST two"
    assert account.invoke(arn)["value"] == "$LATEST two"
    assert account.invoke(name, Qualifier="live")["value"] == "1 one"
    assert account.invoke(f"{arn}:live")["value"] == "1 one"
    assert account.invoke(f"{name}:1")["ExecutedVersion"] == "1"


def test_an_exception_is_an_unhandled_function_error_with_its_stack_trace(account: Account) -> None:
    answer = account.invoke(account.deploy("def handler(event, context):\n    raise ValueError('no such thing')"))
    assert (answer["StatusCode"], answer["FunctionError"]) == (200, "Unhandled")
    assert answer["value"]["errorType"] == "ValueError"
    assert answer["value"]["errorMessage"] == "no such thing"
    assert "line 2, in handler" in answer["value"]["stackTrace"][0]


@pytest.mark.parametrize(
    ("source", "handler", "error_type"),
    [
        ("import not_there", "main.handler", "Runtime.ImportModuleError"),
        ("handler = 1", "elsewhere.handler", "Runtime.ImportModuleError"),
        ("handler = 1", "main.other", "Runtime.HandlerNotFound"),
        ("def handler(:", "main.handler", "Runtime.UserCodeSyntaxError"),
        ("import os; os._exit(7)", "main.handler", "Runtime.ExitError"),
    ],
)
def test_a_handler_that_does_not_load_is_reported_as_lambda_does(
    account: Account, source: str, handler: str, error_type: str
) -> None:
    answer = account.invoke(account.deploy(source, Handler=handler))
    assert answer["FunctionError"] == "Unhandled"
    assert answer["value"]["errorType"] == error_type


def test_a_process_that_exits_is_an_exit_error_and_the_next_one_is_cold(account: Account) -> None:
    name = account.deploy("import os\ndef handler(event, context):\n    if event: os._exit(event)\n    return os.getpid()")
    answer = account.invoke(name, 3)
    assert answer["value"]["errorType"] == "Runtime.ExitError"
    assert answer["value"]["errorMessage"].endswith("Error: Runtime exited with error: exit status 3")
    assert account.invoke(name)["value"] > 0


def test_a_response_that_is_too_large_is_an_error(account: Account) -> None:
    answer = account.invoke(account.deploy("def handler(event, context): return 'x' * event"), 6 * 1024 * 1024 + 200)
    assert answer["value"]["errorType"] == "Function.ResponseSizeTooLarge"


def test_events_that_are_too_large_or_no_json_are_refused(account: Account) -> None:
    name = account.deploy(COUNTING)
    with pytest.raises(ClientError) as error:
        account.invoke(name, "x" * (6 << 20))
    assert error.value.response["Error"]["Code"] == "RequestTooLargeException"
    with pytest.raises(ClientError) as error:
        account.invoke(name, "x" * (1 << 20), InvocationType="Event")
    assert error.value.response["Error"]["Code"] == "RequestTooLargeException"
    with pytest.raises(ClientError) as error:
        account.functions.invoke(FunctionName=name, Payload=b"{no json")
    assert error.value.response["Error"]["Code"] == "InvalidRequestContentException"


def test_an_unknown_function_is_not_found_and_a_dry_run_runs_nothing(account: Account) -> None:
    with pytest.raises(ClientError) as error:
        account.invoke("nobody")
    assert error.value.response["Error"]["Code"] == "ResourceNotFoundException"
    before = len(account.local.invocations)
    assert account.invoke(account.deploy(COUNTING), InvocationType="DryRun")["StatusCode"] == 204
    assert len(account.local.invocations) == before


def test_a_function_of_another_runtime_or_architecture_is_refused_in_one_sentence(account: Account) -> None:
    other = "python3.13" if sys.version_info[:2] != (3, 13) else "python3.12"
    with pytest.raises(ClientError, match=f"wants {other}"):
        account.invoke(account.deploy(COUNTING, Runtime=other))
    from smlt.emulator.functions import ARCHITECTURE

    foreign = "arm64" if ARCHITECTURE == "x86_64" else "x86_64"
    with pytest.raises(ClientError, match=f"made for {foreign}"):
        account.invoke(account.deploy(COUNTING, Architectures=[foreign]))


def test_an_image_runs_in_the_environment_that_stands_for_it(account: Account) -> None:
    name = account.deploy(
        "",
        PackageType="Image",
        Code={"ImageUri": "123456789012.dkr.ecr.us-east-1.amazonaws.com/smlt:1"},
        ImageConfig={"Command": ["json.dumps"]},
        Runtime=None,
        Handler=None,
    )
    # json.dumps(event, context) fails in its own way: so it was called.
    assert "positional argument" in json.dumps(account.invoke(name, [1])["value"])
