"""What goes wrong on purpose: throttling, duplicates, killed sandboxes, slow starts, all from one seed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from smlt.emulator import Faults
from smlt.emulator.faults import Dice
from smlt.errors import ConfigError
from tests.emulator.conftest import Account, until

SLEEPING = "import time\ndef handler(event, context):\n    time.sleep(event)\n    return context.aws_request_id"


@pytest.fixture
def faults(account: Account) -> Iterator[Faults]:
    yield account.local.faults
    vars(account.local.faults).update(vars(Faults()))


def throttled(account: Account, name: str) -> bool:
    try:
        account.invoke(name, 0)
    except account.functions.exceptions.TooManyRequestsException:
        return True
    return False


def test_a_fraction_of_the_invocations_is_throttled_as_the_seed_says(account: Account, faults: Faults) -> None:
    name = account.deploy(SLEEPING)
    before = account.local.injected["throttle"]
    expected = Dice(Faults(throttle=0.5), seed=0)
    faults.throttle = 0.5
    refused = [throttled(account, name) for _ in range(20)]
    assert refused == [expected.throttles() for _ in range(20)]
    assert account.local.injected["throttle"] - before == sum(refused)


def test_a_duplicate_runs_at_the_same_time_with_the_same_request_id(account: Account, faults: Faults) -> None:
    name = account.deploy(SLEEPING)
    faults.duplicate = 1
    request_id = account.invoke(name, 0.5)["value"]
    twins = until(lambda: [r for r in account.local.invocations if r.request_id == request_id and r.function == name][1:])
    both = [record for record in account.local.invocations if record.request_id == request_id]
    assert len(twins) == 1
    assert sorted(record.duplicate for record in both) == [False, True]
    assert len({record.log_stream for record in both}) == 2
    assert account.local.injected["duplicate"] >= 1


def test_a_killed_sandbox_is_an_exit_error(account: Account, faults: Faults) -> None:
    name = account.deploy(SLEEPING)
    faults.kill, faults.kill_after_s = 1, (0.1, 0.3)
    before = account.local.injected["kill"]
    answer = account.invoke(name, 15)
    assert answer["value"]["errorType"] == "Runtime.ExitError"
    assert answer["value"]["errorMessage"].endswith("signal: killed")
    assert account.local.injected["kill"] == before + 1


def test_an_invocation_that_ends_before_its_moment_is_not_killed(account: Account, faults: Faults) -> None:
    name = account.deploy(SLEEPING)
    faults.kill, faults.kill_after_s = 1, (30, 40)
    before = account.local.injected["kill"]
    with ThreadPoolExecutor(2) as threads:
        assert all("FunctionError" not in answer for answer in threads.map(lambda _: account.invoke(name, 0), range(4)))
    assert account.local.injected["kill"] == before


def test_a_cold_start_takes_longer_when_asked_to(account: Account, faults: Faults) -> None:
    name = account.deploy(SLEEPING)
    faults.cold_start_s = 0.5
    account.invoke(name, 0)
    account.invoke(name, 0)
    cold, warm = [record for record in account.local.invocations if record.function == name]
    assert cold.init_ms is not None
    assert cold.init_ms >= 500
    assert warm.init_ms is None
    assert account.local.injected["cold_start"] == 1


@pytest.mark.parametrize(
    "faults_", [Faults(throttle=1.1), Faults(kill=-0.1), Faults(kill_after_s=(3, 1)), Faults(cold_start_s=-1)]
)
def test_faults_that_cannot_be_meant_are_refused(faults_: Faults) -> None:
    with pytest.raises(ConfigError):
        Dice(faults_, seed=0)
