"""The object store in a bucket of Amazon S3, or of what speaks like it.

What goes over the wire is checked as boto3 does by default: a CRC32 with every upload, of which S3 refuses what does not
fit, and of whole downloads the checksum that S3 kept (`request_checksum_calculation`, `response_checksum_validation`:
when_supported). Parts of large objects carry a SHA-256. S3 keeps no checksum for a range: what is read by range is compared
with its manifest by whoever has the whole.
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from smlt.errors import ConfigError, StoreError, StoreFull
from smlt.store.aws import aws_client, aws_errors, error_code, translated
from smlt.store.object import KEY_LENGTH, TEMPORARY, ObjectStat, Progress, check_key, check_range, has_changed

#: Large objects travel in parts of so much, side by side; S3 takes no smaller ones than 5 MiB:
#: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
PART_BYTES = 8 << 20
#: Larger ones do. Below, one request is as fast and costs less.
WHOLE_BYTES = 16 << 20
#: Requests at a time. A connection to S3 gives about 90 MB/s, a function's network some 600 MB/s at most.
THREADS = 8
#: What one DeleteObjects takes: https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html
DELETED_AT_ONCE = 1000
#: How often in a row a body may break off without a byte before it is given up.
BODY_ATTEMPTS = 5
_CHUNK = 1 << 20
#: Bucket names: https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
#: Requests by what S3 charges for them: https://aws.amazon.com/s3/pricing/ (deletions cost nothing).
_CLASS = {
    **dict.fromkeys(("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"), "put"),
    **dict.fromkeys(("GetObject", "HeadObject", "HeadBucket"), "get"),
    **dict.fromkeys(("ListObjectsV2", "ListMultipartUploads", "ListParts"), "list"),
    **dict.fromkeys(("DeleteObject", "DeleteObjects", "AbortMultipartUpload"), "delete"),
}
_NO_KEY = {"NoSuchKey", "404"}

T = TypeVar("T")


class S3ObjectStore:
    """An object store in `s3://bucket/prefix`. Several threads may use it.

    `requests` counts the requests that were sent by what they cost: "put", "get" (HEAD too), "list", "delete". Raises
    ConfigError for what is no such URL, and when boto3 is not installed; the bucket is asked for when it is first used.
    `part_bytes`, `whole_bytes`, `threads`: see PART_BYTES, WHOLE_BYTES and THREADS. `attempts`: see `aws_client`.
    """

    copies = True

    def __init__(
        self,
        url: str,
        *,
        part_bytes: int = PART_BYTES,
        whole_bytes: int = WHOLE_BYTES,
        threads: int = THREADS,
        attempts: int = 5,
    ) -> None:
        self.bucket, self.prefix = _bucket_and_prefix(url)
        self.url = f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        self.part_bytes, self.whole_bytes, self.threads = part_bytes, whole_bytes, threads
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._places = threading.Semaphore(2 * threads)
        self._executor: ThreadPoolExecutor | None = None
        self._bucket_seen = False
        self.client = aws_client("s3", attempts=attempts, max_pool_connections=4 * threads, connect_timeout=10)
        self.client.meta.events.register("before-send.s3", self._count)

    # ---- writing ----

    def put(self, key: str, data: bytes | Path, progress: Progress | None = None) -> None:
        """Also of a file larger than memory. An interrupted upload of a large file is gone on with by the next `put` of it."""
        from smlt.store.s3_upload import upload_bytes, upload_file

        with self._errors(f"cannot write {key} to {self.url}"):
            size = len(data) if isinstance(data, bytes) else data.stat().st_size
            if size <= self.whole_bytes:
                content = data if isinstance(data, bytes) else data.read_bytes()
                self.client.put_object(**self.at(key), Body=content)
                if progress is not None:
                    progress(len(content))
            elif isinstance(data, bytes):
                upload_bytes(self, key, data, progress)
            else:
                upload_file(self, key, data, progress)

    def delete(self, *keys: str) -> None:
        """In requests of a thousand."""
        names = [self.at(key)["Key"] for key in keys]
        for low in range(0, len(names), DELETED_AT_ONCE):
            batch = names[low : low + DELETED_AT_ONCE]
            with self._errors(f"cannot delete in {self.url}"):
                if len(batch) == 1:
                    self.client.delete_object(Bucket=self.bucket, Key=batch[0])
                    continue
                wanted = {"Objects": [{"Key": name} for name in batch], "Quiet": True}
                answer = self.client.delete_objects(Bucket=self.bucket, Delete=wanted)
            for refused in answer.get("Errors", []):
                error = _as_client_error(refused)
                raise translated(error, f"cannot delete {refused.get('Key')} in s3://{self.bucket}") from error

    def abort_unfinished(self, prefix: str = "") -> int:
        """Give up the uploads below `prefix` that were begun and not completed; S3 charges for their parts. How many.

        A lifecycle rule of the bucket (AbortIncompleteMultipartUpload) does the same for what nobody comes back to.
        """
        uploads = self.unfinished(self._prefix_of(prefix))
        with self._errors(f"cannot abort uploads in {self.url}"):
            for upload in uploads:
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(uploads)

    def unfinished(self, name: str) -> list[dict[str, Any]]:
        """The uploads under way whose name in the bucket begins with `name`."""
        with self._errors(f"cannot list the uploads in {self.url}"):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=name)
            return [upload for page in pages for upload in page.get("Uploads", [])]

    # ---- reading ----

    def get(self, key: str) -> bytes:
        """Large ones in parts, side by side."""
        return b"".join(self._parts(key))

    def fetch(self, key: str, target: Path, progress: Progress | None = None) -> str:
        """A copy, hashed as it comes; large ones in parts, side by side, of which few are in memory."""
        partial = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")  # no object is called so
        digest = sha256()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                raise StoreError(f"cannot write {target}: there is such a file already")
            try:
                with partial.open("xb") as file:
                    for data in self._parts(key):
                        digest.update(data)
                        file.write(data)
                        if progress is not None:
                            progress(len(data))
                partial.rename(target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            if isinstance(error, StoreError):  # StoreUnavailable is both
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(f"no room left on the disk of {target.parent} for {key} of {self.url}") from error
            raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
        return digest.hexdigest()

    def get_range(self, key: str, start: int, length: int, version: str | None = None) -> bytes:
        """In one request."""
        check_range(key, start, length)
        if length == 0:
            self.stat(key)
            return b""
        return self._read(key, start, length, version)[0]

    def exists(self, key: str) -> bool:
        """One HEAD."""
        return self._head(key) is not None

    def size(self, key: str) -> int:
        """One HEAD."""
        return self.stat(key).size

    def stat(self, key: str) -> ObjectStat:
        """The object's size and ETag."""
        found = self._head(key)
        if found is None:
            raise self._none(key)
        return found

    def list(self, prefix: str) -> list[str]:
        """One request a thousand keys."""
        return list(self.stats(prefix))

    def stats(self, prefix: str) -> dict[str, ObjectStat]:
        """One request a thousand keys. What has no key that an object of this project may have is passed over."""
        found = {}
        skipped = len(self.prefix) + 1 if self.prefix else 0
        with self._errors(f"cannot list {prefix} in {self.url}"):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._prefix_of(prefix))
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"][skipped:]
                    try:
                        check_key(key)
                    except StoreError:  # "folder/", as the console makes them
                        continue
                    found[key] = ObjectStat(int(item["Size"]), str(item["ETag"]))
        return dict(sorted(found.items()))

    # ---- the parts of reading ----

    def _parts(self, key: str) -> Iterator[bytes]:
        """The object's content in order, all of one version."""
        first, version, total = self._read(key, 0, None, None)
        yield first
        starts = range(len(first), total, self.part_bytes)
        jobs = (lambda start=start: self._read(key, start, self.part_bytes, version)[0] for start in starts)
        yield from self.in_order(jobs)

    def _read(self, key: str, start: int, length: int | None, version: str | None) -> tuple[bytes, str, int]:
        """Bytes from `start`, the version and the size of the object. `length` None: the whole, of a large one the first part.

        When the answer breaks off, what is missing of it is asked for again.
        """
        data, tries, seen, wanted = bytearray(), 0, version, length
        with self._errors(f"cannot read {key} in {self.url}", key):
            while True:
                asked: dict[str, Any] = {"IfMatch": seen} if seen is not None else {}
                if length is not None:
                    asked["Range"] = f"bytes={start + len(data)}-{start + length - 1}"
                try:
                    answer = self.client.get_object(**self.at(key), **asked)
                except self.client.exceptions.ClientError as error:
                    if error_code(error) == "AccessDenied" and not self._is_listed(key):
                        raise self._none(key) from error
                    if error_code(error) != "InvalidRange" or data:
                        raise
                    return b"", seen or "", 0  # the object ends before
                seen, total = str(answer["ETag"]), _total(answer)
                if length is None:
                    length = total if total <= self.whole_bytes else self.part_bytes
                length = min(length, total - start)
                before = len(data)
                with _closing(answer["Body"]) as body:
                    problem = _drain(body, data, length, to_the_end=start + length == total or "Range" in asked)
                if problem is None:
                    return bytes(data), seen, total
                tries = tries + 1 if len(data) <= before else 1
                if tries == BODY_ATTEMPTS:
                    raise problem
                if len(data) == length:  # all there, and its checksum is another
                    data.clear()
                    length = wanted
                time.sleep(random.uniform(0, 0.1 * 2**tries))

    def _head(self, key: str) -> ObjectStat | None:
        with self._errors(f"cannot read {key} in {self.url}"):
            try:
                found = self.client.head_object(**self.at(key))
            except self.client.exceptions.ClientError as error:
                code = error_code(error)
                # HEAD has no body that would say why; a listing has.
                if code in ("400", "403") and not self._is_listed(key) and code == "403":
                    return None
                if code not in _NO_KEY:
                    raise
                self._see_bucket()
                return None
            return ObjectStat(int(found["ContentLength"]), str(found["ETag"]))

    def _is_listed(self, key: str) -> bool:
        """Whether there is such an object. Whoever may list below a prefix only is denied a missing object, not told of it:
        https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html
        """
        name = self.at(key)["Key"]
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=name, MaxKeys=1).get("Contents", [])
        return bool(found) and found[0]["Key"] == name  # itself comes before what it is the beginning of

    def _see_bucket(self) -> None:
        """A HEAD does not tell a missing object from a missing bucket."""
        if not self._bucket_seen:
            try:
                self.client.head_bucket(Bucket=self.bucket)
            except self.client.exceptions.ClientError as error:
                if error_code(error) in _NO_KEY:
                    raise _as_client_error({"Code": "NoSuchBucket"}) from error
                raise
            self._bucket_seen = True

    # ---- what they share ----

    def at(self, key: str) -> dict[str, str]:
        """Where `key` lies, as boto3 takes it. StoreError for what is no key."""
        check_key(key)
        name = f"{self.prefix}/{key}" if self.prefix else key
        try:
            fits = len(name.encode()) <= KEY_LENGTH
        except UnicodeEncodeError:
            fits = False
        if not fits or any(ord(letter) < 32 or letter in "\x7f\ufffe\uffff" for letter in name):  # XML has none of them
            raise StoreError(f"{key[:100]!r} is no object key")
        return {"Bucket": self.bucket, "Key": name}

    def _prefix_of(self, prefix: str) -> str:
        if "/" in prefix:
            check_key(prefix.rpartition("/")[0])
        return f"{self.prefix}/{prefix}" if self.prefix else prefix

    @contextmanager
    def _errors(self, doing: str, key: str = "") -> Iterator[None]:
        from botocore.exceptions import ClientError

        try:
            with aws_errors(doing):
                try:
                    yield
                except ClientError as error:
                    if key and error_code(error) in _NO_KEY:
                        raise self._none(key) from error
                    if key and error_code(error) in ("PreconditionFailed", "412"):
                        raise has_changed(key, self.url) from error
                    raise
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise StoreError(f"{doing}: {where}{error.strerror or error}") from error

    def _none(self, key: str) -> StoreError:
        return StoreError(f"there is no object {key} in {self.url}")

    def in_order(self, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Do `jobs` in threads, some ahead; their results in order. All callers together hold 2 * `threads` results at most.

        What fails ends it, when those under way have ended. Ctrl-C waits for none of them.
        """
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="smlt-s3")
        under_way: deque[Future[T]] = deque()
        held = 0
        try:
            for job in jobs:
                # Who has something to give does not wait for others: so there is always one who goes on.
                while len(under_way) == self.threads or not self._places.acquire(blocking=not under_way):
                    yield under_way.popleft().result()
                    held -= 1
                    self._places.release()
                held += 1
                under_way.append(self._executor.submit(job))
            while under_way:
                yield under_way.popleft().result()
        except BaseException as error:
            running = [future for future in under_way if not future.cancel()]
            if isinstance(error, Exception):
                wait(running)
            raise
        finally:
            for _ in range(held):
                self._places.release()

    def _count(self, event_name: str, **_: Any) -> None:
        with self._lock:
            self.requests[_CLASS.get(event_name.rpartition(".")[2], "put")] += 1


def _bucket_and_prefix(url: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
    if not url.startswith("s3://") or not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"object store {url!r}: {bucket!r} is no bucket's name: give s3://bucket/prefix")
    if prefix:
        try:
            check_key(prefix)
        except StoreError as error:
            raise ConfigError(f"object store {url!r}: {error}") from None
    return bucket, prefix


def _total(answer: dict[str, Any]) -> int:
    """The size of the object of which this is a part or the whole."""
    if "ContentRange" in answer:
        return int(str(answer["ContentRange"]).rpartition("/")[2])
    return int(answer["ContentLength"])


@contextmanager
def _closing(body: Any) -> Iterator[Any]:
    try:
        yield body
    finally:
        body.close()


def _drain(body: Any, data: bytearray, length: int, to_the_end: bool) -> BaseException | None:
    """Read into `data` until it holds `length` bytes; what went wrong on the way, if it may go better the next time."""
    from botocore import exceptions

    try:
        while len(data) < length:
            piece = body.read(min(_CHUNK, length - len(data)))
            if not piece:
                raise exceptions.IncompleteReadError(actual_bytes=len(data), expected_bytes=length)
            data += piece
        if to_the_end:
            body.read(1)  # nothing comes: checksums are compared, and the connection can be used again
    except (exceptions.HTTPClientError, exceptions.IncompleteReadError, exceptions.FlexibleChecksumError, OSError) as error:
        broken: BaseException = error
        return broken
    return None


def _as_client_error(described: dict[str, Any]) -> Exception:
    from botocore.exceptions import ClientError

    error: Exception = ClientError({"Error": {**described, "Code": described.get("Code", "")}}, "DeleteObjects")
    return error


def file_part(path: Path, start: int, length: int) -> bytes:
    """Exactly so many bytes of a file; StoreError when it has become shorter."""
    with path.open("rb") as file:
        data = os.pread(file.fileno(), length, start)
    if len(data) != length:
        raise StoreError(f"{path} has become shorter while it was uploaded")
    return data
