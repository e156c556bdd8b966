"""`smlt lambda-local`: what it prints, and that nothing is left of it however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from smlt.emulator.functions import RUNTIME
from tests.emulator.conftest import TRUST, until, zipped


class Command:
    """The command in a temporary folder of its own, with a function whose sandbox is warm and frozen."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "smlt", "lambda-local", *arguments],
            env={**environment, "TMPDIR": str(folder), "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def deploy(self, endpoint_url: str) -> Any:
        settings: dict[str, Any] = {
            "region_name": "us-east-1",
            "endpoint_url": endpoint_url,
            "aws_access_key_id": "test",
            "aws_secret_access_key": "test",
        }
        role = boto3.client("iam", **settings).create_role(RoleName="r", AssumeRolePolicyDocument=json.dumps(TRUST))
        functions = boto3.client("lambda", **settings)
        functions.create_function(
            FunctionName="f",
            Runtime=RUNTIME,
            Handler="main.handler",
            Role=role["Role"]["Arn"],
            Code={"ZipFile": zipped(main="import os\ndef handler(event, context): return os.getpid()")},
        )
        return functions


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    started = Command(tmp_path, "--json", "--settle", "0")
    yield started
    started.process.kill()
    started.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(command: Command, number: signal.Signals) -> None:
    functions = command.deploy(json.loads(command.line())["endpoint_url"])
    pid = int(functions.invoke(FunctionName="f", Payload=b"{}")["Payload"].read())
    assert json.loads(command.line())["status"] == "ok"
    sandbox = psutil.Process(pid)
    until(lambda: sandbox.status() == psutil.STATUS_STOPPED)
    assert list(command.folder.iterdir())
    command.process.send_signal(number)
    code = command.process.wait(20)
    assert code == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    until(lambda: not sandbox.is_running() or sandbox.status() == psutil.STATUS_ZOMBIE)
    until(lambda: not list(command.folder.iterdir()))
    if number != signal.SIGKILL:
        assert command.process.stderr is not None
        assert command.process.stderr.read() == ""


def test_it_prints_the_endpoint_what_to_export_and_a_line_for_each_invocation(tmp_path: Path) -> None:
    command = Command(tmp_path, "--settle", "0")
    try:
        endpoint = command.line()
        assert endpoint.startswith("http://127.0.0.1:")
        functions = command.deploy(endpoint)
        functions.invoke(FunctionName="f", Payload=b"{}")
        assert "  f:$LATEST  " in command.line()
    finally:
        command.process.terminate()
        _, explained = command.process.communicate(timeout=20)
    assert command.process.returncode == 0
    (exports,) = re.findall("export (.*)", explained)
    assert dict(one.split("=", 1) for one in exports.split()) == {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--throttle", "2"], "--throttle is a fraction from 0 to 1"),
        (["--kill-after", "5"], "--kill-after is a range of seconds"),
        (["--kill-after", "5:1"], "--kill-after is a range of seconds"),
        (["--retry-delays", "soon"], "--retry-delays soon"),
        (["--image", "uri"], "give URI=PREFIX"),
        (["--image", "uri=/nonexistent"], "no Python environment"),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from smlt import cli

    before, sys.argv = sys.argv, ["smlt", "lambda-local", *arguments]
    try:
        assert cli.run() == 2
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    assert captured.err.startswith("smlt: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
