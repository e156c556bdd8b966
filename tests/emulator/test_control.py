"""Lambda's control plane where moto's is laxer: limits, reserved names, roles; and answers that moto does not have."""

from __future__ import annotations

import http.client
import io
import json
import zipfile
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.emulator.conftest import Account, zipped

RETURNING = "def handler(event, context): return 1"


def refused(call: Any, *positional: Any, **arguments: Any) -> tuple[str, str]:
    with pytest.raises(ClientError) as error:
        call(*positional, **arguments)
    found = error.value.response["Error"]
    return found["Code"], found["Message"]


def claiming(megabytes: int) -> bytes:
    """A small zip whose directory says that it unpacks to this much."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("large", b"")
    content = bytearray(buffer.getvalue())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (megabytes << 20).to_bytes(4, "little")  # the uncompressed size
    return bytes(content)


def test_an_environment_of_more_than_4_kb_is_refused_and_not_repeated(account: Account) -> None:
    variables = {"SECRET": "s3cret" * 800}
    code, message = refused(account.deploy, RETURNING, Environment={"Variables": variables})
    assert code == "InvalidParameterValueException"
    assert "4KB limit" in message
    assert "s3cret" not in message
    name = account.deploy(RETURNING)
    code, _ = refused(account.functions.update_function_configuration, FunctionName=name, Environment={"Variables": variables})
    assert code == "InvalidParameterValueException"


def test_variables_that_lambda_sets_itself_are_refused(account: Account) -> None:
    _, message = refused(account.deploy, RETURNING, Environment={"Variables": {"AWS_REGION": "x", "FINE": "y"}})
    assert message.endswith("Reserved keys used in this request: AWS_REGION")


def test_memory_timeout_and_layers_have_lambdas_ranges(account: Account) -> None:
    assert "memorySize" in refused(account.deploy, RETURNING, MemorySize=10241)[1]
    assert "timeout" in refused(account.deploy, RETURNING, Timeout=901)[1]
    arns = [
        account.functions.publish_layer_version(LayerName=f"layer-{n}", Content={"ZipFile": zipped(python__m="")})
        for n in range(6)
    ]
    assert "more than 5 layers" in refused(account.deploy, RETURNING, Layers=[arn["LayerVersionArn"] for arn in arns])[1]


def test_a_direct_zip_of_more_than_50_mb_is_refused(account: Account) -> None:
    large = io.BytesIO()
    with zipfile.ZipFile(large, "w") as archive:
        archive.writestr("x", b"\0" * (50 << 20))
    code, message = refused(account.deploy, "", Code={"ZipFile": large.getvalue()})
    assert code == "RequestEntityTooLargeException"
    assert "CreateFunction" in message


def test_unpacked_code_and_layers_of_more_than_250_mb_are_refused(account: Account) -> None:
    assert (
        "Unzipped size"
        in refused(account.functions.publish_layer_version, LayerName="l", Content={"ZipFile": claiming(251)})[1]
    )
    layer = account.functions.publish_layer_version(LayerName="half", Content={"ZipFile": claiming(200)})["LayerVersionArn"]
    both = {"Code": {"ZipFile": claiming(60)}, "Layers": [layer]}
    assert "combined with layers exceeds" in refused(account.deploy, "", **both)[1]
    name = account.deploy(RETURNING, Layers=[layer])
    assert "combined" in refused(account.functions.update_function_code, FunctionName=name, ZipFile=claiming(60))[1]


def test_what_is_no_zip_and_an_object_that_is_not_there_are_refused(account: Account) -> None:
    assert "unzip" in refused(account.deploy, "", Code={"ZipFile": b"no zip"})[1]
    account.client("s3").create_bucket(Bucket="an-empty-bucket")
    assert "NoSuchKey" in refused(account.deploy, "", Code={"S3Bucket": "an-empty-bucket", "S3Key": "no"})[1]


def test_a_role_that_does_not_trust_lambda_is_refused(account: Account) -> None:
    trust = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
    }
    role = account.client("iam").create_role(RoleName="other", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    assert "cannot be assumed by Lambda" in refused(account.deploy, RETURNING, Role=role)[1]


def test_a_hundred_executions_stay_unreserved(account: Account) -> None:
    name, other = account.deploy(RETURNING), account.deploy(RETURNING)
    account.functions.put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=500)
    put = account.functions.put_function_concurrency
    assert "minimum value of [100]" in refused(put, FunctionName=other, ReservedConcurrentExecutions=401)[1]
    settings = account.functions.get_account_settings()["AccountLimit"]
    assert (settings["ConcurrentExecutions"], settings["UnreservedConcurrentExecutions"]) == (1000, 500)
    account.functions.delete_function_concurrency(FunctionName=name)


def test_a_layer_is_found_by_its_arn(account: Account) -> None:
    published = account.functions.publish_layer_version(LayerName="by-arn", Content={"ZipFile": zipped(python__m="")})
    found = account.functions.get_layer_version_by_arn(Arn=published["LayerVersionArn"])
    assert found["LayerVersionArn"] == published["LayerVersionArn"]
    missing = published["LayerVersionArn"].rpartition(":")[0] + ":99"
    assert refused(account.functions.get_layer_version_by_arn, Arn=missing)[0] == "ResourceNotFoundException"


def test_ephemeral_storage_can_be_updated(account: Account) -> None:
    name = account.deploy(RETURNING)
    updated = account.functions.update_function_configuration(FunctionName=name, EphemeralStorage={"Size": 1024})
    assert updated["EphemeralStorage"] == {"Size": 1024}


@pytest.mark.parametrize("headers", [{"Origin": "https://example.org"}, {"Host": "rebound.example.org"}])
def test_web_pages_are_not_answered(account: Account, headers: dict[str, str]) -> None:
    connection = http.client.HTTPConnection(account.local.endpoint_url.removeprefix("http://"), timeout=20)
    connection.request("OPTIONS", "/2015-03-31/functions", headers=headers)
    response = connection.getresponse()
    assert response.status == 403
    assert "Access-Control-Allow-Origin" not in response.headers
    connection.close()


def test_bodies_in_chunks_and_empty_answers_keep_the_connection(account: Account) -> None:
    s3 = account.client("s3")
    s3.create_bucket(Bucket="raw-requests")
    connection = http.client.HTTPConnection(account.local.endpoint_url.removeprefix("http://"), timeout=20)
    scope = "AWS4-HMAC-SHA256 Credential=test/20300101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
    connection.request("PUT", "/raw-requests/key", iter([b"one ", b"two"]), {"Authorization": scope}, encode_chunked=True)
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.request("HEAD", "/raw-requests/key", headers={"Authorization": scope})
    response = connection.getresponse()
    assert (response.status, response.headers["Content-Length"], response.read()) == (200, "7", b"")
    connection.request("DELETE", "/raw-requests/key", headers={"Authorization": scope})
    response = connection.getresponse()
    assert (response.status, response.read()) == (204, b"")
    name = account.deploy(RETURNING)  # an Invoke without a signature, as curl sends it
    connection.request("POST", f"/2015-03-31/functions/{name}/invocations", b"{}")
    assert json.loads(connection.getresponse().read()) == 1
    connection.close()
