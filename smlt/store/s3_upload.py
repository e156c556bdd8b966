"""Uploads to S3 in parts, side by side; of files they can be gone on with after an interruption.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from hashlib import md5, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smlt.errors import SmltError, StoreAuthError
from smlt.store.aws import error_code
from smlt.store.object import Progress

if TYPE_CHECKING:
    from smlt.store.s3 import S3ObjectStore

#: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MOST_PARTS = 10_000
_MIB = 1 << 20

#: Gives the bytes of a part by its start and length.
Content = Callable[[int, int], bytes]


class _Body(io.BytesIO):
    """A part on its way: `progress` is asked (with 0 bytes) before each piece, so that what it raises ends a slow part too."""

    def __init__(self, data: bytes, progress: Progress) -> None:
        super().__init__(data)
        self._progress = progress

    def read(self, size: int | None = -1, /) -> bytes:
        self._progress(0)
        return super().read(size)


def upload_bytes(objects: S3ObjectStore, key: str, data: bytes, progress: Progress | None) -> None:
    """Put `data` in parts. Whatever happens, no part of it is left."""
    upload = _begin(objects, key)
    try:
        _send(objects, key, upload, len(data), lambda start, length: data[start : start + length], {}, progress)
    except BaseException:
        with suppress(SmltError, objects.client.exceptions.ClientError):
            objects.client.abort_multipart_upload(**objects.at(key), UploadId=upload)
        raise


def upload_file(objects: S3ObjectStore, key: str, path: Path, progress: Progress | None) -> None:
    """Put the file's content in parts. An interruption leaves the parts that were sent, and the next upload of the same content
    sends the others only; a part counts as sent when its SHA-256, or where S3 does not tell it its MD5, is the file's.
    """
    from smlt.store.s3 import file_part

    size = path.stat().st_size

    def content(start: int, length: int) -> bytes:
        return file_part(path, start, length)

    upload, there = _go_on(objects, key)
    for attempt in (1, 2):
        upload = upload or _begin(objects, key)
        try:
            _send(objects, key, upload, size, content, there, progress)
            return
        except objects.client.exceptions.ClientError as error:
            if error_code(error) != "NoSuchUpload" or attempt == 2:  # another has completed or given up the same upload
                raise
            upload, there = "", {}


def part_length(size: int, part_bytes: int) -> int:
    """How long the parts of an object are: whole MiB unless `part_bytes` is none, and no more than S3 takes of them."""
    least = -(-size // MOST_PARTS)
    return part_bytes if least <= part_bytes else -(-least // _MIB) * _MIB


def _begin(objects: S3ObjectStore, key: str) -> str:
    return str(objects.client.create_multipart_upload(**objects.at(key), ChecksumAlgorithm="SHA256")["UploadId"])


def _go_on(objects: S3ObjectStore, key: str) -> tuple[str, dict[int, dict[str, Any]]]:
    """The newest upload of `key` that was begun and not completed, and its parts by number; "" when there is none."""
    where = objects.at(key)
    try:
        found = [
            upload
            for upload in objects.unfinished(where["Key"])
            if upload["Key"] == where["Key"] and upload.get("ChecksumAlgorithm") == "SHA256"  # others take no such parts
        ]
        if not found:
            return "", {}
        upload = str(max(found, key=lambda one: one["Initiated"])["UploadId"])
        pages = objects.client.get_paginator("list_parts").paginate(**where, UploadId=upload)
        return upload, {int(part["PartNumber"]): part for page in pages for part in page.get("Parts", [])}
    except StoreAuthError:  # who may put need not be allowed to list uploads
        return "", {}
    except objects.client.exceptions.ClientError as error:
        if error_code(error) in ("NoSuchUpload", "AccessDenied"):
            return "", {}
        raise


def _send(
    objects: S3ObjectStore,
    key: str,
    upload: str,
    size: int,
    content: Content,
    there: dict[int, dict[str, Any]],
    progress: Progress | None,
) -> None:
    """Send the parts that are not there yet and make an object of them all."""
    where, length = objects.at(key), part_length(size, objects.part_bytes)

    def one(number: int) -> dict[str, Any]:
        start = (number - 1) * length
        data = content(start, min(length, size - start))
        digest = b64encode(sha256(data).digest()).decode()
        known = there.get(number)
        if known is not None and _is_same(known, data, digest):
            tag = known["ETag"]
        else:
            sent = objects.client.upload_part(
                **where,
                UploadId=upload,
                PartNumber=number,
                Body=_Body(data, progress) if progress is not None else data,
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=digest,
            )
            tag = sent["ETag"]
        if progress is not None:
            progress(len(data))
        return {"PartNumber": number, "ETag": tag, "ChecksumSHA256": digest}

    jobs = (lambda number=number: one(number) for number in range(1, -(-size // length) + 1))
    parts = list(objects.in_order(jobs))
    objects.client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})


def _is_same(part: dict[str, Any], data: bytes, digest: str) -> bool:
    if int(part["Size"]) != len(data):
        return False
    if part.get("ChecksumSHA256"):
        return bool(part["ChecksumSHA256"] == digest)
    return bool(part["ETag"].strip('"') == md5(data, usedforsecurity=False).hexdigest())
