"""The object store in S3: what is large, what breaks off, what is refused. moto stands in for Amazon's S3."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from groups import in_parallel
from proxy import Connection, Proxy
from s3server import PART, Answering, Bucket, settle

from smlt.errors import ConfigError, SmltError, StoreAuthError, StoreError, StoreFull, StoreUnavailable
from smlt.store.object import open_object_store
from smlt.store.s3 import S3ObjectStore
from smlt.store.s3_upload import part_length

pytest_plugins = ["s3fixtures"]


@pytest.fixture
def proxy(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between boto3 and S3."""
    with Proxy(SimpleNamespace(tcp_url=bucket.endpoint)) as made:  # type: ignore[arg-type]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{made.url.partition('://')[2]}")
        yield made


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(10 * PART + 7))
    return path


def test_a_large_object_goes_and_comes_in_parts(bucket: Bucket, large: Path, tmp_path: Path) -> None:
    objects, sent, came = bucket.store(), list[int](), list[int]()
    objects.put("run/file", large, sent.append)
    assert objects.requests == {"put": 1 + 11 + 1, "list": 1}  # begun, parts, completed; whether there was an upload
    assert sum(sent) == 10 * PART + 7
    objects.put("run/bytes", large.read_bytes())
    objects.requests.clear()
    assert objects.get("run/bytes") == large.read_bytes()
    assert objects.requests == {"get": 11}
    objects.fetch("run/file", tmp_path / "copy", came.append)
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()
    assert max(came) == PART
    assert objects.unfinished("") == []


def test_many_large_files_at_a_time_come_whole_and_hold_few_parts(bucket: Bucket, large: Path, tmp_path: Path) -> None:
    objects = bucket.store(threads=2)
    objects.put("x", large)
    outcomes = in_parallel([lambda n=n: objects.fetch("x", tmp_path / str(n)) for n in range(8)])  # type: ignore[misc]
    assert [outcome.error for outcome in outcomes] == [None] * 8
    assert {(tmp_path / str(number)).read_bytes() for number in range(8)} == {large.read_bytes()}
    with pytest.raises(StoreError):
        objects.fetch("x", tmp_path / "1")
    assert objects._places._value == 4  # all were given back


def test_parts_are_as_many_as_s3_takes() -> None:
    assert part_length(100, 8 << 20) == 8 << 20
    largest = 5 << 40
    length = part_length(largest, 8 << 20)
    assert -(-largest // length) <= 10_000
    assert length % (1 << 20) == 0


class Interrupted(BaseException):
    """As Ctrl-C."""


def interrupt_at(objects: S3ObjectStore, number: int, error: BaseException) -> None:
    """Let the upload of part `number`, and of all after it, fail."""

    def before(params: dict[str, Any], **_: Any) -> None:
        if params["PartNumber"] >= number:
            raise error

    objects.client.meta.events.register("before-parameter-build.s3.UploadPart", before)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreUnavailable("gone")])
def test_an_interrupted_upload_is_gone_on_with_and_only_what_is_missing_is_sent(
    bucket: Bucket, large: Path, error: BaseException
) -> None:
    interrupted = bucket.store(threads=1)
    interrupt_at(interrupted, 7, error)
    with pytest.raises(type(error)):
        interrupted.put("run/file", large)
    assert interrupted.requests["put"] == 1 + 6
    assert not interrupted.exists("run/file")

    objects, progress = bucket.store(), list[int]()
    objects.put("run/file", large, progress.append)
    assert objects.requests["put"] == 5 + 1  # parts 7 to 11, and completed
    assert sum(progress) == large.stat().st_size
    assert objects.get("run/file") == large.read_bytes()
    assert objects.unfinished("") == []


def test_ctrl_c_ends_a_part_that_is_on_its_way(bucket: Bucket, large: Path) -> None:
    objects, asked = bucket.store(threads=1), list[int]()

    def progress(count: int) -> None:
        asked.append(count)
        if len(asked) > 12:  # there are 11 parts
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        objects.put("run/file", large, progress)
    assert sum(asked) < large.stat().st_size
    assert len(objects.unfinished("a/prefix/run/file")) == 1


def test_parts_of_another_content_are_sent_again(bucket: Bucket, large: Path) -> None:
    interrupted = bucket.store(threads=1)
    interrupt_at(interrupted, 7, StoreUnavailable("gone"))
    with pytest.raises(StoreUnavailable):
        interrupted.put("run/file", large)
    changed = bytearray(large.read_bytes())
    changed[PART] ^= 1
    large.write_bytes(changed)
    objects = bucket.store()
    objects.put("run/file", large)
    assert objects.requests["put"] == 1 + 5 + 1  # the second part, 7 to 11, completed
    assert objects.get("run/file") == changed


def test_an_upload_that_another_has_given_up_is_begun_anew(
    bucket: Bucket, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.s3 import exceptions, models

    really = models.S3Backend.complete_multipart_upload

    def as_s3_does(*arguments: Any, **more: Any) -> Any:
        try:
            return really(*arguments, **more)
        except KeyError:  # moto would answer that it is broken
            raise exceptions.NoSuchUpload(upload_id="x") from None

    monkeypatch.setattr(models.S3Backend, "complete_multipart_upload", as_s3_does)
    interrupted = bucket.store(threads=1)
    interrupt_at(interrupted, 2, StoreUnavailable("gone"))
    with pytest.raises(StoreUnavailable):
        interrupted.put("run/file", large)
    objects, given_up = bucket.store(threads=1), list[int]()

    def give_up(**_: Any) -> None:
        if not given_up:
            given_up.append(interrupted.abort_unfinished("run/"))

    objects.client.meta.events.register("before-parameter-build.s3.CompleteMultipartUpload", give_up)
    objects.put("run/file", large)
    assert given_up == [1]
    assert objects.get("run/file") == large.read_bytes()


def test_bytes_that_could_not_be_put_leave_no_part(bucket: Bucket, large: Path) -> None:
    objects = bucket.store()
    interrupt_at(objects, 3, StoreUnavailable("gone"))
    with pytest.raises(StoreUnavailable):
        objects.put("run/bytes", large.read_bytes())
    assert objects.unfinished("") == []


def test_uploads_that_nobody_completes_are_aborted_below_a_prefix_only(bucket: Bucket) -> None:
    objects = bucket.store()
    for key in ("a/prefix/run/x", "a/prefix/run/y", "a/prefix/runner/z", "elsewhere"):
        bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    assert objects.abort_unfinished("run/") == 2
    assert [upload["Key"] for upload in objects.unfinished("")] == ["a/prefix/runner/z", "elsewhere"]


def test_a_file_that_shrinks_while_it_is_uploaded_is_an_error(bucket: Bucket, large: Path) -> None:
    objects = bucket.store(threads=1)

    def shrink(**_: Any) -> None:
        os.truncate(large, PART)

    objects.client.meta.events.register("before-parameter-build.s3.UploadPart", shrink)
    with pytest.raises(StoreError, match="has become shorter"):
        objects.put("run/file", large)


# ---- what breaks off ----


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_body_that_breaks_off_is_read_on_where_it_stopped(bucket: Bucket, proxy: Proxy, tmp_path: Path, how: str) -> None:
    objects, content = bucket.store(whole_bytes=64 * PART), os.urandom(40 * PART)
    objects.put("x", content)
    cut = list[Connection]()

    def cut_thrice(connection: Connection) -> None:
        if len(cut) < 3:
            cut.append(connection)
            connection.down.at(10 * PART, how)  # type: ignore[arg-type]

    proxy.on_connect = cut_thrice
    for connection in proxy.connections:
        connection.close()
    objects = bucket.store(whole_bytes=64 * PART)
    assert objects.get("x") == content
    assert len(cut) == 3
    assert objects.requests["get"] == 4
    cut.clear()
    objects = bucket.store()
    objects.fetch("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content


def test_a_body_that_always_breaks_off_is_given_up(bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smlt.store.s3.BODY_ATTEMPTS", 3)
    bucket.store().put("x", bytes(PART))

    def cut(connection: Connection) -> None:
        def drop_bodies(data: bytes) -> bytes:
            head, end, _ = data.partition(b"\r\n\r\n")
            connection.down.at(len(head + end), "close")
            return head + end

        connection.down.change = drop_bodies

    proxy.on_connect = cut
    objects = bucket.store(attempts=1)
    with pytest.raises(StoreUnavailable, match="cannot read x in s3://"):
        objects.get("x")
    assert objects.requests["get"] == 3


def test_what_arrives_changed_is_asked_for_again(bucket: Bucket, proxy: Proxy) -> None:
    content = bytes(PART)
    bucket.store().put("x", content)
    changed = list[int]()

    def change(connection: Connection) -> None:
        def flip(data: bytes) -> bytes:
            if not changed and data.endswith(bytes(100)):
                changed.append(1)
                return data[:-1] + b"\x01"
            return data

        connection.down.change = flip

    proxy.on_connect = change
    objects = bucket.store()
    assert objects.get("x") == content
    assert changed == [1]
    assert objects.requests["get"] == 2


def test_an_object_that_is_put_anew_while_it_is_read_is_an_error(bucket: Bucket, tmp_path: Path) -> None:
    objects = bucket.store(threads=1)
    objects.put("x", bytes(10 * PART))
    asked = list[int]()

    def put_anew(params: dict[str, Any], **_: Any) -> None:
        asked.append(1)
        if len(asked) == 4:
            bucket.client.put_object(Bucket=bucket.name, Key="a/prefix/x", Body=b"1" * 10 * PART)

    objects.client.meta.events.register("before-parameter-build.s3.GetObject", put_anew)
    with pytest.raises(StoreError, match="has changed since it was opened"):
        objects.fetch("x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_no_room_on_the_disk_leaves_no_part_of_a_file(bucket: Bucket, tmp_path: Path) -> None:
    objects = bucket.store()
    objects.put("x", bytes(10 * PART))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreFull, match=r"no room left on the disk of .* for x of s3://"):
        objects.fetch("x", tmp_path / "x", full)
    assert list(tmp_path.iterdir()) == []


# ---- lists and deletions ----


def test_thousands_are_listed_in_pages_and_deleted_in_batches(bucket: Bucket) -> None:
    from moto.s3.models import s3_backends

    objects = bucket.store()
    backend = s3_backends["123456789012"]["aws"]
    for number in range(2100):  # in moto's memory: 2100 requests would take longer
        backend.put_object(bucket.name, f"a/prefix/run/{number:05d}", b"x")
    bucket.client.put_object(Bucket=bucket.name, Key="a/prefix/run/", Body=b"")  # a folder, as the console makes one
    bucket.client.put_object(Bucket=bucket.name, Key="a/prefixed", Body=b"")
    keys = objects.list("run/")
    assert keys == [f"run/{number:05d}" for number in range(2100)]
    assert objects.list("run/0209") == [f"run/{number:05d}" for number in range(2090, 2100)]
    objects.requests.clear()
    objects.delete(*keys)
    assert objects.requests == {"delete": 3}
    assert objects.list("") == []


def test_a_key_that_cannot_be_deleted_is_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "<DeleteResult><Error><Key>a/prefix/y</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"
    with Answering(200, body) as server:
        settle(monkeypatch, server.endpoint)
        with pytest.raises(StoreAuthError, match=r"cannot delete a/prefix/y in s3://.*AccessDenied: no"):
            bucket.store().delete("x", "y")


# ---- what is refused ----


def told(operation: Any) -> tuple[type[SmltError], str]:
    with pytest.raises(SmltError) as caught:
        operation()
    assert "\n" not in str(caught.value)
    assert "the-secret-of-a-test" not in str(caught.value)
    return type(caught.value), str(caught.value)


def operations(objects: S3ObjectStore, tmp_path: Path) -> dict[str, Any]:
    return {
        "put": lambda: objects.put("k", b""),
        "get": lambda: objects.get("k"),
        "range": lambda: objects.get_range("k", 0, 1),
        "fetch": lambda: objects.fetch("k", tmp_path / "k"),
        "exists": lambda: objects.exists("k"),
        "size": lambda: objects.size("k"),
        "list": lambda: objects.list("k"),
        "delete": lambda: objects.delete("k", "l"),
        "abort": lambda: objects.abort_unfinished("k"),
    }


def test_a_missing_bucket_is_told_by_every_method(bucket: Bucket, tmp_path: Path) -> None:
    objects = bucket.store("s3://no-such-bucket-at-all/x")
    for name, operation in operations(objects, tmp_path).items():
        kind, text = told(operation)
        assert (kind, "there is no such bucket" in text) == (StoreError, True), (name, text)


REFUSED = [
    (403, "AccessDenied", StoreAuthError, "AWS denies it"),
    (403, "InvalidAccessKeyId", StoreAuthError, "does not know these credentials|AWS denies it"),
    (400, "ExpiredToken", StoreAuthError, "have expired"),
    (301, "PermanentRedirect", ConfigError, "another region"),
    (503, "SlowDown", StoreUnavailable, "try again in a minute"),
]


@pytest.mark.parametrize(("status", "code", "kind", "text"), REFUSED, ids=[code for _, code, *_ in REFUSED])
def test_what_is_refused_is_told_in_one_sentence_by_every_method(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, code: str, kind: type[SmltError], text: str
) -> None:
    headers = {"x-amz-bucket-region": "eu-west-1"} if status == 301 else {}
    with Answering(status, f"<Error><Code>{code}</Code><Message>of the test</Message></Error>", headers) as server:
        settle(monkeypatch, server.endpoint)
        for operation in operations(bucket.store(attempts=1), tmp_path).values():
            raised = told(operation)
            assert raised[0] is kind, raised
            assert re.search(text, raised[1]), raised


def test_credentials_that_expire_in_the_middle_are_told(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, large: Path) -> None:
    objects = bucket.store()
    objects.put("x", large)
    with Answering(400, "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>") as server:
        calls = list[int]()

        def expire(request: Any, **_: Any) -> None:
            calls.append(1)
            if len(calls) > 3:
                request.url = request.url.replace(bucket.endpoint, server.endpoint)

        objects.client.meta.events.register("before-send.s3.GetObject", expire)
        with pytest.raises(StoreAuthError, match=r"cannot read x in s3://.*have expired .ExpiredToken.: renew them"):
            objects.get("x")


def test_an_endpoint_that_cannot_be_reached_is_told(bucket: Bucket, proxy: Proxy) -> None:
    proxy.close()
    kind, text = told(lambda: bucket.store(attempts=1).get("x"))
    assert kind is StoreUnavailable
    assert "AWS cannot be reached" in text


def test_no_credentials_are_told(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    kind, text = told(lambda: bucket.store().list(""))
    assert kind is StoreAuthError
    assert "no AWS credentials" in text


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3://UPPER/x", "s3://b", "s3://bucket/a//b", "s3://bucket/../x"])
def test_what_is_no_bucket_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(ConfigError, match="object store"):
        open_object_store(url)


def test_urls_are_as_they_were_given_but_for_a_slash(bucket: Bucket) -> None:
    assert open_object_store("s3://bucket/a/b/").url == "s3://bucket/a/b"
    whole = open_object_store(f"s3://{bucket.name}")
    assert whole.url == f"s3://{bucket.name}"
    whole.put("run/x", b"1")
    assert bucket.client.get_object(Bucket=bucket.name, Key="run/x")["Body"].read() == b"1"
    assert whole.list("") == ["run/x"]


def test_a_directory_needs_no_boto3(tmp_path: Path) -> None:
    code = (
        "import sys; from smlt.store.object import open_object_store; from smlt.worker import data, checkpoint, main, task;"
        f"open_object_store({str(tmp_path)!r}).put('x', b''); print({{'boto3', 'botocore'}} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_missing_object_is_missing_too_for_whoever_may_list_below_a_prefix_only(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 denies him what is not there, unless he may list the whole bucket."""
    objects = bucket.store()
    objects.put("there-and-more", b"x")
    body = "<Error><Code>AccessDenied</Code><Message>no</Message></Error>"

    def deny(request: Any, event_name: str, **_: Any) -> Any:
        from botocore.awsrequest import AWSResponse

        answer = AWSResponse(request.url, 403, {}, None)
        answer._content = b"" if event_name.endswith("HeadObject") else body.encode()
        return answer

    for operation in ("HeadObject", "GetObject"):
        objects.client.meta.events.register(f"before-send.s3.{operation}", deny)
    assert not objects.exists("there")
    for missing in (lambda: objects.get("there"), lambda: objects.size("there"), lambda: objects.get_range("there", 0, 1)):
        assert told(missing) == (StoreError, f"there is no object there in {objects.url}")
    objects.put("there", b"x")
    for denied in (lambda: objects.get("there"), lambda: objects.exists("there")):
        assert told(denied)[0] is StoreAuthError
