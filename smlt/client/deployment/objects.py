"""The objects in a bucket that belong to a deployment or to runs, found by their keys, and deleted by the thousand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from smlt.client.deployment.cloud import Cloud, asking, may_lack
from smlt.client.deployment.names import Place
from smlt.client.deployment.steps import Work
from smlt.errors import DeployError

#: What a run keeps below its name: nothing else in the bucket is taken for a run's.
_RUN = re.compile(r"[^./][^/]*/(code|data|checkpoints|snapshots)/.+")
#: https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html
_AT_ONCE = 1000


@dataclass(frozen=True)
class Leftovers:
    """What is to be removed from a bucket: keys of objects with their bytes together, and uploads that did not end."""

    place: Place
    keys: tuple[str, ...]
    size: int
    uploads: tuple[tuple[str, str], ...]

    @property
    def any(self) -> bool:
        return bool(self.keys or self.uploads)


def find_leftovers(cloud: Cloud, place: Place, function: str, *, data: bool) -> tuple[Leftovers, Leftovers]:
    """The deployment's own files, and, with `data`, those of all runs below the prefix. A missing bucket has none."""
    runs = _listed(cloud, place, place.key("") if place.prefix else "", runs=True) if data else Leftovers(place, (), 0, ())
    return _listed(cloud, place, place.deploy_key(function), runs=False), runs


def _listed(cloud: Cloud, place: Place, prefix: str, *, runs: bool) -> Leftovers:
    s3, keys, size, uploads = cloud.client("s3"), [], 0, []

    def belongs(key: str) -> bool:
        return not runs or _RUN.fullmatch(key.removeprefix(prefix)) is not None

    with asking(f"cannot list s3://{place.bucket}/{prefix}"), may_lack("NoSuchBucket"):
        for entry in _paged(s3, "list_objects_v2", "Contents", place.bucket, prefix):
            if belongs(entry["Key"]):
                keys.append(entry["Key"])
                size += entry["Size"]
        for entry in _paged(s3, "list_multipart_uploads", "Uploads", place.bucket, prefix):
            if belongs(entry["Key"]):
                uploads.append((entry["Key"], entry["UploadId"]))
    return Leftovers(place, tuple(keys), size, tuple(uploads))


def _paged(s3: Any, operation: str, field: str, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in s3.get_paginator(operation).paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get(field, [])


def remove_leftovers(cloud: Cloud, left: Leftovers, work: Work) -> None:
    """Delete them; what has gone meanwhile is no error. DeployError names the first that cannot be deleted."""
    s3, bucket = cloud.client("s3"), left.place.bucket
    for key, upload in left.uploads:
        with asking(f"cannot end an upload to s3://{bucket}/{key}"), may_lack("NoSuchUpload"):
            s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
    for start in range(0, len(left.keys), _AT_ONCE):
        keys = [{"Key": key} for key in left.keys[start : start + _AT_ONCE]]
        with asking(f"cannot delete objects in s3://{bucket}"):
            failed = s3.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True}).get("Errors", [])
        if failed:
            raise DeployError(f"cannot delete s3://{bucket}/{failed[0]['Key']}: AWS answered {failed[0].get('Code')}")
        work.report.waiting(f"until {len(left.keys) - start - len(keys)} more objects are deleted")
