"""The policies that `smlt policy` prints: what a deployment asks AWS for is allowed, and nothing that it does not ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from cfnlint.api import ManualArgs, lint
from cloud import ACCOUNT, NOTHING, REGION, Recorder, Sandbox, in_parts, sandbox

from smlt.client.deployment.names import Account, Place, RoleName
from smlt.client.deployment.policies import Resources, deployer_policy, function_policy, trust_policy, trusts_lambda
from smlt.client.deployment.request import store_secrets
from smlt.client.deployment.rights import COMMANDS, FREE, RIGHTS
from smlt.errors import DeployError

PLACE, ROLE, ALL = Place("bucket", "team"), RoleName("digits-role"), ("create_role", "create_bucket", "vpc", "image")
#: I3510 compares actions with resources.
CHECKS = ManualArgs(regions=[REGION], include_checks=["I"])
WHERE = Account(ACCOUNT, REGION)
RESOURCES = Resources("digits", PLACE, ROLE, WHERE, "123456789012.dkr.ecr.eu-west-1.amazonaws.com/smlt:1")


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    return sandbox(moto_url, monkeypatch, tmp_path)


def resource_of(name: str, asked: dict[str, Any]) -> str:
    """The ARN of what a request is about."""
    service = name.partition(".")[0]
    if service == "s3":
        key = asked.get("Key") or ("team/.deploy/digits/x" if name == "s3.DeleteObjects" else "")
        return f"arn:aws:s3:::{asked['Bucket']}{'/' if key else ''}{key}"
    if service == "iam":
        return f"arn:aws:iam::{ACCOUNT}:role{asked.get('Path', '/')}{asked['RoleName']}"
    if service == "logs":
        group = asked.get("logGroupName") or asked.get("logGroupNamePrefix")
        return str(asked.get("resourceArn") or f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:{group}")
    if "LayerName" in asked:
        version = f":{asked['VersionNumber']}" if "VersionNumber" in asked else ""
        return f"arn:aws:lambda:{REGION}:{ACCOUNT}:layer:{asked['LayerName']}{version}"
    return str(asked.get("Resource") or f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{asked.get('FunctionName')}")


def allows(policy: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    """Whether the policy lets the action on the resource: wildcards, and the conditions that SMLT writes."""
    for statement in policy["Statement"]:
        on = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        conditions = [pair for operator in statement.get("Condition", {}).values() for pair in operator.items()]
        if (
            action in statement["Action"]
            and any(fnmatchcase(resource, pattern) for pattern in on)
            and all(
                key in context
                and any(fnmatchcase(context[key], one) for one in (values if isinstance(values, list) else [values]))
                for key, values in conditions
            )
        ):
            return True
    return False


def actions_in(policy: dict[str, Any]) -> set[str]:
    return {action for statement in policy["Statement"] for action in statement["Action"]}


def asked_for(recorder: Recorder) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Every action that the recorded requests need, on what, in which context."""
    for name, asked in recorder.calls:
        if name in FREE:
            continue
        rows = [right for right in RIGHTS if name in right.operations]
        assert rows, f"the table of rights does not know {name}"
        for right in rows:
            context = {"s3:prefix": asked["Prefix"]} if "Prefix" in asked else {}
            yield right.action, resource_of(name, asked), context


def test_the_deployers_policy_allows_what_deploy_and_destroy_ask_for_and_no_more(
    aws: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def deploy(**changes: Any) -> None:
        aws.deploy(**changes)
        calls.extend(aws.recorder.calls)

    deploy()
    deploy(log_days=30, memory_mb=3008)
    for module in ("upload", "deploy"):
        monkeypatch.setattr(f"smlt.client.deployment.{module}.DIRECT_BYTES", 100)
    (aws.folder / "model.py").write_text("import math\n")
    in_parts(monkeypatch)
    changed = str(aws.layer(name="other.zip", text="# changed"))
    aws.recorder.faults["s3.UploadPart"] = [(403, "AccessDenied", "no")]
    with pytest.raises(DeployError, match="AccessDenied"):
        aws.deploy(layer=changed)
    deploy(layer=changed)  # goes on with the upload
    aws.client("s3").create_multipart_upload(Bucket="bucket", Key="team/.deploy/digits/package-x.zip")
    aws.destroy()
    assert aws.everything() == NOTHING
    calls.extend(aws.recorder.calls)
    aws.recorder.faults["lambda.PutFunctionEventInvokeConfig"] = [(403, "AccessDenied", "no")]
    with pytest.raises(DeployError, match="AccessDenied"):
        aws.deploy()  # taking back needs rights too
    calls.extend(aws.recorder.calls)
    aws.recorder.calls = calls

    policy, used = deployer_policy(RESOURCES, ("deploy", "destroy"), ("create_role", "create_bucket")), set()
    for action, resource, context in asked_for(aws.recorder):
        assert allows(policy, action, resource, context), f"{action} on {resource} in {context}"
        used.add(action)
    asked = {name for name, _ in calls}
    implied = {right.action for right in RIGHTS if asked & set(right.implied_by)}
    assert actions_in(policy) - used - implied == set()


@pytest.mark.parametrize(
    ("action", "resource", "context"),
    [
        ("lambda:UpdateFunctionCode", f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:other", {}),
        ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/admin", {"iam:PassedToService": "lambda.amazonaws.com"}),
        ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/digits-role", {"iam:PassedToService": "ec2.amazonaws.com"}),
        ("s3:GetObject", "arn:aws:s3:::bucket/other/x", {}),
        ("s3:ListBucket", "arn:aws:s3:::bucket", {"s3:prefix": "other/"}),
        ("s3:ListBucket", "arn:aws:s3:::bucket", {}),
        ("s3:DeleteBucket", "arn:aws:s3:::another", {}),
        ("logs:DeleteLogGroup", f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/lambda/other", {}),
    ],
)
def test_the_deployer_may_do_nothing_to_what_is_not_of_this_deployment(
    action: str, resource: str, context: dict[str, str]
) -> None:
    assert not allows(deployer_policy(RESOURCES, COMMANDS, ALL), action, resource, context)


def test_rights_that_an_option_needs_are_there_only_with_it() -> None:
    without = actions_in(deployer_policy(RESOURCES, COMMANDS))
    for option, action in (
        ("create_role", "iam:CreateRole"),
        ("create_bucket", "s3:CreateBucket"),
        ("vpc", "ec2:DescribeSubnets"),
        ("image", "ecr:BatchGetImage"),
    ):
        assert action not in without
        assert action in actions_in(deployer_policy(RESOURCES, COMMANDS, [option]))
    assert actions_in(deployer_policy(RESOURCES, ("logs",))) == {"lambda:GetFunction", "logs:FilterLogEvents"}


def test_policies_are_what_aws_takes() -> None:
    """cfn-lint knows every action of IAM, and on which resources each can be allowed."""
    secrets = store_secrets("redis://h?password_secret=aws-ssm://a/b") + store_secrets("aws-secretsmanager://c")
    function = function_policy("digits", PLACE, WHERE, secrets, vpc=True, kms_key=WHERE.arn("kms", "key/1"))
    deployer = deployer_policy(RESOURCES, COMMANDS, ALL)
    found = lint(json.dumps(template(function, deployer)), config=CHECKS)
    assert [f"{one.rule.id}: {one.message}" for one in found] == []
    # https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html, without white space
    assert len(json.dumps(deployer, separators=(",", ":"))) <= 6144
    assert len(json.dumps(function, separators=(",", ":"))) <= 10240
    deployer["Statement"][0]["Action"] = ["lambda:NoSuchAction", "s3:GetObject"]
    found = lint(json.dumps(template(function, deployer)), config=CHECKS)
    assert {"W3037", "I3510"} <= {one.rule.id for one in found}  # both checks can fail


def template(function: dict[str, Any], deployer: dict[str, Any]) -> dict[str, Any]:
    role = {
        "AssumeRolePolicyDocument": trust_policy(),
        "Policies": [{"PolicyName": "smlt-digits", "PolicyDocument": function}],
    }
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Resources": {
            "Role": {"Type": "AWS::IAM::Role", "Properties": role},
            "Deployer": {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": deployer}},
        },
    }


def test_a_store_secret_is_the_only_one_that_the_function_reads() -> None:
    for store, action, resource in (
        ("redis://h?password_secret=aws-secretsmanager://a/b%3Fkey=x", "secretsmanager:GetSecretValue", "secret:a/b-??????"),
        ("rediss://h?password_secret=aws-ssm:///a/b", "ssm:GetParameter", "parameter/a/b"),
        ("aws-ssm://url", "ssm:GetParameter", "parameter/url"),
    ):
        policy = function_policy("digits", PLACE, WHERE, store_secrets(store))
        statement = next(statement for statement in policy["Statement"] if statement["Action"] == [action])
        assert statement["Resource"].endswith(f":{REGION}:{ACCOUNT}:{resource}")
    elsewhere = store_secrets("redis://h?password_secret=aws-ssm://a%3Fregion=us-east-2")
    assert f"ssm:us-east-2:{ACCOUNT}:parameter/a" in json.dumps(function_policy("digits", PLACE, WHERE, elsewhere))
    arn = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:store-AbCdEf"
    assert arn in json.dumps(function_policy("digits", PLACE, WHERE, store_secrets(f"aws-secretsmanager://{arn}")))


def test_trust_in_lambda_is_recognized() -> None:
    assert trusts_lambda(trust_policy())
    for principal, action, trusts in (
        ({"Service": ["ec2.amazonaws.com", "lambda.amazonaws.com"]}, ["sts:AssumeRole", "sts:TagSession"], True),
        ({"Service": "edgelambda.amazonaws.com"}, "sts:AssumeRole", False),
        ({"AWS": f"arn:aws:iam::{ACCOUNT}:root"}, "sts:AssumeRole", False),
        ({"Service": "lambda.amazonaws.com"}, "sts:TagSession", False),
    ):
        assert trusts_lambda({"Statement": {"Effect": "Allow", "Principal": principal, "Action": action}}) is trusts
    denied = {"Effect": "Deny", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}
    assert not trusts_lambda({"Statement": [denied]})
