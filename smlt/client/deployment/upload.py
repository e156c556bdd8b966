"""How a zip reaches Lambda: within the request, or through the bucket when it is larger than a request may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smlt.client.deployment.cloud import Cloud, asking
from smlt.client.deployment.limits import DIRECT_BYTES
from smlt.client.deployment.names import DEPLOY_FOLDER
from smlt.client.deployment.request import DeployRequest
from smlt.client.deployment.steps import Work
from smlt.errors import DeployError, SmltError
from smlt.store.s3 import S3ObjectStore


def code_of(cloud: Cloud, request: DeployRequest, path: Path, name: str, work: Work) -> dict[str, Any]:
    """What Lambda's requests say for their code; a large zip is uploaded to the deployment's folder before, as `name`."""
    size = path.stat().st_size
    if size <= DIRECT_BYTES:
        work.sent_bytes += size
        work.report.sent(size, size)
        return {"ZipFile": path.read_bytes()}
    _upload(cloud, request, name, path, size, work)
    return {"S3Bucket": request.place.bucket, "S3Key": request.place.deploy_key(request.function, name)}


def _upload(cloud: Cloud, request: DeployRequest, name: str, path: Path, size: int, work: Work) -> None:
    """Unless the object lies there already: its name holds the content's SHA-256. An interrupted upload is gone on with."""
    place, done = request.place, 0
    key = place.deploy_key(request.function, name)

    def count(more: int) -> None:
        nonlocal done
        done += more
        work.sent_bytes += more
        work.report.sent(done, size)

    try:
        objects = S3ObjectStore(place.url, attempts=4)
        if objects.list(f"{DEPLOY_FOLDER}/{request.function}/{name}"):
            return
        objects.put(f"{DEPLOY_FOLDER}/{request.function}/{name}", path, count)
    except SmltError as error:
        raise DeployError(str(error)) from error
    work.made(f"s3://{place.bucket}/{key}", lambda: cloud.client("s3").delete_object(Bucket=place.bucket, Key=key))


def remove_superseded(cloud: Cloud, request: DeployRequest, keep: set[str]) -> None:
    """Delete the deployment's packages and layers but those whose names are in `keep`: Lambda has copies of its own."""
    bucket, prefix = request.place.bucket, request.place.deploy_key(request.function)
    with asking(f"cannot clear s3://{bucket}/{prefix}"):
        for entry in cloud.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", []):
            if entry["Key"].removeprefix(prefix) not in keep:
                cloud.client("s3").delete_object(Bucket=bucket, Key=entry["Key"])
