"""A run's memory is an alias: whatever happens while it is made, the function has its own memory afterwards."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import eventually, write_task
from functions import FUNCTION, Cloud, cloud

from smlt.client.executors import preparation
from smlt.client.executors.preparation import alias_with_memory, at_rest

JOB = ("--workers", 1, "--epochs", 1, "--global-batch-size", 16)
OWN_MB = 1769


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def deployed(script: Path) -> Iterator[Cloud]:
    """A change takes some time, in which there is no other."""
    with cloud(script, settle_s=0.5) as made:
        yield made


def memory(client: Any, alias: str | None = None) -> int:
    which = {"FunctionName": FUNCTION} if alias is None else {"FunctionName": FUNCTION, "Qualifier": alias}
    return int(client.get_function_configuration(**which)["MemorySize"])


def test_an_alias_follows_its_function_into_a_vpc(deployed: Cloud) -> None:
    client, ec2 = deployed.client("lambda"), deployed.client("ec2")
    alias_with_memory(client, FUNCTION, 512)
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="one", Description="one", VpcId=vpc)["GroupId"]
    for network in ({"SubnetIds": [subnet], "SecurityGroupIds": [group]}, {"SubnetIds": [], "SecurityGroupIds": []}):
        at_rest(client, FUNCTION)
        client.update_function_configuration(FunctionName=FUNCTION, VpcConfig=network)
        assert alias_with_memory(client, FUNCTION, 512) == "smlt-512mb"
        made = client.get_function_configuration(FunctionName=FUNCTION, Qualifier="smlt-512mb")
        assert made.get("VpcConfig", {}).get("SubnetIds", []) == network["SubnetIds"]


def test_ctrl_c_while_the_memory_is_changed_leaves_the_function_as_it_was(
    deployed: Cloud, script: Path, tmp_path: Path
) -> None:
    client = deployed.client("lambda")
    with deployed.running(script, *JOB, "--memory", 640, cwd=tmp_path) as run:
        assert eventually(lambda: memory(client) == 640)
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 130
        assert run.errors.read_text() == ""
    found = at_rest(client, FUNCTION)
    assert (found["MemorySize"], found["Description"]) == (OWN_MB, "")


def test_runs_with_different_memories_may_begin_at_the_same_time(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    client, folders = deployed.client("lambda"), [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with (
        deployed.running(script, *JOB, "--memory", 700, cwd=folders[0]) as one,
        deployed.running(script, *JOB, "--memory", 800, cwd=folders[1]) as two,
    ):
        assert [run.finish() for run in (one, two)] == [0, 0], one.errors.read_text() + two.errors.read_text()
    assert [memory(client, alias) for alias in (None, "smlt-700mb", "smlt-800mb")] == [OWN_MB, 700, 800]


def test_the_memory_that_a_killed_client_has_left_is_put_right(deployed: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    client = deployed.client("lambda")
    at_rest(client, FUNCTION)
    lent = f"smlt: 900 MB for a moment, {OWN_MB} MB of its own"
    client.update_function_configuration(FunctionName=FUNCTION, MemorySize=900, Description=lent)
    monkeypatch.setattr(preparation, "LENT_S", 0.2)
    found = at_rest(client, FUNCTION)
    assert (found["MemorySize"], found["Description"]) == (OWN_MB, "")
