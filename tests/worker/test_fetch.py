"""What comes out of an object store is what was put there, and lands where it may: each attempt at less is named."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smlt.client.artifacts import ArtifactManager
from smlt.errors import CheckpointError, TaskError
from smlt.store.object import DirectoryObjectStore
from smlt.worker.data import fetch_code
from smlt.worker.files import fetch_data
from smlt.worker.manifest import check_names, read_manifest, write_manifest
from smlt.worker.task import load_task


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def uploaded(root: Path, kind: str = "code", **files: bytes) -> tuple[DirectoryObjectStore, str]:
    """A store with these files (a "/" in a name is written "__", a "." "_dot_") and their manifest; its SHA-256."""
    objects = DirectoryObjectStore(root / "objects")
    contents = {name.replace("__", "/").replace("_dot_", "."): content for name, content in files.items()}
    for name, content in contents.items():
        objects.put(f"run/{kind}/{name}", content)
    return objects, write_manifest(objects, f"run/{kind}", {name: digest(content) for name, content in contents.items()})


@pytest.mark.parametrize("fetch", [fetch_code, fetch_data])
def test_files_come_as_they_were_uploaded(tmp_path: Path, fetch: Callable[..., Path]) -> None:
    kind = fetch.__name__.removeprefix("fetch_")
    objects, _ = uploaded(tmp_path, kind, a_dot_py=b"x = 1", deep__er__b_dot_py=b"y = 2")
    folder = fetch(objects, f"run/{kind}", tmp_path / "scratch")
    assert folder == tmp_path / "scratch"
    assert (folder / "a.py").read_bytes() == b"x = 1"
    assert (folder / "deep/er/b.py").read_bytes() == b"y = 2"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"a.py", "deep/er/b.py"}


@pytest.mark.parametrize("fetch", [fetch_code, fetch_data])
def test_a_file_that_was_changed_or_is_missing_is_refused(tmp_path: Path, fetch: Callable[..., Path]) -> None:
    objects = DirectoryObjectStore(tmp_path / "objects")
    with pytest.raises(CheckpointError, match=r"run/code/MANIFEST\.json is missing"):
        fetch(objects, "run/code", tmp_path / "none")
    objects, _ = uploaded(tmp_path, a_dot_py=b"x = 1")
    objects.put("run/code/a.py", b"x = 2")
    with pytest.raises(CheckpointError, match=r"run/code/a\.py is not what was uploaded"):
        fetch(objects, "run/code", tmp_path / "changed")
    objects.delete("run/code/a.py")
    with pytest.raises(CheckpointError, match=r"run/code/a\.py is missing"):
        fetch(objects, "run/code", tmp_path / "missing")
    assert not (tmp_path / "changed").exists()


def test_code_that_is_changed_after_it_was_checked_is_not_run(tmp_path: Path) -> None:
    objects, _ = uploaded(tmp_path, a_dot_py=b"x = 1")
    folder = fetch_code(objects, "run/code", tmp_path / "scratch")
    objects.put("run/code/a.py", b"x = 2")
    (tmp_path / "objects/run/code/a.py").write_bytes(b"x = 3")
    assert (folder / "a.py").read_bytes() == b"x = 1"
    assert not (folder / "a.py").is_symlink()


class Fickle(DirectoryObjectStore):
    """Gives a file as it was uploaded to whoever asks first, and something else ever after."""

    asked = 0

    def get(self, key: str) -> bytes:
        content = super().get(key)
        if key.endswith(".py"):
            self.asked += 1
            return content if self.asked == 1 else b"evil = 1"
        return content


def test_the_bytes_that_were_checked_are_the_bytes_that_run(tmp_path: Path) -> None:
    objects, _ = uploaded(tmp_path, a_dot_py=b"x = 1")
    assert (fetch_code(Fickle(objects.root), "run/code", tmp_path / "s") / "a.py").read_bytes() == b"x = 1"


@pytest.mark.parametrize("fetch", [fetch_code, fetch_data])
def test_a_file_that_was_put_beside_the_others_does_not_come_along(tmp_path: Path, fetch: Callable[..., Path]) -> None:
    objects, _ = uploaded(tmp_path, a_dot_py=b"import numpy")
    objects.put("run/code/numpy.py", b"raise SystemExit('not the real one')")
    assert [path.name for path in fetch(objects, "run/code", tmp_path / "s").iterdir()] == ["a.py"]


def test_a_manifest_that_was_exchanged_with_its_code_is_refused(tmp_path: Path) -> None:
    objects, bound = uploaded(tmp_path, a_dot_py=b"x = 1")
    fetch_code(objects, "run/code", tmp_path / "first", bound)
    uploaded(tmp_path, a_dot_py=b"x = 2")  # complete, and consistent in itself
    fetch_code(objects, "run/code", tmp_path / "unbound")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is not what was uploaded.*this run was started with"):
        fetch_code(objects, "run/code", tmp_path / "second", bound)


UNSAFE = {
    "../up.py": "leads out",
    "a/../../up.py": "leads out",
    "/etc/passwd": "is absolute",
    "a\\b.py": "backslash",
    "..\\up.py": "backslash",
    "a\0.py": "NUL",
    "C:up.py": "drive letter",
    "c:/up.py": "drive letter",
    "": "empty part",
    "a//b.py": "empty part",
    "a/./b.py": "empty part",
    "a/": "empty part",
    "manifest.JSON": "is the manifest's own",
}


@pytest.mark.parametrize("fetch", [fetch_code, fetch_data])
@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, fetch: Callable[..., Path], name: str) -> None:
    objects, _ = uploaded(tmp_path, a_dot_py=b"x = 1")
    write_manifest(objects, "run/code", {"a.py": digest(b"x = 1"), name: digest(b"x = 1")})
    with pytest.raises(CheckpointError, match=UNSAFE[name]) as caught:
        fetch(objects, "run/code", tmp_path / "scratch")
    assert repr(name) in str(caught.value)
    assert not (tmp_path / "scratch").exists()  # nothing was written before the last name was looked at


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("a.py", "A.py"), "'a.py' and 'A.py' are the same where case does not count"),
        (("D/a.py", "d/A.PY"), "the same where case"),
        (("stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE"), "the same where case"),
        (("\N{LATIN SMALL LETTER E WITH ACUTE}", "e\N{COMBINING ACUTE ACCENT}"), "the same where case"),
        (("a", "a/b"), "'a' is both a file and the folder of 'a/b'"),
        (("x/A/b", "x/a"), "'x/a' is both a file and the folder of 'x/A/b'"),
    ],
)
def test_two_names_for_one_file_are_refused(tmp_path: Path, names: tuple[str, str], told: str) -> None:
    objects = DirectoryObjectStore(tmp_path / "objects")
    write_manifest(objects, "run/code", dict.fromkeys(names, digest(b"")))
    with pytest.raises(CheckpointError, match=told):
        fetch_code(objects, "run/code", tmp_path / "scratch")


def test_a_name_that_stands_twice_in_the_manifest_is_refused(tmp_path: Path) -> None:
    objects, _ = uploaded(tmp_path, a_dot_py=b"x = 1")
    objects.put("run/code/MANIFEST.json", f'{{"a.py": "{digest(b"evil")}", "a.py": "{digest(b"x = 1")}"}}'.encode())
    with pytest.raises(CheckpointError, match="stands there twice"):
        fetch_code(objects, "run/code", tmp_path / "scratch")


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b'{"a.py": 7}', b'{"a.py": "AB"}', b"[" * 100_000])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    objects = DirectoryObjectStore(tmp_path / "objects")
    objects.put("run/code/MANIFEST.json", content)
    with pytest.raises(CheckpointError, match=r"run/code/MANIFEST\.json"):
        read_manifest(objects, "run/code")


@given(st.lists(st.text("aA./\\:\0C", max_size=6), max_size=3))
@example(["a", "a/b"])
def test_names_that_pass_stay_in_their_folder_and_apart(names: list[str]) -> None:
    try:
        check_names(names)
    except ValueError:
        return
    places = [os.path.normpath(os.path.join("/folder", name)) for name in names]
    assert all(place.startswith("/folder/") for place in places)
    assert len({place.casefold() for place in places}) == len(places)


@pytest.mark.parametrize("fetch", [fetch_code, fetch_data])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_link_out_of_the_object_store_is_refused(tmp_path: Path, fetch: Callable[..., Path], depth: int) -> None:
    objects, _ = uploaded(tmp_path, d__a_dot_py=b"x = 1")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.py").write_bytes(b"x = 1")
    place = objects.root / "run/code/d/a.py"
    place.unlink()
    if depth:
        place.parent.rmdir()
        place.parent.symlink_to(tmp_path / "outside")
    else:
        place.symlink_to(tmp_path / "outside" / "a.py")
    with pytest.raises(CheckpointError, match=r"run/code/d/a\.py.*leads out of the object store"):
        fetch(objects, "run/code", tmp_path / "scratch")


@pytest.mark.parametrize("depth", [0, 1])
def test_data_that_is_a_link_to_another_object_is_refused(tmp_path: Path, depth: int) -> None:
    objects, _ = uploaded(tmp_path, "data", d__a=b"x = 1")
    objects.put("other/a", b"x = 1")
    place = objects.root / "run/data/d/a"
    place.unlink()
    if depth:
        place.parent.rmdir()
        place.parent.symlink_to(objects.root / "other")
    else:
        place.symlink_to(objects.root / "other/a")
    with pytest.raises(CheckpointError, match="is a link to another file"):
        fetch_data(objects, "run/data", tmp_path / "scratch")


def test_data_is_not_copied(tmp_path: Path) -> None:
    objects, _ = uploaded(tmp_path, "data", big=b"x" * 1000)
    assert (fetch_data(objects, "run/data", tmp_path / "s") / "big").samefile(objects.root / "run/data/big")


def test_the_upload_tells_of_names_that_no_worker_would_take(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a").write_bytes(b"1")
    (data / "A").write_bytes(b"2")
    if len(list(data.iterdir())) == 1:
        pytest.skip("this file system takes them for one")
    artifacts = ArtifactManager(DirectoryObjectStore(tmp_path / "objects"), "run")
    with pytest.raises(TaskError, match="rename one"):
        artifacts.upload_data(data)
    (data / "A").rename(data / "MANIFEST.json")
    with pytest.raises(TaskError, match="is the manifest's own"):
        artifacts.upload_data(data)


def test_the_uploaded_codes_digest_is_known_to_the_artifact_manager(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text("x = 1\n")
    objects = DirectoryObjectStore(tmp_path / "objects")
    artifacts = ArtifactManager(objects, "run")
    artifacts.upload_code(tmp_path / "t.py")
    assert artifacts.code_sha256 == digest(objects.get("run/code/MANIFEST.json"))
    assert json.loads(objects.get("run/code/MANIFEST.json")) == {"t.py": digest(b"x = 1\n")}


def test_a_traceback_shows_the_code_when_its_folder_is_gone(tmp_path: Path) -> None:
    objects, _ = uploaded(tmp_path, t_dot_py=b"NUMBER = 1 / 0  # the line\n")
    folder = fetch_code(objects, "run/code", tmp_path / "scratch")
    with pytest.raises(TaskError) as caught:
        load_task(folder / "t.py")
    (folder / "t.py").unlink()
    assert "# the line" in "".join(traceback.format_exception(caught.value))
