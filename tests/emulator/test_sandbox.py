"""What a function sees: its code and layers, Lambda's environment, nothing of this machine's packages."""

from __future__ import annotations

import io
import socket
import zipfile

from tests.emulator.conftest import Account, zipped

LOOKING = """
import importlib.util, os, sys, tempfile
def handler(event, context):
    return {
        "found": {name: bool(importlib.util.find_spec(name)) for name in event},
        "environment": dict(os.environ),
        "path": sys.path,
        "tmp": tempfile.gettempdir(),
        "context": [context.function_name, context.memory_limit_in_mb, context.log_group_name, context.log_stream_name],
    }
"""


def test_a_zip_function_sees_what_lambda_ships_and_nothing_else(account: Account) -> None:
    name = account.deploy(LOOKING)
    found = account.invoke(name, ["boto3", "botocore", "awslambdaric", "smlt", "numpy", "moto", "pytest"])["value"]["found"]
    assert {name for name, there in found.items() if there} == {"boto3", "botocore", "awslambdaric"}


def test_the_environment_is_lambdas_and_the_functions_own(account: Account) -> None:
    name = account.deploy(LOOKING, Environment={"Variables": {"MINE": "yes"}}, MemorySize=256)
    seen = account.invoke(name, [])["value"]
    environment = seen["environment"]
    expected = {
        "MINE": "yes",
        "AWS_LAMBDA_FUNCTION_NAME": name,
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "256",
        "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{name}",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": account.local.endpoint_url,
        "_HANDLER": "main.handler",
        "TZ": ":UTC",
    }
    assert {key: environment.get(key) for key in expected} == expected
    assert environment["AWS_ACCESS_KEY_ID"].startswith("ASIA")
    assert "HOME" not in environment
    assert seen["tmp"] == environment["TMPDIR"]
    assert seen["context"][:3] == [name, "256", f"/aws/lambda/{name}"]
    assert seen["context"][3].startswith("20")


def test_layers_are_unpacked_in_order_from_the_request_and_from_s3(account: Account) -> None:
    s3 = account.client("s3")
    s3.create_bucket(Bucket="layers-are-here")
    s3.put_object(Bucket="layers-are-here", Key="second.zip", Body=zipped(python__both="number = 2", python__second="x = 2"))
    first = account.functions.publish_layer_version(
        LayerName="first", Content={"ZipFile": zipped(python__both="number = 1", python__first="x = 1")}
    )
    second = account.functions.publish_layer_version(
        LayerName="second", Content={"S3Bucket": "layers-are-here", "S3Key": "second.zip"}
    )
    source = "import both, first, second\ndef handler(event, context): return [both.number, first.x, second.x, both.__file__]"
    name = account.deploy(source, Layers=[first["LayerVersionArn"], second["LayerVersionArn"]])
    value = account.invoke(name)["value"]
    assert value[:3] == [2, 1, 2]
    assert value[3].endswith("/opt/python/both.py")


def test_code_is_taken_from_s3_and_keeps_its_permissions(account: Account) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(
            "main.py", "import subprocess\ndef handler(event, context): return subprocess.check_output(['./tool']).decode()"
        )
        entry = zipfile.ZipInfo("tool")
        entry.external_attr = 0o755 << 16
        archive.writestr(entry, "#!/bin/sh\necho ran")
    s3 = account.client("s3")
    s3.create_bucket(Bucket="code-is-here")
    s3.put_object(Bucket="code-is-here", Key="code.zip", Body=buffer.getvalue())
    name = account.deploy("", Code={"S3Bucket": "code-is-here", "S3Key": "code.zip"})
    assert account.invoke(name)["value"] == "ran\n"


def test_a_function_reaches_aws_with_its_roles_credentials(account: Account) -> None:
    name = account.deploy("import boto3\ndef handler(event, context): return boto3.client('sts').get_caller_identity()['Arn']")
    assert account.invoke(name)["value"].endswith(f":assumed-role/worker/{name}")


def test_a_function_reaches_tcp_servers_on_loopback(account: Account) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        name = account.deploy(
            "import socket\ndef handler(event, context): socket.create_connection(('127.0.0.1', event)).sendall(b'here')"
        )
        account.invoke(name, server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            assert connection.recv(4) == b"here"


def test_each_sandbox_has_a_tmp_of_its_own_that_stays_while_it_is_warm(account: Account) -> None:
    source = (
        "import os, pathlib, tempfile\n"
        "def handler(event, context):\n"
        "    path = pathlib.Path(tempfile.gettempdir(), 'count')\n"
        "    path.write_text(str(int(path.read_text()) + 1 if path.exists() else 1))\n"
        "    return [int(path.read_text()), str(path)]\n"
    )
    name, other = account.deploy(source), account.deploy(source)
    assert account.invoke(name)["value"][0] == 1
    again, path = account.invoke(name)["value"]
    fresh, elsewhere = account.invoke(other)["value"]
    assert (again, fresh) == (2, 1)
    assert path != elsewhere
