"""What cannot work on Lambda is one sentence before anything is started, or the end of the run in order."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import smlt, status, steps, write_task
from functions import BUCKET, FUNCTION, ROLE, Cloud, cloud, on_lambda

from smlt.store.embedded import EmbeddedStore

JOB = ("--workers", 3, "--epochs", 20, "--global-batch-size", 16)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"), "\n        time.sleep(0.04)\n")


@pytest.fixture(scope="module")
def deployed(script: Path) -> Iterator[Cloud]:
    """Policies are enforced."""
    with cloud(script, "--timeout", 3, authorize=True) as made:
        yield made


def refusal(deployed: Cloud, *arguments: object, cwd: Path) -> tuple[int, str]:
    done = deployed.train(*arguments, cwd=cwd)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("smlt: ")
    return done.returncode, done.stderr.removeprefix("smlt: ").rstrip()


def test_a_function_that_is_not_there_is_named_with_what_makes_it(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    done = smlt("train", script, *JOB, "--on", "lambda", "--function", "nobody", cwd=tmp_path, **deployed.environment)
    assert done.returncode == 7
    assert "nobody" in done.stderr
    assert "smlt deploy" in done.stderr
    assert not (tmp_path / "smlt-runs").exists()


def test_a_function_with_a_handler_of_its_own_is_not_invoked(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    client, before = deployed.client("lambda"), len(deployed.local.invocations)
    role = client.get_function_configuration(FunctionName=FUNCTION)["Role"]
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("mine.py", "def handler(event, context):\n    return {}\n")
    client.create_function(
        FunctionName="mine",
        Runtime=f"python{sys.version_info[0]}.{sys.version_info[1]}",
        Role=role,
        Handler="mine.handler",
        Code={"ZipFile": package.getvalue()},
        Environment={"Variables": {"SMLT_OBJECT_STORE": f"s3://{BUCKET}"}},
    )
    done = smlt("train", script, *JOB, "--on", "lambda", "--function", "mine", cwd=tmp_path, **deployed.environment)
    assert done.returncode == 2
    assert done.stderr.startswith("smlt: function mine runs mine.handler, not SMLT's workers: ")
    assert len(deployed.local.invocations) == before


def test_more_workers_than_may_run_at_once_are_refused(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    client = deployed.client("lambda")
    client.put_function_concurrency(FunctionName=FUNCTION, ReservedConcurrentExecutions=2)
    try:
        code, text = refusal(deployed, script, *JOB, cwd=tmp_path)
    finally:
        client.delete_function_concurrency(FunctionName=FUNCTION)
    assert code == 2
    assert "3 workers" in text
    assert "its reserved concurrency" in text


def test_a_store_that_only_this_machine_reaches_is_explained(
    deployed: Cloud, script: Path, store: EmbeddedStore, tmp_path: Path
) -> None:
    """The usual mistake: the store is in a VPC, the function is not."""
    password, where = store.tcp_url.removeprefix("redis://:").split("@")
    deployed.environment["SMLT_STORE_PASSWORD"] = password
    try:
        code, text = refusal(deployed, script, *JOB, "--store", "redis://127.0.0.1:1", "--store-tunnel", where, cwd=tmp_path)
    finally:
        del deployed.environment["SMLT_STORE_PASSWORD"]
    assert code == 2
    assert f"function {FUNCTION} cannot reach the store at 127.0.0.1:1: it is in no VPC" in text
    assert password not in text


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:secret@127.0.0.1:6379", "functions are not given a password in their event"),
        ("redis://127.0.0.1?password_file=/run/secret", "functions do not have this machine's password_file"),
        ("unix:///run/store.sock", "functions reach a store over the network only"),
    ],
)
def test_a_store_that_cannot_be_given_to_functions_is_refused(
    deployed: Cloud, script: Path, tmp_path: Path, url: str, said: str
) -> None:
    code, text = refusal(deployed, script, *JOB, "--store", url, cwd=tmp_path)
    assert code == 2
    assert said in text
    assert "aws-secretsmanager://" in text or "redis://" in text
    assert "secret@" not in text


def test_a_role_without_rights_on_the_bucket_is_told_before_the_start(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    client = deployed.client("iam")
    names = client.list_role_policies(RoleName=ROLE)["PolicyNames"]
    documents = {name: client.get_role_policy(RoleName=ROLE, PolicyName=name)["PolicyDocument"] for name in names}
    for name in names:
        client.delete_role_policy(RoleName=ROLE, PolicyName=name)
    try:
        code, text = refusal(deployed, script, *JOB, cwd=tmp_path)
    finally:
        for name, document in documents.items():
            client.put_role_policy(RoleName=ROLE, PolicyName=name, PolicyDocument=json.dumps(document))
    assert code == 2
    assert f"function {FUNCTION} cannot use s3://{BUCKET}" in text
    assert "AWS denies it" in text


def test_credentials_that_end_midway_end_the_run_and_new_ones_resume_it(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    iam = deployed.client("iam")
    iam.create_user(UserName="trainee")
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    iam.put_user_policy(UserName="trainee", PolicyName="all", PolicyDocument=json.dumps(everything))
    key = iam.create_access_key(UserName="trainee")["AccessKey"]
    before, run = dict(deployed.environment), tmp_path / "smlt-runs" / "one"
    deployed.environment |= {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    try:
        with deployed.running(script, *JOB, "--epochs", 40, "--name", "one", cwd=tmp_path) as running:
            running.wait_for(lambda event: event["event"] == "step" and event["step"] == 5)
            iam.delete_access_key(UserName="trainee", AccessKeyId=key["AccessKeyId"])
            assert running.finish() == 7
            text = running.errors.read_text()
    finally:
        deployed.environment |= before
    assert text.count("\n") == 1
    assert text.startswith(f"smlt: cannot invoke function {FUNCTION}: AWS does not know these credentials")
    assert status(run)["state"] == "failed"
    done = smlt("resume", "one", cwd=tmp_path, **deployed.environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert [number for number, _ in steps(run)] == list(range(1, 161))


def test_the_embedded_store_is_refused_where_functions_do_not_run_here(script: Path, deployed: Cloud, tmp_path: Path) -> None:
    """AWS, as far as the client can tell: no AWS_ENDPOINT_URL leads to this machine, only those of each service."""
    services = {f"AWS_ENDPOINT_URL_{service}": deployed.local.endpoint_url for service in ("LAMBDA", "S3", "STS")}
    kept = {name: value for name, value in deployed.environment.items() if name != "AWS_ENDPOINT_URL"}
    done = smlt("train", script, *JOB, *on_lambda(), cwd=tmp_path, **kept, **services)
    assert done.returncode == 2
    assert "functions cannot reach this machine's embedded store: give --store" in done.stderr
