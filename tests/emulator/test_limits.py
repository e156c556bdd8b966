"""Limits while a function runs: its timeout, memory, /tmp and concurrency."""

from __future__ import annotations

import os
import threading

import pytest
from botocore.exceptions import ClientError

from smlt.emulator.pool import Pool, ThrottledError
from tests.emulator.conftest import Account, until

SLEEPING = "import os, time\ndef handler(event, context):\n    time.sleep(event or 0)\n    return os.getpid()"


def test_a_timeout_kills_the_sandbox_and_the_next_invocation_is_cold(account: Account) -> None:
    name = account.deploy(SLEEPING, Timeout=1)
    before = account.invoke(name)["value"]
    answer = account.invoke(name, 30)
    assert answer["FunctionError"] == "Unhandled"
    assert answer["value"]["errorType"] == "Sandbox.Timedout"
    assert answer["value"]["errorMessage"].endswith("Task timed out after 1.00 seconds")
    assert before not in account.local.sandboxes
    assert account.invoke(name)["value"] != before


def test_a_handler_knows_the_time_that_is_left(account: Account) -> None:
    name = account.deploy("def handler(event, context): return context.get_remaining_time_in_millis()", Timeout=7)
    assert 5000 < account.invoke(name)["value"] <= 7000


def test_memory_above_the_limit_kills_the_sandbox(account: Account) -> None:
    source = "def handler(event, context):\n    global kept\n    kept = bytearray(event << 20)\n    import time; time.sleep(2)"
    name = account.deploy(source, MemorySize=128)
    answer = account.invoke(name, 300)
    assert answer["value"]["errorType"] == "Runtime.ExitError"
    assert answer["value"]["errorMessage"].endswith("Error: Runtime exited with error: signal: killed")
    assert account.local.invocations[-1].max_memory_mb > 128


def test_memory_of_children_counts(account: Account) -> None:
    source = (
        "import subprocess, sys\n"
        "def handler(event, context):\n"
        "    subprocess.run([sys.executable, '-S', '-c', 'import time; x = bytearray(300 << 20); time.sleep(20)'])\n"
    )
    answer = account.invoke(account.deploy(source, MemorySize=128))
    assert answer["value"]["errorMessage"].endswith("signal: killed")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="takes space without writing it")
def test_more_than_the_ephemeral_storage_ends_the_sandbox(account: Account) -> None:
    source = (
        "import os, time\n"
        "def handler(event, context):\n"
        "    with open(os.environ['TMPDIR'] + '/file', 'wb') as file:\n"
        "        os.posix_fallocate(file.fileno(), 0, 600 << 20)\n"
        "    time.sleep(20)\n"
    )
    answer = account.invoke(account.deploy(source, EphemeralStorage={"Size": 512}))
    assert answer["value"]["errorType"] == "Runtime.ExitError"
    assert "No space left on device" in answer["value"]["errorMessage"]


def test_reserved_concurrency_throttles(account: Account) -> None:
    name = account.deploy(SLEEPING)
    account.functions.put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=1)
    account.invoke(name)
    thread = threading.Thread(target=account.invoke, args=(name, 1))
    thread.start()
    until(lambda: account.local.busy(name) == 1)
    with pytest.raises(ClientError) as error:
        account.invoke(name)
    thread.join()
    response = error.value.response
    assert response["Error"]["Code"] == "TooManyRequestsException"
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 429
    assert response["Reason"] == "ReservedFunctionConcurrentInvocationLimitExceeded"
    assert "retry-after" in response["ResponseMetadata"]["HTTPHeaders"]
    account.invoke(name)


def test_reserving_nothing_switches_a_function_off(account: Account) -> None:
    name = account.deploy(SLEEPING)
    account.functions.put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=0)
    with pytest.raises(ClientError, match="TooManyRequestsException"):
        account.invoke(name)


def test_what_others_have_reserved_is_not_there_for_the_rest(account: Account) -> None:
    from smlt.emulator.functions import find_function

    name = account.deploy(SLEEPING)
    function = find_function(name, None, "us-east-1", "123456789012")
    pool = Pool(
        None,  # type: ignore[arg-type]
        account_limit=3,
        idle_s=1,
        current=lambda found: found,
        reserved=lambda region: 2,
    )
    unreserved = pool.enter(function)
    with pytest.raises(ThrottledError, match="ConcurrentInvocationLimitExceeded"):
        pool.enter(function)
    pool.leave(function, unreserved)
    pool.enter(function)
