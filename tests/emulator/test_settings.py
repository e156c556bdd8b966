"""Settings of an emulator of its own: how long a handler may load, how long a sandbox is kept, one at a time."""

from __future__ import annotations

import venv
from pathlib import Path

import pytest

from smlt.emulator import LambdaLocal
from smlt.errors import ConfigError
from tests.emulator.conftest import Account, until


def test_loading_that_takes_too_long_begins_anew_within_the_timeout() -> None:
    with LambdaLocal(init_timeout_s=0.5) as local:
        account = Account(local)
        name = account.deploy("import time; time.sleep(1)\ndef handler(event, context): return 'loaded'", Timeout=10)
        assert account.invoke(name)["value"] == "loaded"
        assert any("Phase: init\tStatus: timeout" in message for message in account.messages(name))
        slow = account.deploy("import time; time.sleep(20)\ndef handler(event, context): pass", Timeout=1)
        assert account.invoke(slow)["value"]["errorType"] == "Sandbox.Timedout"


def test_who_does_not_wait_for_a_change_is_refused() -> None:
    with LambdaLocal(settle_s=1) as local:
        account = Account(local)
        functions, conflict = account.functions, account.functions.exceptions.ResourceConflictException
        name = account.deploy("def handler(event, context): return 1")
        assert functions.get_function_configuration(FunctionName=name)["State"] == "Pending"
        with pytest.raises(conflict, match="state: Pending"):
            account.invoke(name)
        functions.get_waiter("function_active_v2").wait(FunctionName=name)
        assert account.invoke(name)["value"] == 1
        assert functions.update_function_configuration(FunctionName=name, Timeout=9)["LastUpdateStatus"] == "InProgress"
        with pytest.raises(conflict, match="update is in progress"):
            functions.update_function_configuration(FunctionName=name, Timeout=8)
        assert account.invoke(name)["value"] == 1
        functions.get_waiter("function_updated_v2").wait(FunctionName=name)
        functions.update_function_configuration(FunctionName=name, Timeout=8)


def test_an_idle_sandbox_ends_and_an_emulator_begins_empty() -> None:
    with LambdaLocal(idle_s=0.1) as local:
        account = Account(local)
        name = account.deploy("def handler(event, context): return 1")
        account.invoke(name)
        until(lambda: not local.sandboxes)
    with LambdaLocal() as local:
        assert Account(local).functions.list_functions()["Functions"] == []


def test_a_second_emulator_in_a_process_a_taken_port_and_a_missing_environment_are_refused() -> None:
    with LambdaLocal() as local:
        with pytest.raises(ConfigError, match="leave that one first"), LambdaLocal():
            pass
        port = int(local.endpoint_url.rpartition(":")[2])
    with LambdaLocal(port):
        pass
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen"):
        LambdaLocal(taken.getsockname()[1]).__enter__()
    with LambdaLocal():  # the one that failed has left nothing behind
        pass


def test_an_environment_that_cannot_stand_for_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Python environment"):
        LambdaLocal(images={"image:1": tmp_path / "none"})
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    with pytest.raises(ConfigError, match="has no awslambdaric"):
        LambdaLocal(images={"image:1": tmp_path / "bare"})
