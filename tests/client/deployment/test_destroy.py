"""`smlt destroy` removes what `smlt deploy` has made, and nothing else. moto stands in for AWS."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from cloud import NOTHING, Sandbox, sandbox

from smlt.client.deployment.names import Place, RoleName
from smlt.errors import ConfigError, DeployError


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    return sandbox(moto_url, monkeypatch, tmp_path)


def put(aws: Sandbox, *keys: str, bucket: str = "bucket") -> None:
    for key in keys:
        aws.client("s3").put_object(Bucket=bucket, Key=key, Body=io.BytesIO(b"12345"))


def test_destroy_leaves_nothing_of_a_deployment_and_finds_nothing_the_next_time(
    aws: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smlt.client.deployment.upload.DIRECT_BYTES", 100)
    aws.deploy()
    aws.deploy(layer=str(aws.layer(name="other.zip", text="# changed")))
    aws.client("lambda").publish_version(FunctionName="digits")
    aws.client("s3").create_multipart_upload(Bucket="bucket", Key="team/.deploy/digits/package-x.zip")
    assert aws.everything()["uploads"]
    assert aws.destroy() == 6
    assert aws.everything() == NOTHING
    assert aws.destroy() == 0
    assert aws.recorder.writes == []
    aws.deploy()  # and all can be made again
    assert set(aws.actions().values()) == {"create"}


def test_a_dry_run_and_a_no_remove_nothing(aws: Sandbox) -> None:
    aws.deploy()
    before = aws.everything()
    assert aws.destroy(dry_run=True) == 5
    assert aws.recorder.writes == []
    with pytest.raises(ConfigError, match="nothing was removed"):
        aws.destroy(answer=False)
    assert aws.everything() == before


def test_runs_go_only_when_asked_and_files_of_others_never(aws: Sandbox) -> None:
    aws.deploy()
    runs = ("team/one/code/train.py", "team/one/checkpoints/3/model", "team/two/data/x", "team/two/snapshots/1")
    others = ("team/notes.txt", "team/one/report/x", "other/one/code/train.py", "team/.deploy/second/package-1.zip")
    put(aws, *runs, *others)
    aws.client("s3").create_multipart_upload(Bucket="bucket", Key="team/one/data/y")
    assert aws.destroy(keep_logs=True) == 3  # the bucket is not empty
    left = aws.everything()
    assert left["objects"] == sorted(f"bucket/{key}" for key in (*runs, *others))
    assert left["uploads"] == ["bucket/team/one/data/y"]
    assert any("is not empty and stays" in row["text"] for row in aws.rows if row["event"] == "note")
    # The function has gone: the log group's tags lead to the bucket.
    aws.destroy(data=True, keep_logs=True)
    left = aws.everything()
    assert left["objects"] == sorted(f"bucket/{key}" for key in others)
    assert (left["uploads"], left["buckets"], left["log groups"]) == ([], ["bucket"], ["/aws/lambda/digits"])


def test_a_bucket_in_another_region_is_told_before_anything_is_removed(aws: Sandbox) -> None:
    aws.deploy()
    aws.client("s3", "us-east-1").create_bucket(Bucket="american")
    with pytest.raises(DeployError, match="lies in us-east-1: give --region us-east-1"):
        aws.destroy(place=Place("american"))
    assert aws.recorder.writes == []


def test_where_aws_no_longer_tells_bucket_and_role_may_be_named(aws: Sandbox) -> None:
    aws.deploy()
    aws.client("lambda").delete_function(FunctionName="digits")
    aws.client("logs").delete_log_group(logGroupName="/aws/lambda/digits")
    aws.destroy()
    assert (aws.everything()["roles"], aws.everything()["buckets"]) == (["digits-role"], ["bucket"])
    aws.destroy(place=Place("bucket", "team"), role=RoleName("digits-role"))
    assert aws.everything() == NOTHING


def test_buckets_roles_and_log_groups_of_others_stay(aws: Sandbox) -> None:
    s3, iam = aws.client("s3"), aws.client("iam")
    s3.create_bucket(Bucket="theirs", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    trust = {"Statement": [{"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}]}
    iam.create_role(RoleName="theirs", AssumeRolePolicyDocument=json.dumps(trust))
    aws.client("logs").create_log_group(logGroupName="/aws/lambda/digits")
    aws.deploy(place=Place("theirs"), role=RoleName("theirs"))
    aws.destroy()
    assert aws.everything() == {
        **NOTHING,
        "buckets": ["theirs"],
        "roles": ["theirs"],
        "log groups": ["/aws/lambda/digits"],
    }


def test_a_role_that_serves_another_function_loses_only_its_policy(aws: Sandbox) -> None:
    aws.deploy()
    iam = aws.client("iam")
    policy = json.dumps(iam.get_role_policy(RoleName="digits-role", PolicyName="smlt-digits")["PolicyDocument"])
    iam.put_role_policy(RoleName="digits-role", PolicyName="smlt-letters", PolicyDocument=policy)
    aws.destroy()
    assert iam.list_role_policies(RoleName="digits-role")["PolicyNames"] == ["smlt-letters"]


def test_thousands_of_objects_are_deleted_by_the_thousand(aws: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smlt.client.deployment.objects._AT_ONCE", 2)
    aws.deploy()
    put(aws, *(f"team/run/data/{number}" for number in range(5)))
    aws.destroy(data=True)
    assert aws.recorder.names.count("s3.DeleteObjects") == 3
    assert aws.everything() == NOTHING


def test_a_role_that_another_function_has_stays(aws: Sandbox) -> None:
    aws.deploy()
    aws.deploy(function="second")
    aws.destroy(keep_logs=True)
    kept = [row for row in aws.rows if row["event"] == "plan" and row["kind"] == "role"]
    assert [(row["action"], row["details"]) for row in kept] == [("keep", ["second has it"])]
    assert aws.client("iam").get_role(RoleName="digits-role")["Role"]["RoleName"] == "digits-role"
