"""The request log, and IAM policies enforced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from smlt.emulator import LambdaLocal
from smlt.emulator.functions import RUNTIME
from tests.emulator.conftest import Account

RETURNING = "def handler(event, context): return 1"
LISTING = """
import boto3
def handler(event, context):
    return [item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket="a-bucket", Prefix=event)["Contents"]]
"""


@pytest.fixture(scope="module")
def local() -> Iterator[LambdaLocal]:
    with LambdaLocal(authorize=True) as running:
        yield running


@pytest.fixture(scope="module")
def bucket(account: Account) -> str:
    s3 = account.client("s3")
    s3.create_bucket(Bucket="a-bucket")
    s3.put_object(Bucket="a-bucket", Key="mine/one", Body=b"1")
    s3.put_object(Bucket="a-bucket", Key="other/two", Body=b"2")
    return "a-bucket"


def user(account: Account, name: str, *statements: dict[str, Any]) -> dict[str, str]:
    """Credentials of a new user with these statements."""
    iam = account.client("iam")
    iam.create_user(UserName=name)
    if statements:
        policy = json.dumps({"Version": "2012-10-17", "Statement": list(statements)})
        iam.put_user_policy(UserName=name, PolicyName="inline", PolicyDocument=policy)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}


def allow(action: Any, resource: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


def denied(call: Any, **arguments: Any) -> str:
    with pytest.raises(ClientError) as error:
        call(**arguments)
    assert error.value.response["Error"]["Code"] in ("AccessDenied", "AccessDeniedException", "403")
    return str(error.value.response["Error"]["Message"])


def test_unknown_keys_are_refused(account: Account, bucket: str) -> None:
    stranger = {"aws_access_key_id": "AKIA0000000000000000", "aws_secret_access_key": "x"}
    for service, call, code in (
        ("s3", "list_buckets", "InvalidAccessKeyId"),
        ("lambda", "list_functions", "UnrecognizedClientException"),
        ("iam", "list_roles", "InvalidClientTokenId"),
        ("logs", "describe_log_groups", "UnrecognizedClientException"),
    ):
        with pytest.raises(ClientError) as error:
            getattr(account.client(service, **stranger), call)()
        assert error.value.response["Error"]["Code"] == code


def test_invoking_needs_permission_for_that_function(account: Account) -> None:
    name, other = account.deploy(RETURNING), account.deploy(RETURNING)
    arn = f"arn:aws:lambda:us-east-1:123456789012:function:{name}"
    keys = user(account, "invoker", allow("lambda:InvokeFunction", arn))
    functions = account.client("lambda", **keys)
    assert functions.invoke(FunctionName=name)["StatusCode"] == 200
    message = denied(functions.invoke, FunctionName=other)
    assert "user/invoker is not authorized to perform: lambda:InvokeFunction on resource: arn:aws:lambda" in message
    denied(functions.get_function, FunctionName=name)


def test_objects_prefixes_and_denials_count(account: Account, bucket: str) -> None:
    keys = user(
        account,
        "reader",
        allow("s3:GetObject", f"arn:aws:s3:::{bucket}/*"),
        {"Effect": "Deny", "Action": "s3:Get*", "Resource": f"arn:aws:s3:::{bucket}/other/*"},
        allow("s3:ListBucket", f"arn:aws:s3:::{bucket}", Condition={"StringLike": {"s3:prefix": ["mine/*"]}}),
    )
    s3 = account.client("s3", **keys)
    assert s3.get_object(Bucket=bucket, Key="mine/one")["Body"].read() == b"1"
    denied(s3.get_object, Bucket=bucket, Key="other/two")
    denied(s3.head_object, Bucket=bucket, Key="other/two")
    denied(s3.put_object, Bucket=bucket, Key="mine/one", Body=b"")
    assert s3.list_objects_v2(Bucket=bucket, Prefix="mine/")["KeyCount"] == 1
    denied(s3.list_objects_v2, Bucket=bucket, Prefix="other/")


def test_creating_a_function_needs_to_pass_its_role_and_to_read_its_code(account: Account, bucket: str) -> None:
    creating = allow("lambda:CreateFunction", "arn:aws:lambda:*:*:function:*")
    passing = allow("iam:PassRole", account.role, Condition={"StringEquals": {"iam:PassedToService": "lambda.amazonaws.com"}})
    settings = {"FunctionName": "f", "Runtime": RUNTIME, "Handler": "main.handler", "Role": account.role}
    code = {"S3Bucket": bucket, "S3Key": "mine/one"}
    one = account.client("lambda", **user(account, "one", creating))
    assert "iam:PassRole" in denied(one.create_function, Code=code, **settings)
    two = account.client("lambda", **user(account, "two", creating, passing))
    assert "s3:GetObject" in denied(two.create_function, Code=code, **settings)


def test_a_function_in_a_vpc_needs_a_role_that_makes_network_interfaces(account: Account) -> None:
    vpc = {"SubnetIds": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    with pytest.raises(ClientError, match="CreateNetworkInterface on EC2"):
        account.deploy(RETURNING, VpcConfig=vpc)
    trust = account.client("iam").get_role(RoleName="worker")["Role"]["AssumeRolePolicyDocument"]
    role = account.client("iam").create_role(RoleName="in-vpc", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    managed = "arn:aws:iam::aws:policy/service-role/AWSLambdaVPCAccessExecutionRole"
    account.client("iam").attach_role_policy(RoleName="in-vpc", PolicyArn=managed)
    account.deploy(RETURNING, VpcConfig=vpc, Role=role)


def test_what_is_tagged_when_it_is_made_needs_the_right_to_tag(account: Account) -> None:
    iam = account.client("iam", **user(account, "maker", allow("iam:CreateRole")))
    arguments = {"RoleName": "tagged", "AssumeRolePolicyDocument": json.dumps({"Version": "2012-10-17", "Statement": []})}
    assert "iam:TagRole" in denied(iam.create_role, Tags=[{"Key": "a", "Value": "b"}], **arguments)


def test_a_functions_role_and_a_managed_policy_are_enforced(account: Account, bucket: str) -> None:
    iam, name = account.client("iam"), account.deploy(LISTING)
    answer = account.invoke(name, "mine/")
    assert "AccessDenied" in answer["value"]["errorMessage"]
    policy = {"Version": "2012-10-17", "Statement": allow("s3:List*", f"arn:aws:s3:::{bucket}")}
    arn = iam.create_policy(PolicyName="listing", PolicyDocument=json.dumps(policy))["Policy"]["Arn"]
    iam.attach_role_policy(RoleName="worker", PolicyArn=arn)
    assert account.invoke(name, "mine/")["value"] == ["mine/one"]
    assert ("s3", "s3:ListBucket", "worker", f"arn:aws:s3:::{bucket}") in account.local.requests


def test_logs_are_written_only_when_the_role_may(account: Account) -> None:
    name = account.deploy(RETURNING)
    account.invoke(name)
    groups = account.client("logs").describe_log_groups(logGroupNamePrefix=f"/aws/lambda/{name}")["logGroups"]
    assert groups == []
    statement = allow(["logs:CreateLogStream", "logs:PutLogEvents"], f"arn:aws:logs:*:*:log-group:/aws/lambda/{name}:*")
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    account.client("iam").put_role_policy(RoleName="worker", PolicyName="logs", PolicyDocument=policy)
    account.invoke(name)
    assert account.messages(name)
    other = account.deploy(RETURNING)
    managed = "arn:aws:iam::aws:policy/service-role/AWSLambdaBasicExecutionRole"
    account.client("iam").attach_role_policy(RoleName="worker", PolicyArn=managed)
    account.invoke(other)
    assert account.messages(other)


def test_requests_are_logged_with_action_principal_and_resource(account: Account, bucket: str) -> None:
    account.local.clear_requests()
    s3 = account.client("s3")
    upload = s3.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    s3.abort_multipart_upload(Bucket=bucket, Key="k", UploadId=upload)
    s3.head_bucket(Bucket=bucket)
    account.client("sts").get_caller_identity()
    account.client("logs").describe_log_groups()
    admin = "lambda-local-admin"
    assert account.local.requests == [
        ("s3", "s3:PutObject", admin, f"arn:aws:s3:::{bucket}/k"),
        ("s3", "s3:AbortMultipartUpload", admin, f"arn:aws:s3:::{bucket}/k"),
        ("s3", "s3:ListBucket", admin, f"arn:aws:s3:::{bucket}"),
        ("sts", "sts:GetCallerIdentity", admin, ""),
        ("logs", "logs:DescribeLogGroups", admin, "arn:aws:logs:us-east-1:123456789012:log-group:*"),
    ]
