"""What cannot work is refused in one sentence that says what to do, before anything is made."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cloud import NOTHING, Sandbox, elf, sandbox

from smlt.client.deployment.names import Place, RoleName
from smlt.errors import ConfigError, DeployError, SmltError


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    return sandbox(moto_url, monkeypatch, tmp_path)


def refused(aws: Sandbox, kind: type[SmltError] = DeployError, **changes: Any) -> str:
    """The message; nothing has been written, and nothing secret is told."""
    with pytest.raises(kind) as caught:
        aws.deploy(**changes)
    assert aws.recorder.writes == []
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def no_wheel(*_: object) -> None:
    raise DeployError("there is no wheel")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"memory_mb": 64}, "--memory 64: Lambda takes 128 to 10240 MB"),
        ({"timeout_s": 901}, "--timeout 901: Lambda takes 1 to 900 s"),
        ({"tmp_mb": 100}, "--tmp 100: Lambda takes 512 to 10240 MB"),
        ({"arch": "riscv"}, "--arch 'riscv': Lambda has x86_64 and arm64"),
        ({"python": "3.6"}, "--python '3.6'"),
        ({"log_days": 2}, "--log-days 2"),
        ({"function": "no good"}, "function 'no good'"),
        ({"subnets": ("subnet-1",)}, "--subnet and --security-group go together"),
        ({"subnets": ("vpc-1",), "security_groups": ("sg-1",)}, "--subnet 'vpc-1': it looks like subnet-"),
        ({"environment": {"AWS_REGION": "x"}}, "--env AWS_REGION: it is set by Lambda itself"),
        ({"environment": {"SMLT_STORE": "x"}}, "--env SMLT_STORE: it is set by deploy"),
        ({"environment": {"A": "x" * 5000}}, "4096 bytes"),
        ({"image": "latest", "layer": None}, "--image 'latest'"),
        ({"no_layer": True}, "--layer and --no-layer: give one of them"),
        ({"store": "rediss://:hunter2@store.example"}, "write ?password_secret=aws-secretsmanager://NAME"),
        ({"store": "rediss://store.example?password=hunter2"}, "write ?password_secret=aws-secretsmanager://NAME"),
        ({"store": "rediss://store.example?password_file=/x"}, "a function does not have your password_file"),
        ({"store": "rediss://store.example?password_secret=env:X"}, "password_secret begins with"),
        ({"store": "redis://localhost"}, "a function cannot reach that"),
    ],
)
def test_a_value_that_lambda_does_not_take_is_refused_before_any_request(
    aws: Sandbox, changes: dict[str, Any], told: str
) -> None:
    assert told in refused(aws, ConfigError, **changes)
    assert aws.recorder.calls == []


def test_names_that_cannot_be_are_refused() -> None:
    for text in ("Bucket", "a", "s3://bucket/../x", "s3://bucket/.deploy", "s3://bucket//x", "a..b"):
        with pytest.raises(ConfigError, match="bucket"):
            Place.parse(text)
    for text in ("", "a b", "arn:aws:iam::123:role/x", "arn:aws:lambda:eu-west-1:123456789012:function:x"):
        with pytest.raises(ConfigError, match="role"):
            RoleName.parse(text)
    assert Place.parse("s3://bucket/a/b/") == Place("bucket", "a/b")
    assert RoleName.parse("arn:aws:iam::123456789012:role/a/b/c") == RoleName("c", "/a/b/", "123456789012")


def test_packages_and_layers_that_cannot_run_are_refused_before_any_request(
    aws: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    (aws.folder / "empty").mkdir()
    (aws.folder / "native").mkdir()
    (aws.folder / "native/run.py").write_text("")
    (aws.folder / "native/fast.so").write_bytes(elf("arm64"))
    (aws.folder / "broken.py").write_text("def")
    with zipfile.ZipFile(aws.folder / "flat.zip", "w") as archive:
        archive.writestr("smlt/__init__.py", "")
    monkeypatch.setattr("smlt.client.layers._own_wheel", no_wheel)
    for changes, told in (
        ({"package": aws.folder / "none.py"}, "there is no such script or folder"),
        ({"package": aws.folder / "empty"}, "there is no Python file"),
        ({"package": aws.folder / "broken.py"}, "broken.py, line 1"),
        ({"package": aws.folder / "native"}, "fast.so is compiled for aarch64, the function is x86_64"),
        ({"layer": str(aws.folder / "none.zip")}, "there is no layer"),
        ({"layer": str(aws.folder / "train.py")}, "cannot be read as a zip file"),
        ({"layer": str(aws.folder / "flat.zip")}, "holds no python/smlt"),
        ({"layer": str(aws.layer("arm64", name="arm.zip"))}, "_native.cpython-312-arm64-linux-gnu.so is made for aarch64"),
        ({"python": "3.13"}, "is made for Python 3.12, the function's is 3.13"),
        ({"layer": "arn:aws:lambda:eu-west-1:123456789012:layer:x"}, "ARN of a version"),
        ({"layer": None}, "no --layer is given, and none can be built: there is no wheel"),
        ({"layer": None, "no_layer": True}, "the package holds no smlt"),
    ):
        assert told in refused(aws, **changes)  # type: ignore[arg-type]
    monkeypatch.setattr("smlt.client.deployment.limits.UNPACKED_BYTES", 50)
    told = refused(aws)
    assert "too large: " in told
    assert told.endswith("build a container image: smlt layer dockerfile")
    assert aws.recorder.calls == []


def test_missing_or_foreign_things_are_refused(aws: Sandbox) -> None:
    assert "give --create-bucket" in refused(aws, create_bucket=False)
    assert "give --create-role" in refused(aws, create_role=False)
    aws.client("s3", "us-east-1").create_bucket(Bucket="american")
    assert "lies in us-east-1, the function in eu-west-1: give --region us-east-1" in refused(aws, place=Place("american"))
    trust = {"Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}
    aws.client("iam").create_role(RoleName="machines", AssumeRolePolicyDocument=json.dumps(trust))
    assert "its trust policy must allow lambda.amazonaws.com" in refused(aws, role=RoleName("machines"))
    assert "is of account 210987654321" in refused(aws, role=RoleName("theirs", account="210987654321"))
    arn = "arn:aws:lambda:{}:123456789012:layer:none:7"
    assert "there is no such layer version" in refused(aws, layer=arn.format("eu-west-1"))
    assert "Lambda wants one region" in refused(aws, layer=arn.format("us-east-1"))
    content = {"ZipFile": aws.layer().read_bytes()}
    made = aws.client("lambda").publish_layer_version(LayerName="arm", Content=content, CompatibleArchitectures=["arm64"])
    assert "its architecture is arm64, the function's x86_64" in refused(aws, layer=made["LayerVersionArn"])


def test_a_function_that_smlt_has_not_made_is_not_touched(aws: Sandbox) -> None:
    aws.deploy()
    arn = "arn:aws:lambda:eu-west-1:123456789012:function:digits"
    aws.client("lambda").untag_resource(Resource=arn, TagKeys=["smlt:managed"])
    assert "was not made by smlt" in refused(aws)
    with pytest.raises(DeployError, match="was not made by smlt"):
        aws.destroy()
    assert aws.everything()["functions"] == ["digits"]


def test_a_function_that_cannot_run_is_not_taken_for_a_deployed_one(aws: Sandbox) -> None:
    aws.deploy()
    there = aws.client("lambda").get_function(FunctionName="digits")
    there["Configuration"] |= {"State": "Failed", "StateReason": "the subnet has no free address"}
    aws.recorder.genuine["lambda.GetFunction"] = [there]
    assert "function digits cannot run: the subnet has no free address; mend that, smlt destroy digits" in refused(aws)


def test_a_zip_does_not_become_an_image(aws: Sandbox) -> None:
    aws.deploy()
    image = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/smlt:1"
    assert "smlt destroy digits first" in refused(aws, image=image, layer=None)


def test_what_is_only_a_warning_is_an_error_with_strict(aws: Sandbox) -> None:
    aws.client("s3").create_bucket(Bucket="open", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    assert "--strict: bucket open does not block public access" in refused(aws, strict=True, place=Place("open"))


@pytest.mark.parametrize(
    ("operation", "right"),
    [
        ("s3.GetBucketLocation", "s3:GetBucketLocation"),
        ("s3.GetBucketEncryption", "s3:GetEncryptionConfiguration"),
        ("iam.GetRole", "iam:GetRole"),
        ("lambda.GetFunction", "lambda:GetFunction"),
    ],
)
def test_a_missing_right_is_named(aws: Sandbox, operation: str, right: str) -> None:
    if operation == "s3.GetBucketEncryption":
        aws.client("s3").create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    aws.recorder.faults[operation] = [(403, "AccessDenied", "Access Denied")]
    told = refused(aws)
    assert f"it needs {right}: `smlt policy` prints all that is needed" in told
    assert aws.everything() == {**NOTHING, "buckets": aws.everything()["buckets"]}


def test_no_and_wrong_credentials_are_told(aws: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    aws.recorder.faults["sts.GetCallerIdentity"] = [(403, "InvalidClientTokenId", "The security token is invalid")]
    assert "AWS does not know these credentials" in refused(aws)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    assert "no AWS credentials: set AWS_PROFILE" in refused(aws)


def test_a_missing_region_is_told(aws: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    assert "no AWS region: set AWS_REGION, or give --region" in refused(aws, ConfigError)
    with pytest.raises(ConfigError, match="no AWS region"):
        aws.destroy()


def test_an_endpoint_that_cannot_be_reached_is_told(aws: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    assert "AWS cannot be reached" in refused(aws)
