"""The Artifact Manager: which files a script needs, and what is sent."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
from s3server import PART, Bucket

from smlt.client.artifacts import ArtifactManager, local_modules
from smlt.errors import StoreUnavailable, TaskError
from smlt.store.object import DirectoryObjectStore

pytest_plugins = ["s3fixtures"]


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_local_modules_are_found_through_other_local_modules(tmp_path: Path) -> None:
    write(
        tmp_path,
        task="import json, numpy\nfrom near import thing\ndef f():\n    import late\n",
        near="import package.sub\nimport task\n",  # a circle
        late="",
        not_imported="",
        package__in____init__="from . import other\n",
        package__in__sub="import far\n",
        package__in__other="",
        far="from plain.one import x\n",
        plain__in__one="x = 1\n",  # a package without __init__.py
    )
    found = {path.relative_to(tmp_path).as_posix() for path in local_modules(tmp_path / "task.py")}
    assert found == {
        *("task.py", "near.py", "late.py", "far.py", "plain/one.py"),
        *("package/__init__.py", "package/sub.py", "package/other.py"),
    }


def test_upload_code_writes_a_manifest_of_what_it_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    write(source, task="import near\n", near="x = 1\n")
    monkeypatch.chdir(source)
    objects = DirectoryObjectStore(tmp_path / "objects")
    assert ArtifactManager(objects, "run").upload_code(Path("task.py")) == "task.py"
    manifest = json.loads(objects.get("run/code/MANIFEST.json"))
    assert manifest == {f"{name}.py": sha256((source / f"{name}.py").read_bytes()).hexdigest() for name in ("task", "near")}
    assert objects.get("run/code/near.py") == b"x = 1\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"x = 1\nif x\n", r"broken\.py, line 2: expected ':'"),
        (b"x = '\xff'\n", r"broken\.py"),
        (b"x = 1\0\n", r"broken\.py"),
    ],
)
def test_a_module_that_is_no_python_is_named_with_its_line(tmp_path: Path, content: bytes, told: str) -> None:
    write(tmp_path, task="import broken\n")
    (tmp_path / "broken.py").write_bytes(content)
    with pytest.raises(TaskError, match=told):
        local_modules(tmp_path / "task.py")


def test_only_data_that_changed_is_sent_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "one").write_bytes(b"1" * 10)
    (data / "deep" / "two").write_bytes(b"2" * 100)
    objects = DirectoryObjectStore(tmp_path / "objects")
    artifacts = ArtifactManager(objects, "run")
    assert artifacts.upload_data(data) == 110
    assert artifacts.upload_data(data) == 0
    (data / "one").write_bytes(b"3" * 10)
    assert artifacts.upload_data(data) == 10
    assert objects.get("run/data/one") == b"3" * 10


def test_folders_that_are_no_data_are_left_out_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "big").write_bytes(b"x" * 1000)
    artifacts = ArtifactManager(DirectoryObjectStore(tmp_path / "runs"), "run")
    with pytest.raises(TaskError, match="empty"):
        artifacts.upload_data(tmp_path, leave_out=[tmp_path / "runs"])
    (tmp_path / "one").write_bytes(b"1")
    assert artifacts.upload_data(tmp_path, leave_out=[tmp_path / "runs"]) == 1
    # The data may lie below such a folder, which then leaves nothing out.
    assert artifacts.upload_data(tmp_path / "runs", leave_out=[tmp_path]) > 1000
    with pytest.raises(TaskError, match="no such folder"):
        artifacts.upload_data(tmp_path / "none")


# ---- in S3 ----


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(6):
        (folder / f"small-{number}").write_bytes(os.urandom(1000))
    (folder / "z-large").write_bytes(os.urandom(10 * PART))
    return folder


def test_data_goes_to_s3_once_and_progress_is_told(data: Path, bucket: Bucket) -> None:
    told: list[tuple[int, int]] = []
    objects = bucket.store()
    assert ArtifactManager(objects, "run", lambda *now: told.append(now)).upload_data(data) == 6000 + 10 * PART
    assert told[-1] == (6000 + 10 * PART,) * 2
    assert told == sorted(told)
    assert objects.get("run/data/z-large") == (data / "z-large").read_bytes()
    told.clear()
    objects.requests.clear()
    assert ArtifactManager(objects, "run", lambda *now: told.append(now)).upload_data(data) == 0
    assert told == []
    assert objects.requests["put"] == 1  # the manifest
    assert objects.list("run/data.") == []


@pytest.mark.parametrize("how", [KeyboardInterrupt, StoreUnavailable])
def test_an_interrupted_upload_sends_only_the_rest_when_it_is_begun_again(
    data: Path, bucket: Bucket, how: type[BaseException]
) -> None:
    objects = bucket.store(threads=1)
    sent: list[int] = []

    def interrupt(now: int, _: int) -> None:
        sent.append(now)
        if now >= 6000 + 4 * PART:
            raise how("in the middle")

    with pytest.raises(how):
        ArtifactManager(objects, "run", interrupt).upload_data(data)
    assert not objects.exists("run/data/MANIFEST.json")
    assert len(objects.unfinished("")) == 1

    objects = bucket.store()
    assert ArtifactManager(objects, "run").upload_data(data) == 10 * PART  # of these, four parts are there
    assert objects.requests["put"] == 6 + 1 + 1  # six parts, the object, the manifest
    assert objects.unfinished("") == []
    assert set(objects.list("run/")) == {f"run/data/{name}" for name in (*names(data), "MANIFEST.json")}
    assert objects.get("run/data/z-large") == (data / "z-large").read_bytes()


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_file_that_is_written_to_while_it_is_uploaded_is_an_error(data: Path, bucket: Bucket) -> None:
    def write(now: int, total: int) -> None:
        if now == total:
            (data / "z-large").write_bytes(os.urandom(10 * PART))

    with pytest.raises(TaskError, match="z-large was changed while it was uploaded"):
        ArtifactManager(bucket.store(threads=1), "run", write).upload_data(data)
