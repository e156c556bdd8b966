"""`smlt deploy` makes what is missing, changes what differs, and keeps the rest. moto stands in for AWS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cloud import NOTHING, Sandbox, sandbox

from smlt._version import __version__
from smlt.client.deployment.names import Place, RoleName
from smlt.client.layer_check import LayerReport, check_layer


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    return sandbox(moto_url, monkeypatch, tmp_path)


def function(aws: Sandbox) -> dict[str, Any]:
    found: dict[str, Any] = aws.client("lambda").get_function(FunctionName="digits")
    return found


def test_a_first_deployment_makes_everything_as_asked(aws: Sandbox) -> None:
    done = aws.deploy(memory_mb=2048, tmp_mb=1024, environment={"MODE": "fast"}, log_days=30)
    assert set(aws.actions().values()) == {"create"}
    assert aws.everything() == {
        **NOTHING,
        "functions": ["digits"],
        "layers": ["smlt-digits"],
        "roles": ["digits-role"],
        "log groups": ["/aws/lambda/digits"],
        "buckets": ["bucket"],
    }
    found = function(aws)
    there, tags = found["Configuration"], found["Tags"]
    assert there["FunctionArn"] == done.arn
    assert (there["Runtime"], there["Handler"], there["Architectures"]) == (
        "python3.12",
        "smlt.worker.handler.handler",
        ["x86_64"],
    )
    assert (there["MemorySize"], there["Timeout"], there["EphemeralStorage"]) == (2048, 900, {"Size": 1024})
    assert there["Environment"]["Variables"] == {"SMLT_OBJECT_STORE": "s3://bucket/team", "MODE": "fast"}
    assert there["Layers"][0]["Arn"].endswith(":layer:smlt-digits:1")
    assert (tags["smlt:managed"], tags["smlt:version"], len(tags["smlt:package-sha256"])) == ("smlt", __version__, 64)
    assert aws.client("lambda").get_function_event_invoke_config(FunctionName="digits")["MaximumRetryAttempts"] == 0
    assert aws.client("logs").describe_log_groups()["logGroups"][0]["retentionInDays"] == 30


def test_a_bucket_of_ours_is_encrypted_closed_and_rid_of_unfinished_uploads(aws: Sandbox) -> None:
    aws.deploy()
    s3 = aws.client("s3")
    assert s3.get_bucket_location(Bucket="bucket")["LocationConstraint"] == "eu-west-1"
    rule = s3.get_bucket_encryption(Bucket="bucket")["ServerSideEncryptionConfiguration"]["Rules"][0]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    assert all(s3.get_public_access_block(Bucket="bucket")["PublicAccessBlockConfiguration"].values())
    rule = s3.get_bucket_lifecycle_configuration(Bucket="bucket")["Rules"][0]
    assert (rule["Status"], rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"]) == ("Enabled", 7)
    # What somebody has changed is mended, and nothing else.
    s3.delete_public_access_block(Bucket="bucket")
    aws.deploy()
    assert aws.recorder.writes == ["s3.PutPublicAccessBlock"]


def test_a_role_of_ours_trusts_lambda_alone_and_may_do_just_what_is_needed(aws: Sandbox) -> None:
    aws.deploy(store="rediss://store.example?password_secret=aws-secretsmanager://team/store")
    iam = aws.client("iam")
    trust = iam.get_role(RoleName="digits-role")["Role"]["AssumeRolePolicyDocument"]
    assert [statement["Principal"] for statement in trust["Statement"]] == [{"Service": "lambda.amazonaws.com"}]
    policy = iam.get_role_policy(RoleName="digits-role", PolicyName="smlt-digits")["PolicyDocument"]
    assert {action: statement["Resource"] for statement in policy["Statement"] for action in statement["Action"]} == {
        "logs:CreateLogStream": "arn:aws:logs:eu-west-1:123456789012:log-group:/aws/lambda/digits:*",
        "logs:PutLogEvents": "arn:aws:logs:eu-west-1:123456789012:log-group:/aws/lambda/digits:*",
        **dict.fromkeys(
            ("s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:PutObject"), "arn:aws:s3:::bucket/team/*"
        ),
        "s3:ListBucket": "arn:aws:s3:::bucket",
        "secretsmanager:GetSecretValue": "arn:aws:secretsmanager:eu-west-1:123456789012:secret:team/store-??????",
    }
    listing = next(statement for statement in policy["Statement"] if "s3:ListBucket" in statement["Action"])
    assert listing["Condition"] == {"StringLike": {"s3:prefix": ["team", "team/*"]}}
    # Without the secret the right goes too.
    aws.deploy()
    assert aws.actions()["role"] == "update"
    assert "secretsmanager" not in json.dumps(iam.get_role_policy(RoleName="digits-role", PolicyName="smlt-digits"))


def test_a_second_deployment_sends_nothing_and_changes_nothing(aws: Sandbox) -> None:
    first = aws.deploy()
    assert first.sent_bytes > 0
    second = aws.deploy()
    assert (second.changed, second.sent_bytes, aws.recorder.writes) == (0, 0, [])
    assert set(aws.actions().values()) == {"keep"}


def test_a_dry_run_plans_and_touches_nothing(aws: Sandbox) -> None:
    done = aws.deploy(dry_run=True)
    assert (done.changed, done.sent_bytes, aws.recorder.writes) == (6, 0, [])
    assert aws.everything() == NOTHING
    aws.deploy()
    aws.deploy(dry_run=True, memory_mb=3008)
    assert aws.actions()["function"] == "update"
    assert aws.recorder.writes == []
    assert function(aws)["Configuration"]["MemorySize"] == 1769


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"memory_mb": 3008}, "MemorySize", "MemorySize 1769 -> 3008"),
        ({"timeout_s": 60}, "Timeout", "Timeout 900 -> 60"),
        ({"python": "3.12", "handler": "mine.handler"}, "Handler", "Handler smlt.worker.handler.handler -> mine.handler"),
        ({"environment": {"TOKEN": "hunter2"}}, "Environment", "variables TOKEN"),
        ({"subnets": ("subnet-1",), "security_groups": ("sg-1",)}, "VpcConfig", "VpcConfig"),
    ],
)
def test_a_changed_setting_updates_the_configuration_alone(
    aws: Sandbox, changes: dict[str, Any], field: str, told: str
) -> None:
    aws.deploy()
    done = aws.deploy(**changes)
    wrote = ["lambda.UpdateFunctionConfiguration"]
    assert aws.recorder.writes == (["iam.PutRolePolicy", *wrote] if field == "VpcConfig" else wrote)
    sent = next(params for name, params in aws.recorder.calls if name in wrote)
    assert set(sent) == {"FunctionName", field}
    assert done.sent_bytes == 0
    assert [row["details"] for row in aws.rows if row.get("kind") == "function" and row["event"] == "plan"] == [[told]]
    assert "hunter2" not in json.dumps(aws.rows)
    assert aws.deploy(**changes).changed == 0


def test_a_change_that_is_still_under_way_is_waited_for(aws: Sandbox) -> None:
    aws.deploy()
    there = function(aws)
    there["Configuration"]["LastUpdateStatus"] = "InProgress"
    aws.recorder.genuine["lambda.GetFunction"] = [there]
    aws.deploy(memory_mb=3008)
    # Planned with it, waited for twice, changed, waited for again.
    assert aws.recorder.names.count("lambda.GetFunction") == 4


def test_changed_code_is_sent_and_nothing_else(aws: Sandbox) -> None:
    aws.deploy()
    (aws.folder / "model.py").write_text("import math\n")
    done = aws.deploy()
    assert aws.recorder.writes == ["lambda.UpdateFunctionCode", "lambda.TagResource"]
    sent = next(params["ZipFile"] for name, params in aws.recorder.calls if name == "lambda.UpdateFunctionCode")
    assert done.sent_bytes == len(sent) > 0
    assert aws.deploy().changed == 0


def test_a_changed_layer_is_published_once_and_taken(aws: Sandbox) -> None:
    aws.deploy()
    changed = str(aws.layer(name="other.zip", text="# changed"))
    aws.deploy(layer=changed)
    assert aws.recorder.writes == ["lambda.PublishLayerVersion", "lambda.UpdateFunctionConfiguration"]
    assert function(aws)["Configuration"]["Layers"][0]["Arn"].endswith(":layer:smlt-digits:2")
    assert aws.deploy(layer=changed).changed == 0


def test_a_published_layer_is_taken_as_it_is(aws: Sandbox) -> None:
    content = {"ZipFile": aws.layer().read_bytes()}
    made = aws.client("lambda").publish_layer_version(LayerName="shared", Content=content, CompatibleArchitectures=["x86_64"])
    aws.deploy(layer=made["LayerVersionArn"])
    assert function(aws)["Configuration"]["Layers"][0]["Arn"] == made["LayerVersionArn"]
    assert "lambda.PublishLayerVersion" not in aws.recorder.names


def test_a_layer_is_built_when_none_is_given(aws: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(arch: str, python: str, out: Path) -> LayerReport:
        return check_layer(aws.layer(arch, python).rename(out), arch, python)

    monkeypatch.setattr("smlt.client.layers.build_layer", build)
    aws.deploy(layer=None, arch="arm64")
    version = aws.client("lambda").list_layer_versions(LayerName="smlt-digits")["LayerVersions"][0]
    assert (version["CompatibleArchitectures"], version["CompatibleRuntimes"]) == (["arm64"], ["python3.12"])
    assert function(aws)["Configuration"]["Layers"][0]["Arn"] == version["LayerVersionArn"]
    assert aws.deploy(layer=None, arch="arm64").changed == 0


def test_what_is_too_large_for_a_request_goes_through_the_bucket(aws: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("upload", "deploy"):
        monkeypatch.setattr(f"smlt.client.deployment.{module}.DIRECT_BYTES", 100)
    done = aws.deploy()
    objects = aws.everything()["objects"]
    assert [name.rpartition("/")[2].partition("-")[0] for name in objects] == ["layer", "package"]
    assert all(name.startswith("bucket/team/.deploy/digits/") for name in objects)
    sizes = [aws.client("s3").head_object(Bucket="bucket", Key=name[7:])["ContentLength"] for name in objects]
    assert done.sent_bytes == sum(sizes)
    assert (aws.deploy().sent_bytes, aws.recorder.writes) == (0, [])
    (aws.folder / "model.py").write_text("import math\n")
    aws.deploy()
    left = aws.everything()["objects"]
    assert len(left) == 2  # the package before is not kept
    assert left[0] == objects[0]
    assert left[1] != objects[1]


def test_an_image_needs_neither_package_nor_layer(aws: Sandbox) -> None:
    image = f"123456789012.dkr.ecr.eu-west-1.amazonaws.com/smlt@sha256:{'a' * 64}"
    (aws.folder / "train.py").write_text("import sklearn, torch, json\n")
    done = aws.deploy(image=image, layer=None)
    there = function(aws)["Configuration"]
    assert (there["PackageType"], done.sent_bytes, aws.actions().get("layer")) == ("Image", 0, None)
    assert there["Environment"]["Variables"]["SMLT_PRELOAD"] == "sklearn,torch"
    assert aws.deploy(image=image, layer=None).changed == 0
    other = image.replace("a" * 64, "b" * 64)
    aws.deploy(image=other, layer=None)
    assert aws.recorder.writes == ["lambda.UpdateFunctionCode", "lambda.TagResource"]


def test_buckets_and_roles_of_others_are_used_and_left_as_they_are(aws: Sandbox) -> None:
    s3, iam = aws.client("s3"), aws.client("iam")
    s3.create_bucket(Bucket="theirs", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    trust = {"Statement": {"Effect": "Allow", "Principal": {"Service": ["lambda.amazonaws.com"]}, "Action": "sts:AssumeRole"}}
    arn = iam.create_role(RoleName="theirs", Path="/team/", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    aws.deploy(place=Place("theirs"), role=RoleName.parse(arn))
    assert (aws.actions()["bucket"], aws.actions()["role"]) == ("keep", "keep")
    assert not any(name.startswith(("s3.", "iam.")) for name in aws.recorder.writes)
    assert function(aws)["Configuration"]["Role"] == arn
    warned = [row["text"] for row in aws.rows if row["event"] == "warning"]
    assert any("public access" in text for text in warned)


def test_a_log_group_of_others_keeps_its_lines(aws: Sandbox) -> None:
    aws.client("logs").create_log_group(logGroupName="/aws/lambda/digits")
    aws.client("logs").put_retention_policy(logGroupName="/aws/lambda/digits", retentionInDays=365)
    aws.deploy()
    assert aws.actions()["log group"] == "keep"
    assert aws.client("logs").describe_log_groups()["logGroups"][0]["retentionInDays"] == 365


def test_a_bucket_with_a_key_of_its_own_lets_the_role_use_that_key(aws: Sandbox) -> None:
    s3, key = aws.client("s3"), "arn:aws:kms:eu-west-1:123456789012:key/1234"
    s3.create_bucket(Bucket="sealed", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}}
    s3.put_bucket_encryption(Bucket="sealed", ServerSideEncryptionConfiguration={"Rules": [rule]})
    aws.deploy(place=Place("sealed"))
    policy = aws.client("iam").get_role_policy(RoleName="digits-role", PolicyName="smlt-digits")["PolicyDocument"]
    statement = next(statement for statement in policy["Statement"] if statement["Resource"] == key)
    assert statement["Action"] == ["kms:Decrypt", "kms:GenerateDataKey"]


def test_a_module_that_no_zip_has_is_a_warning_with_the_ways_out(aws: Sandbox) -> None:
    script = aws.folder / "heavy.py"
    script.write_text("import torch\nimport json\n")
    aws.deploy(package=script, dry_run=True)
    warned = [row["text"] for row in aws.rows if row["event"] == "warning"]
    (told,) = [text for text in warned if "torch" in text]
    assert told.startswith("heavy.py imports torch, which neither package nor layer has: add it by --with, or take an image")
    aws.deploy(package=script, layer=None, image="123456789012.dkr.ecr.eu-west-1.amazonaws.com/smlt:1", dry_run=True)
    assert [row for row in aws.rows if row["event"] == "warning" and "torch" in row["text"]] == []
