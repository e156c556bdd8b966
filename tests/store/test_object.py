"""The object store in a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from smlt.errors import ConfigError, StoreError
from smlt.store.object import DirectoryObjectStore, open_object_store


@pytest.fixture
def objects(tmp_path: Path) -> DirectoryObjectStore:
    return DirectoryObjectStore(tmp_path / "objects")


def test_what_is_put_is_got(objects: DirectoryObjectStore, tmp_path: Path) -> None:
    objects.put("run/a/x.bin", b"0123456789")
    (tmp_path / "file").write_bytes(b"from a file")
    objects.put("run/b", tmp_path / "file")
    assert objects.get("run/a/x.bin") == b"0123456789"
    assert objects.get("run/b") == b"from a file"
    assert objects.get_range("run/a/x.bin", 3, 4) == b"3456"
    assert objects.get_range("run/a/x.bin", 8, 4) == b"89"
    assert objects.size("run/a/x.bin") == 10
    assert objects.open_path("run/b").read_bytes() == b"from a file"
    assert objects.list("run/") == ["run/a/x.bin", "run/b"]
    assert objects.list("run/a") == ["run/a/x.bin"]
    objects.delete("run/a/x.bin")
    objects.delete("run/a/x.bin")
    assert not objects.exists("run/a/x.bin")
    assert not (objects.root / "run" / "a").exists()


def test_a_missing_object_is_named(objects: DirectoryObjectStore) -> None:
    for read in (objects.get, objects.size, objects.open_path):
        with pytest.raises(StoreError, match="none"):
            read("run/none")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a\0b", "a\\b", ".", "a//b", "a/./b", "a/"])
def test_keys_that_lead_elsewhere_are_refused(objects: DirectoryObjectStore, key: str) -> None:
    with pytest.raises(StoreError, match="no object key"):
        objects.put(key, b"")
    assert not objects.root.exists()


@pytest.mark.parametrize("key", ["x" * 256, "y/" * 600 + "z", "\ud800", ".put-x"])
def test_keys_that_no_file_can_have_are_refused_by_every_method(objects: DirectoryObjectStore, key: str) -> None:
    for method in (objects.get, objects.exists, objects.open_path, objects.size, objects.delete):
        with pytest.raises(StoreError, match="no object key"):
            method(key)


def test_a_loop_of_links_is_an_error_of_the_store(objects: DirectoryObjectStore) -> None:
    objects.root.mkdir()
    (objects.root / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match="loop"):
        objects.get("loop")


def test_a_file_to_put_that_is_missing_leaves_nothing(objects: DirectoryObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot write a in"):
        objects.put("a", tmp_path / "missing")
    assert objects.list("") == list(objects.root.iterdir()) == []


def test_a_range_that_is_none_is_refused(objects: DirectoryObjectStore) -> None:
    objects.put("a", b"0123")
    for start, length in ((-1, 2), (0, -1)):
        with pytest.raises(StoreError, match="cannot read a"):
            objects.get_range("a", start, length)


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
    with pytest.raises(ConfigError, match="not supported yet"):
        open_object_store("s3://bucket/prefix")
    with pytest.raises(ConfigError, match="give a directory"):
        open_object_store("ftp://x")
    for nowhere in ("", "file://", "file://another-host/x"):
        with pytest.raises(ConfigError, match="give a directory"):
            open_object_store(nowhere)
