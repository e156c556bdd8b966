"""A user who has the printed policy and nothing more goes all the way: deploy, train, logs, bill, stop, destroy.

The emulator enforces policies and notes what was asked: the deployer's policy and the function's hold just that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import smlt, write_task
from functions import BUCKET, FUNCTION, IMAGE, ROLE, Cloud

from smlt.emulator import LambdaLocal

JOB = ("--workers", 2, "--epochs", 5, "--global-batch-size", 16)
USER = "trainee"
MADE = ("--create-bucket", "--create-role", "--image", IMAGE)

NOT_HERE = {
    # Lambda asks for the user's rights to these by itself: no request shows them.
    *("ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:GetRepositoryPolicy", "ecr:SetRepositoryPolicy"),
    "lambda:ListTags",
    # Of a function from a zip, with a layer: deployment/test_policies.py.
    *("lambda:DeleteLayerVersion", "lambda:GetLayerVersion", "lambda:PublishLayerVersion", "lambda:UpdateFunctionCode"),
    # Of uploads that are cut off: tests/store/test_s3.py.
    *("s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"),
}


@pytest.fixture
def local() -> Iterator[LambdaLocal]:
    with LambdaLocal(authorize=True) as made:
        yield made


def policies(cloud: Cloud, cwd: Path) -> dict[str, Any]:
    """What `smlt policy` prints."""
    done = smlt("policy", FUNCTION, BUCKET, ROLE, *MADE, cwd=cwd, **cloud.environment)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def actions(policy: dict[str, Any]) -> set[str]:
    return {action for statement in policy["Statement"] for action in statement["Action"]}


@pytest.mark.timeout(300)  # ten commands and four runs, one after the other
def test_the_printed_policies_are_what_it_takes_and_no_more(local: LambdaLocal, tmp_path: Path) -> None:
    cloud, script = Cloud(local), write_task(tmp_path, "\n        time.sleep(0.02)\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "large").write_bytes(bytes(20_000_000))  # in parts
    printed = policies(cloud, tmp_path)
    iam = cloud.client("iam")
    iam.create_user(UserName=USER)
    iam.put_user_policy(UserName=USER, PolicyName="printed", PolicyDocument=json.dumps(printed["deployer"]))
    key = iam.create_access_key(UserName=USER)["AccessKey"]
    cloud.environment |= {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    local.clear_requests()

    def succeeds(*arguments: object) -> None:
        done = smlt(*arguments, cwd=tmp_path, **cloud.environment)
        assert (done.returncode, done.stderr) == (0, ""), arguments

    cloud.deploy(script)
    for memory in (512, 512, 600):
        name = f"run-{memory}-{len(list(tmp_path.glob('smlt-runs/*')))}"
        where = ("--on", "lambda", "--function", FUNCTION, "--memory", memory, "--name", name)
        succeeds("train", script, *JOB, *where, "--data", tmp_path / "data")
    cloud.deploy(script, "--timeout", 800)  # the aliases are older than the function now
    succeeds("train", script, *JOB, "--on", "lambda", "--function", FUNCTION, "--memory", 600, "--name", "again")
    succeeds("logs", "again")
    succeeds("bill", "again", "--from-log")
    succeeds("stop", "again")
    succeeds("destroy", FUNCTION, "--yes", "--data")
    asked: dict[str, set[str]] = {}
    for request in local.requests:
        asked.setdefault(request.principal, set()).add(request.action)
    asked[USER] -= {"sts:GetCallerIdentity"}  # everybody may
    assert asked[USER] <= actions(printed["deployer"])
    assert actions(printed["deployer"]) - asked[USER] == NOT_HERE
    assert asked[ROLE] <= actions(printed["function"])
    # The emulator writes the log with the role's rights, but not by requests; no worker's upload was cut off.
    assert actions(printed["function"]) - asked[ROLE] == {
        *("logs:CreateLogStream", "logs:PutLogEvents"),
        "s3:AbortMultipartUpload",
    }
