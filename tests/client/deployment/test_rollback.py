"""A deployment that fails takes back what it has made, and only that; the next one goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from cloud import NOTHING, Sandbox, sandbox

from smlt.client.deployment.names import Place
from smlt.errors import DeployError

DENIED = (403, "AccessDeniedException", "not authorized")


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    return sandbox(moto_url, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "operation",
    [
        "logs.PutRetentionPolicy",
        "s3.PutPublicAccessBlock",
        "iam.PutRolePolicy",
        "lambda.PublishLayerVersion",
        "lambda.CreateFunction",
        "lambda.PutFunctionEventInvokeConfig",
    ],
)
def test_whatever_step_fails_nothing_half_made_is_left(aws: Sandbox, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smlt.client.deployment.upload.DIRECT_BYTES", 100)  # objects are among what is taken back
    aws.recorder.faults[operation] = [DENIED]
    with pytest.raises(DeployError, match="it needs") as caught:
        aws.deploy()
    assert "\n" not in str(caught.value)
    assert aws.everything() == NOTHING
    assert any(row["event"] == "took-back" for row in aws.rows)


def test_what_was_there_before_stays_when_a_step_fails(aws: Sandbox) -> None:
    aws.deploy()
    before = aws.everything()
    aws.recorder.faults["lambda.UpdateFunctionConfiguration"] = [DENIED]
    with pytest.raises(DeployError, match="lambda:UpdateFunctionConfiguration"):
        aws.deploy(layer=str(aws.layer(name="other.zip", text="# changed")))
    assert aws.everything() == before
    versions = aws.client("lambda").list_layer_versions(LayerName="smlt-digits")["LayerVersions"]
    assert [version["Version"] for version in versions] == [1]  # the second one is taken back


def test_a_layer_that_the_function_has_taken_stays_though_a_later_step_fails(aws: Sandbox) -> None:
    aws.deploy()
    (aws.folder / "model.py").write_text("import math\n")
    changed = str(aws.layer(name="other.zip", text="# changed"))
    aws.recorder.faults["lambda.UpdateFunctionCode"] = [DENIED]
    with pytest.raises(DeployError, match="lambda:UpdateFunctionCode"):
        aws.deploy(layer=changed)
    versions = aws.client("lambda").list_layer_versions(LayerName="smlt-digits")["LayerVersions"]
    assert {version["Version"] for version in versions} == {1, 2}
    aws.deploy(layer=changed)
    assert aws.recorder.writes == ["lambda.UpdateFunctionCode", "lambda.TagResource"]


def test_credentials_that_expire_midway_leave_what_the_next_deployment_goes_on_with(aws: Sandbox) -> None:
    aws.recorder.expire_with = "s3.PutBucketEncryption"
    with pytest.raises(DeployError) as caught:
        aws.deploy()
    told = str(caught.value)
    assert "expired" in told
    assert "still there: bucket bucket, log group /aws/lambda/digits (deploy again to go on, or smlt destroy digits)" in told
    aws.recorder.expire_with = None
    assert aws.deploy().changed == 5  # but the log group, with the bucket mended
    assert aws.actions()["bucket"] == "update"
    assert aws.client("s3").get_bucket_lifecycle_configuration(Bucket="bucket")["Rules"]


def test_what_is_left_without_a_function_is_found_by_destroy(aws: Sandbox) -> None:
    aws.recorder.expire_with = "lambda.CreateFunction"
    with pytest.raises(
        DeployError, match="still there: layer smlt-digits version 1, its policy, role digits-role, bucket bucket, log"
    ):
        aws.deploy()
    aws.recorder.expire_with = None
    assert aws.destroy() == 4
    assert aws.everything() == NOTHING


def test_a_new_role_is_waited_for_until_lambda_knows_it(aws: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smlt.client.deployment.function.time.sleep", lambda _: None)
    unknown = (400, "InvalidParameterValueException", "The role defined for the function cannot be assumed by Lambda.")
    aws.recorder.faults["lambda.CreateFunction"] = [unknown, unknown]
    aws.deploy()
    assert aws.recorder.names.count("lambda.CreateFunction") == 3


def test_a_role_that_lambda_never_takes_ends_the_deployment(aws: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smlt.client.deployment.function.time.sleep", lambda _: None)
    monkeypatch.setattr("smlt.client.deployment.function.ROLE_WAIT_S", 0.0)
    unknown = (400, "InvalidParameterValueException", "The role defined for the function cannot be assumed by Lambda.")
    aws.recorder.faults["lambda.CreateFunction"] = [unknown] * 9
    with pytest.raises(DeployError, match=r"cannot create function digits: .*cannot be assumed"):
        aws.deploy()
    assert aws.everything() == NOTHING


def test_ctrl_c_takes_back_too(aws: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smlt.client.deployment.function._wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        aws.deploy()
    assert aws.everything() == NOTHING


def test_a_function_of_another_bucket_is_not_touched_by_a_failure(aws: Sandbox) -> None:
    aws.deploy()
    aws.recorder.faults["s3.PutBucketTagging"] = [DENIED]
    with pytest.raises(DeployError, match="s3:PutBucketTagging"):
        aws.deploy(place=Place("elsewhere"))
    assert aws.everything()["buckets"] == ["bucket"]
    assert aws.everything()["functions"] == ["digits"]
