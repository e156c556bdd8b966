"""`smlt deploy`, `smlt destroy` and `smlt policy` as a person uses them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cloud import NOTHING, REGION, Sandbox, sandbox

from smlt.cli import run


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    return sandbox(moto_url, monkeypatch, tmp_path)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line within this process: a new one would load boto3 for seconds each time."""
    monkeypatch.setattr("smlt.cli._end_in_order", list)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["smlt", *arguments])
        capsys.readouterr()
        code = run()
        return Done(code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("name", ["deploy", "destroy", "policy"])
def test_help_has_examples(name: str, command: Callable[..., Done]) -> None:
    shown = command(name, "--help")
    assert shown.returncode == 0
    assert f"\n    smlt {name}" in shown.stdout


def test_deploy_policy_and_destroy_from_beginning_to_end(aws: Sandbox, command: Callable[..., Done]) -> None:
    aws.request()  # writes the script and the layer
    deploy = ["deploy", "digits", "s3://bucket/team", "train.py", "digits-role", "--layer", "layer.zip", "--python", "3.12"]
    told = command(*deploy)
    assert (told.returncode, told.stdout) == (7, "")
    assert told.stderr == "smlt: there is no bucket bucket: give --create-bucket to have it made, or the name of another one\n"
    deploy += ["--create-bucket", "--create-role"]
    told = command(*deploy)
    assert (told.returncode, told.stderr) == (0, "")
    assert "create  function    digits" in told.stdout
    assert "digits is deployed: 6 changed" in told.stdout
    again = command(*deploy, "--json")
    rows = [json.loads(line) for line in again.stdout.splitlines()]
    assert {row["action"] for row in rows if row["event"] == "plan"} == {"keep"}
    assert (rows[-1]["event"], rows[-1]["changed"], rows[-1]["sent_bytes"]) == ("deployed", 0, 0)

    asked = command("destroy", "digits")
    assert (asked.returncode, "give --yes" in asked.stderr) == (2, True)
    told = command("destroy", "digits", "--yes")
    assert (told.returncode, told.stderr) == (0, "")
    assert aws.everything() == NOTHING
    told = command("destroy", "digits", "--yes")
    assert told.returncode == 0
    assert told.stdout == "there is nothing of digits to remove; what runs have left: --bucket BUCKET --data\n"


def test_policies_are_printed_without_asking_aws_when_the_account_is_given(
    command: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smlt.client.deployment.printing.Cloud", None)
    monkeypatch.setenv("AWS_REGION", "")  # put back afterwards
    where = ("--account", "123456789012", "--region", REGION)
    both = command("policy", "digits", "bucket", "digits-role", *where)
    assert set(json.loads(both.stdout)) == {"function", "deployer"}
    one = command("policy", "digits", "bucket", "--function", *where)
    assert json.loads(one.stdout) == json.loads(both.stdout)["function"]
    few = command("policy", "digits", "bucket", "r", "--deployer", "--for", "logs", *where)
    assert "logs:FilterLogEvents" in few.stdout
    assert "lambda:CreateFunction" not in few.stdout
    told = command("policy", "digits", "bucket", *where)
    assert (told.returncode, told.stderr) == (
        2,
        "smlt: give ROLE: the deployer's policy names it; or --function for the function's policy alone\n",
    )
