"""Later commands find a deployment in AWS, by the function's name alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from cloud import Sandbox, sandbox

from smlt.client.deployment.lookup import Deployment, find_deployment
from smlt.errors import DeployError

STORE = "rediss://store.example?password_secret=aws-secretsmanager://store"


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    return sandbox(moto_url, monkeypatch, tmp_path)


def test_a_deployment_is_found_as_it_was_made(aws: Sandbox) -> None:
    done = aws.deploy(store=STORE, memory_mb=2048, subnets=("subnet-1",), security_groups=("sg-1",))
    aws.client("lambda").put_function_concurrency(FunctionName="digits", ReservedConcurrentExecutions=7)
    assert find_deployment("digits") == Deployment(
        function="digits",
        arn=done.arn,
        memory_mb=2048,
        tmp_mb=512,
        timeout_s=900,
        arch="x86_64",
        runtime="python3.12",
        handler="smlt.worker.handler.handler",
        package_type="Zip",
        object_store="s3://bucket/team",
        store=STORE,
        vpc=True,
        reserved_concurrency=7,
        log_group="/aws/lambda/digits",
    )


def test_what_is_not_there_or_not_ours_is_told_with_the_command_that_makes_it(aws: Sandbox) -> None:
    with pytest.raises(DeployError, match=r"there is no function digits .*: smlt deploy digits BUCKET PACKAGE ROLE$"):
        find_deployment("digits")
    aws.deploy()
    aws.client("lambda").update_function_configuration(FunctionName="digits", Environment={"Variables": {}})
    with pytest.raises(DeployError, match=r"has no SMLT_OBJECT_STORE\): smlt deploy digits"):
        find_deployment("digits")
