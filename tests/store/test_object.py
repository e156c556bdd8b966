"""The object store: what holds for a directory and for a bucket alike, and then what a directory only has."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest

from smlt.errors import ConfigError, StoreError
from smlt.store.object import DirectoryObjectStore, ObjectStore, open_object_store

pytest_plugins = ["s3fixtures"]


@pytest.fixture
def objects(tmp_path: Path) -> DirectoryObjectStore:
    return DirectoryObjectStore(tmp_path / "objects")


@pytest.fixture(params=["directory", "s3"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "directory":
        return DirectoryObjectStore(tmp_path / "objects")
    store: ObjectStore = request.getfixturevalue("bucket").store()
    return store


def test_what_is_put_is_got(either: ObjectStore, tmp_path: Path) -> None:
    came: list[int] = []
    either.put("run/a/x.bin", b"0123456789", came.append)
    (tmp_path / "file").write_bytes(b"from a file")
    either.put("run/b", tmp_path / "file", came.append)
    either.put("run/empty", b"")
    assert sum(came) == 10 + 11
    assert either.get("run/a/x.bin") == b"0123456789"
    assert either.get("run/b") == b"from a file"
    assert either.get("run/empty") == b""
    assert either.get_range("run/a/x.bin", 3, 4) == b"3456"
    assert either.get_range("run/a/x.bin", 8, 4) == b"89"
    assert either.get_range("run/a/x.bin", 10, 4) == either.get_range("run/a/x.bin", 3, 0) == b""
    assert either.size("run/a/x.bin") == 10
    assert either.list("run/") == ["run/a/x.bin", "run/b", "run/empty"]
    assert either.list("run/a") == ["run/a/x.bin"]
    assert {key: found.size for key, found in either.stats("run/").items()} == {"run/a/x.bin": 10, "run/b": 11, "run/empty": 0}
    either.delete("run/a/x.bin")
    either.delete("run/a/x.bin")
    assert not either.exists("run/a/x.bin")
    assert either.exists("run/b")
    either.delete()
    either.delete("run/b", "run/none", "run/empty")
    assert either.list("") == []


@pytest.mark.parametrize("size", [0, 11, 5 * 65536 + 3])
def test_what_is_fetched_is_a_file_of_known_digest(either: ObjectStore, tmp_path: Path, size: int) -> None:
    content, came = os.urandom(size), list[int]()
    either.put("run/x", content)
    assert either.fetch("run/x", tmp_path / "deep/x", came.append) == sha256(content).hexdigest()
    assert (tmp_path / "deep/x").read_bytes() == content
    assert sum(came) == size
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x"]
    with pytest.raises(StoreError, match="none"):
        either.fetch("run/none", tmp_path / "none")
    with pytest.raises(StoreError, match="x"):
        either.fetch("run/x", tmp_path / "deep/x/below-a-file")
    with pytest.raises(StoreError, match="deep/x"):
        either.fetch("run/x", tmp_path / "deep/x")
    assert not (tmp_path / "none").exists()


def test_an_object_that_was_put_anew_is_not_read_on_as_the_old_one(either: ObjectStore) -> None:
    either.put("run/x", b"0123456789")
    version = either.stats("run/")["run/x"].version
    assert either.get_range("run/x", 2, 3, version) == b"234"
    either.put("run/x", b"abcdefghijk")
    with pytest.raises(StoreError, match=r"run/x in .* has changed since it was opened"):
        either.get_range("run/x", 2, 3, version)
    assert either.get_range("run/x", 2, 3, either.stats("run/x")["run/x"].version) == b"cde"


def test_an_empty_folder_is_not_left(objects: DirectoryObjectStore) -> None:
    objects.put("run/a/x.bin", b"")
    objects.put("run/b", b"")
    objects.delete("run/a/x.bin")
    assert not (objects.root / "run" / "a").exists()


def test_a_missing_object_is_named(either: ObjectStore) -> None:
    for read in (either.get, either.size):
        with pytest.raises(StoreError, match="none"):
            read("run/none")
    for length in (0, 1):
        with pytest.raises(StoreError, match="none"):
            either.get_range("run/none", 0, length)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a\0b", "a\\b", ".", "a//b", "a/./b", "a/"])
def test_keys_that_lead_elsewhere_are_refused(either: ObjectStore, key: str) -> None:
    with pytest.raises(StoreError, match="no object key"):
        either.put(key, b"")
    assert either.list("") == []


@pytest.mark.parametrize("key", ["x" * 256, "y/" * 600 + "z", "\ud800", ".put-x"])
def test_keys_that_no_file_can_have_are_refused_by_every_method(either: ObjectStore, tmp_path: Path, key: str) -> None:
    for method in (either.get, either.exists, either.size, either.delete):
        with pytest.raises(StoreError, match="no object key"):
            method(key)
    with pytest.raises(StoreError, match="no object key"):
        either.fetch(key, tmp_path / "x")


@pytest.mark.parametrize("key", ["run/a b", "run/ä ß.bin", "run/%41+&=?#", "run/'\"<>&amp;"])
def test_keys_of_any_letters_are_the_same_when_listed(either: ObjectStore, key: str) -> None:
    either.put(key, b"x")
    either.put(f"{key}2", b"y")
    assert either.list("run/") == [key, f"{key}2"]
    assert either.get(key) == b"x"
    either.delete(key, f"{key}2")
    assert either.list("run/") == []


def test_a_loop_of_links_is_an_error_of_the_store(objects: DirectoryObjectStore) -> None:
    objects.root.mkdir()
    (objects.root / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match="loop"):
        objects.get("loop")


def test_a_file_to_put_that_is_missing_leaves_nothing(either: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot write a .*No such file"):
        either.put("a", tmp_path / "missing")
    assert either.list("") == []
    assert not list((tmp_path / "objects").glob("*"))


def test_a_range_that_is_none_is_refused(either: ObjectStore) -> None:
    either.put("a", b"0123")
    for start, length in ((-1, 2), (0, -1)):
        with pytest.raises(StoreError, match="cannot read a"):
            either.get_range("a", start, length)


def test_a_link_out_of_the_root_is_not_followed(objects: DirectoryObjectStore, tmp_path: Path) -> None:
    objects.put("a", b"")
    (objects.root / "out").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="leads out"):
        objects.put("out/x", b"")


def test_a_put_that_fails_leaves_the_old_content_and_no_litter(
    objects: DirectoryObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put("a", b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StoreError, match="no room left"):
        objects.put("a", b"new")
    assert objects.get("a") == b"old"
    assert [path.name for path in objects.root.iterdir()] == ["a"]


def test_urls(tmp_path: Path) -> None:
    assert open_object_store(str(tmp_path)).url == str(tmp_path)
    assert open_object_store(f"file://{tmp_path}").url == str(tmp_path)
    with pytest.raises(ConfigError, match="give a directory"):
        open_object_store("ftp://x")
    for nowhere in ("", "file://", "file://another-host/x"):
        with pytest.raises(ConfigError, match="give a directory"):
            open_object_store(nowhere)
