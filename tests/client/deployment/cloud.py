"""AWS for the tests of deployments: moto's HTTP server stands in for it, and a recorder sees every request.

moto knows no rights, does not compare layers with functions, and forgets changes of EphemeralStorage and Architectures.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
import botocore.awsrequest
import pytest

import smlt.store.aws as aws
from smlt.client.deployment.deploy import Deployed, deploy
from smlt.client.deployment.destroy import destroy
from smlt.client.deployment.display import make_reporter
from smlt.client.deployment.names import Place, RoleName
from smlt.client.deployment.request import DeployRequest
from smlt.store.s3 import S3ObjectStore

ACCOUNT, REGION = "123456789012", "eu-west-1"
ELF = {"x86_64": 62, "arm64": 183}
#: What only reads. Everything else changes something.
READS = ("Get", "List", "Describe", "Head")


@dataclass
class Recorder:
    """Every request that boto3's clients of SMLT make, and faults that some of them meet."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    #: By operation ("lambda.CreateFunction"): the answers to its next calls, None for the genuine one.
    faults: dict[str, list[tuple[int, str, str] | None]] = field(default_factory=dict)
    #: By operation: the bodies of its next answers, which are no errors.
    genuine: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    #: The credentials expire with the first call of this operation.
    expire_with: str | None = None

    def attach(self, session: boto3.Session) -> None:
        session.events.register("provide-client-params", self._record)
        session.events.register("before-send", self._answer)

    def _record(self, params: dict[str, Any], model: Any, **_: Any) -> None:
        self.calls.append((f"{model.service_model.service_name}.{model.name}", dict(params)))

    def _answer(self, request: Any, event_name: str, **_: Any) -> Any:
        operation = event_name.removeprefix("before-send.").replace("cloudwatch-logs", "logs")
        if self.expire_with in self.names:
            return answer(request, 403, "ExpiredToken", "The security token included in the request is expired", operation)
        if self.genuine.get(operation):
            content = json.dumps(self.genuine[operation].pop(0), default=str).encode()
            return botocore.awsrequest.AWSResponse(request.url, 200, {}, Raw(content))
        waiting = self.faults.get(operation)
        fault = waiting.pop(0) if waiting else None
        return answer(request, *fault, operation) if fault else None

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    @property
    def writes(self) -> list[str]:
        return [name for name in self.names if not name.partition(".")[2].startswith(READS)]

    def clear(self) -> None:
        self.calls.clear()


def answer(request: Any, status: int, code: str, message: str, operation: str) -> Any:
    """An error as the service writes it: XML from S3, IAM and STS, JSON from the others."""
    if operation.partition(".")[0] == "s3":
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    elif operation.partition(".")[0] in ("iam", "sts"):
        body = f"<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>"
    else:
        body = json.dumps({"message": message, "Message": message, "__type": code})
    headers = {"x-amzn-errortype": code}
    raw = Raw(body.encode())
    return botocore.awsrequest.AWSResponse(request.url, status, headers, raw)


class Raw(io.BytesIO):
    """The body of an answer, as botocore reads it."""

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self.read()


@dataclass
class Sandbox:
    """An account of the test's own: clients that the recorder does not see, files to deploy, and `deploy` itself."""

    folder: Path
    recorder: Recorder
    session: boto3.Session
    #: What the last deployment or removal has told.
    rows: list[dict[str, Any]] = field(default_factory=list)

    def client(self, service: str, region: str = REGION) -> Any:
        return self.session.client(service, region_name=region)

    def request(self, **changes: Any) -> DeployRequest:
        package = self.folder / "train.py"
        if not package.exists():
            package.write_text("import model\n")
            (self.folder / "model.py").write_text("import json\n")
        values: dict[str, Any] = {
            "function": "digits",
            "place": Place("bucket", "team"),
            "package": package,
            "role": RoleName("digits-role"),
            "layer": str(self.layer()),
            "python": "3.12",
            "create_bucket": True,
            "create_role": True,
        }
        return DeployRequest(**{**values, **changes})

    def layer(self, arch: str = "x86_64", python: str = "3.12", name: str = "layer.zip", text: str = "") -> Path:
        path = self.folder / name
        tag = python.replace(".", "")
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in {
                "python/smlt/__init__.py": text.encode(),
                f"python/smlt/_native.cpython-{tag}-{arch}-linux-gnu.so": elf(arch),
                "python/numpy/__init__.py": b"",
                "python/numpy-2.1.0.dist-info/METADATA": b"Name: numpy\nVersion: 2.1.0\n",
            }.items():
                archive.writestr(zipfile.ZipInfo(file), content)
        return path

    def deploy(self, *, dry_run: bool = False, strict: bool = False, **changes: Any) -> Deployed:
        """Deploy what `request` gives; `rows` then has what --json shows."""
        self.recorder.clear()
        out = io.StringIO()
        try:
            return deploy(self.request(**changes), make_reporter(as_json=True, stream=out), dry_run=dry_run, strict=strict)
        finally:
            self.rows = [json.loads(line) for line in out.getvalue().splitlines()]

    def destroy(self, *, answer: bool = True, **options: Any) -> int:
        """How many things were removed."""
        self.recorder.clear()
        out = io.StringIO()
        try:
            return destroy("digits", make_reporter(as_json=True, stream=out), lambda _: answer, **options)
        finally:
            self.rows = [json.loads(line) for line in out.getvalue().splitlines()]

    def actions(self) -> dict[str, str]:
        """Of the last deployment: what happens to each kind of thing."""
        return {row["kind"]: row["action"] for row in self.rows if row["event"] == "plan"}

    def everything(self) -> dict[str, list[str]]:
        """All that there is in the account."""
        s3 = self.client("s3")
        buckets = [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]
        functions, layers = self.client("lambda").list_functions()["Functions"], self.client("lambda").list_layers()["Layers"]
        uploads = [(bucket, s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])) for bucket in buckets]
        objects = [(bucket, s3.list_objects_v2(Bucket=bucket).get("Contents", [])) for bucket in buckets]
        return {
            "functions": [function["FunctionName"] for function in functions],
            "layers": [layer["LayerName"] for layer in layers if layer],
            "roles": [role["RoleName"] for role in self.client("iam").list_roles()["Roles"]],
            "log groups": [group["logGroupName"] for group in self.client("logs").describe_log_groups()["logGroups"]],
            "buckets": buckets,
            "objects": [f"{bucket}/{entry['Key']}" for bucket, entries in objects for entry in entries],
            "uploads": [f"{bucket}/{entry['Key']}" for bucket, entries in uploads for entry in entries],
        }


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every upload through the bucket go in parts, as large ones do."""
    monkeypatch.setitem(S3ObjectStore.__init__.__kwdefaults__, "whole_bytes", 10)


NOTHING: dict[str, list[str]] = {
    name: [] for name in ("functions", "layers", "roles", "log groups", "buckets", "objects", "uploads")
}


def elf(arch: str) -> bytes:
    """The header of a shared library for that architecture."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + ELF[arch].to_bytes(2, "little") + bytes(44)


def sandbox(moto_url: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Sandbox:
    """An empty account behind moto's server, asked by a session that the recorder sees."""
    urlopen(Request(f"{moto_url}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_REGION", REGION)
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("smlt.client.deployment.function.LOOK_EVERY_S", 0)
    recorder, session, own = _sessions()
    recorder.calls, recorder.faults, recorder.genuine, recorder.expire_with = [], {}, {}, None
    monkeypatch.setattr(aws._sessions, "session", session, raising=False)
    monkeypatch.setattr(aws._sessions, "asked_for", aws.settings(), raising=False)
    return Sandbox(folder, recorder, own)


@cache
def _sessions() -> tuple[Recorder, boto3.Session, boto3.Session]:
    """The recorder, the session that it sees, and one that it does not: made once, as they read AWS's models."""
    recorder, session = Recorder(), boto3.Session()
    recorder.attach(session)
    return recorder, session, boto3.Session()
