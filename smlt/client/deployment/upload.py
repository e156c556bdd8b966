"""How a zip reaches Lambda: within the request, or through the bucket when it is larger than a request may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smlt.client.deployment.cloud import Cloud, asking, may_lack
from smlt.client.deployment.limits import DIRECT_BYTES
from smlt.client.deployment.request import DeployRequest
from smlt.client.deployment.steps import Work
from smlt.errors import DeployError


def code_of(cloud: Cloud, request: DeployRequest, path: Path, name: str, work: Work) -> dict[str, Any]:
    """What Lambda's requests say for their code; a large zip is uploaded to the deployment's folder before, as `name`."""
    size = path.stat().st_size
    if size <= DIRECT_BYTES:
        work.sent_bytes += size
        work.report.sent(size, size)
        return {"ZipFile": path.read_bytes()}
    key = request.place.deploy_key(request.function, name)
    _upload(cloud, request.place.bucket, key, path, size, work)
    return {"S3Bucket": request.place.bucket, "S3Key": key}


def _upload(cloud: Cloud, bucket: str, key: str, path: Path, size: int, work: Work) -> None:
    """Unless the object lies there already: its name holds the content's SHA-256."""
    s3 = cloud.client("s3")
    with asking(f"cannot look at s3://{bucket}/{key}"), may_lack("404", "NoSuchKey", "NotFound"):
        if key in (entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", [])):
            return
    with asking(f"cannot upload to s3://{bucket}/{key}"):
        _put_file(s3, bucket, key, path, size, work)
    work.made(f"s3://{bucket}/{key}", lambda: s3.delete_object(Bucket=bucket, Key=key))


def _put_file(s3: Any, bucket: str, key: str, path: Path, size: int, work: Work) -> None:
    """INTEGRATION POINT: a resumable upload, once smlt.store.s3 has it. This one ends its parts when it fails."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        work.sent_bytes += more
        work.report.sent(done, size)

    try:
        s3.upload_file(str(path), bucket, key, Callback=count)
    except OSError as error:
        raise DeployError(f"cannot read {path}: {error.strerror or error}") from error


def remove_superseded(cloud: Cloud, request: DeployRequest, keep: set[str]) -> None:
    """Delete the deployment's packages and layers but those whose names are in `keep`: Lambda has copies of its own."""
    bucket, prefix = request.place.bucket, request.place.deploy_key(request.function)
    with asking(f"cannot clear s3://{bucket}/{prefix}"):
        for entry in cloud.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", []):
            if entry["Key"].removeprefix(prefix) not in keep:
                cloud.client("s3").delete_object(Bucket=bucket, Key=entry["Key"])
