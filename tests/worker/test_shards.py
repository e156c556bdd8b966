"""Data sets over many files: the same samples from this disk, from a directory store by range, and from S3."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import smlt
from smlt.client.artifacts import ArtifactManager
from smlt.errors import ConfigError, SmltError, StoreError, StoreFull, TaskError
from smlt.store.object import DirectoryObjectStore, ObjectStore
from smlt.worker import files as module
from smlt.worker.data import take
from smlt.worker.files import DataFiles, LocalFiles, StreamedFiles, stats_of
from smlt.worker.manifest import read_manifest
from smlt.worker.shards import Shards

pytest_plugins = ["s3fixtures"]

RNG = np.random.default_rng(5)
BLOCK = 1 << 10


def streamed(objects: ObjectStore, data: Path, scratch: Path, **settings: Any) -> StreamedFiles:
    """The files in `data`, by way of the object store."""
    ArtifactManager(objects, "run").upload_data(data)
    digests = read_manifest(objects, "run/data")
    stats = stats_of(objects, "run/data", digests)
    return StreamedFiles(objects, "run/data", digests, stats, scratch, **{"block_bytes": BLOCK, **settings})


Opener = Callable[[], DataFiles]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(params=["local", "directory", "s3"])
def opened(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Opener:
    if request.param == "local":
        return lambda: LocalFiles(data)
    if request.param == "directory":
        return lambda: streamed(DirectoryObjectStore(tmp_path / "objects"), data, tmp_path / "scratch")
    bucket = request.getfixturevalue("bucket")
    return lambda: streamed(bucket.store(), data, tmp_path / "scratch")


def same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert list(one) == list(two)
        for name in one:
            same(one[name], two[name])
    elif isinstance(one, tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            same(a, b)
    else:
        np.testing.assert_array_equal(one, two, strict=True)


def check(shards: Shards, expected: list[Any]) -> None:
    """Every sample, one by one, from the end, and a batch in any order."""
    assert len(shards) == len(expected)
    order = RNG.permutation(len(expected))
    for wanted, got in zip([expected[i] for i in order], shards.__getitems__(order), strict=True):
        same(got, wanted)
    same(shards[0], expected[0])
    same(shards[-1], expected[-1])
    with pytest.raises(IndexError):
        shards[len(expected)]


ARRAYS = {
    "f4": RNG.normal(size=(40, 3, 5)).astype("f4"),
    "u1": RNG.integers(0, 255, (17, 700), "u1"),  # rows over several blocks
    "labels": RNG.integers(0, 9, 300),
    "big": RNG.normal(size=(5, 2000)).astype(">f8"),
    "empty rows": np.zeros((4, 0, 2), "f2"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_rows_of_npy_files_come_one_file_behind_the_other(data: Path, opened: Opener, kind: str) -> None:
    array = ARRAYS[kind]
    (data / "deep").mkdir()
    np.save(data / "x-0.npy", array)
    np.save(data / "x-1.npy", array[:0])
    np.save(data / "x-2.npy", array[::-1])
    np.save(data / "other.npy", np.zeros(3))
    shards = smlt.open_shards(opened(), "x-*.npy")
    assert shards.names == ["x-0.npy", "x-1.npy", "x-2.npy"]
    check(shards, [*array, *array[::-1]])
    batch = take(shards, np.array([3, 1]))
    np.testing.assert_array_equal(batch, array[[3, 1]].astype(array.dtype.newbyteorder("=")), strict=True)
    assert batch.flags.writeable
    assert take(shards, np.array([], np.int64)).shape == (0, *array.shape[1:])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, safetensors.numpy.save_file])
def test_rows_of_named_arrays_are_dicts_or_the_tuple_that_was_asked_for(data: Path, opened: Opener, save: Any) -> None:
    x, y = RNG.normal(size=(30, 40)).astype("f4"), np.arange(30)
    for number in (0, 1):
        path, arrays = data / f"{number}", {"y": y + number, "x": x}
        save(arrays, f"{path}.safetensors") if save is safetensors.numpy.save_file else save(path, **arrays)
    files = opened()
    check(smlt.open_shards(files), [{"x": x[i], "y": y[i] + n} for n in (0, 1) for i in range(30)])
    check(smlt.open_shards(files, columns=("y", "x")), [(y[i] + n, x[i]) for n in (0, 1) for i in range(30)])
    features = take(smlt.open_shards(files, columns=("x",)), np.array([31, 2]))
    np.testing.assert_array_equal(features[0], x[[1, 2]])
    with pytest.raises(TaskError, match="has no array 'z': it has x, y"):
        smlt.open_shards(files, columns=("x", "z"))


def test_a_compressed_array_beside_a_plain_one_gives_the_same_rows(data: Path, opened: Opener) -> None:
    x, y = RNG.normal(size=(30, 40)), np.arange(30)
    with zipfile.ZipFile(data / "a.npz", "w") as archive:
        for name, array, how in (("x", x, zipfile.ZIP_DEFLATED), ("y", y, zipfile.ZIP_STORED)):
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(f"{name}.npy", content.getvalue(), how)
    check(smlt.open_shards(opened(), columns=("y", "x")), list(zip(y, x, strict=True)))


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_tar_file_are_grouped_by_name(data: Path, opened: Opener, form: int) -> None:
    expected = []
    for shard in (0, 1):
        with tarfile.open(data / f"train-{shard}.tar", "w", format=form) as archive:
            folder = tarfile.TarInfo("deep")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            add(archive, "README", b"no sample")
            add(archive, "deep/.hidden.txt", b"neither")
            for number in range(12):
                array, image = RNG.normal(size=(2, 3)), RNG.bytes(400 * number)
                content = io.BytesIO()
                np.save(content, array)
                name = f"{'n' * 60}/{'n' * 60}{number:04d}"
                add(archive, f"{name}.seg.npy", content.getvalue())
                add(archive, f"{name}.JPG", image)
                add(archive, f"{name}.cls", b"7\n")
                add(archive, f"{name}.json", json.dumps({"number": number}).encode())
                add(archive, f"{name}.txt", "wörter".encode())
                expected.append({"seg.npy": array, "jpg": image, "cls": 7, "json": {"number": number}, "txt": "wörter"})
    files = opened()
    check(smlt.open_shards(files, "*.tar"), expected)
    check(smlt.open_shards(files, "*.tar", columns=("cls", "jpg")), [(one["cls"], one["jpg"]) for one in expected])
    with pytest.raises(TaskError, match=r"has no \.png: it has seg\.npy, jpg"):
        smlt.open_shards(files, "*.tar", columns=("png",))


def test_other_files_are_a_sample_each_and_transform_makes_arrays_of_them(data: Path, opened: Opener) -> None:
    contents = [RNG.bytes(size) for size in (0, 10, 5000)]
    for number, content in enumerate(contents):
        (data / f"{number}.bin").write_bytes(content)
    files = opened()
    check(smlt.open_shards(files), contents)
    lengths = smlt.open_shards(files, transform=lambda sample: np.array(len(sample)))
    assert take(lengths, np.array([2, 0])).tolist() == [5000, 0]


def test_a_name_may_lie_about_the_format(data: Path) -> None:
    np.save(data / "a.npy", np.arange(4))
    (data / "a.npy").rename(data / "a.dat")
    assert len(smlt.open_shards(LocalFiles(data), format="npy")) == 4
    with pytest.raises(ConfigError, match="choose one of npy"):
        smlt.open_shards(LocalFiles(data), format="csv")


# ---- what is no data ----


def npy(array: Any, **settings: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, **settings)
    return content.getvalue()


def npz(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return content.getvalue()


def tensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tar(*names: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            add(archive, name, b"x" * 600)
    return content.getvalue()


F4 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "pickled": ("a.npy", npy(np.array([{}, {}], object), allow_pickle=True), "would have to be unpickled"),
    "fortran": ("a.npy", npy(np.zeros((3, 2), order="F")), "Fortran order"),
    "scalar": ("a.npy", npy(np.float32(1)), "single number"),
    "cut npy": ("a.npy", npy(np.zeros(9))[:-1], "it is not whole"),
    "long npy": ("a.npy", npy(np.zeros(9)) + b"x", "it is not whole"),
    "no npy": ("a.npy", b"hello", "no .npy file"),
    "empty npy": ("a.npy", b"", "no .npy file"),
    "no npz": ("a.npz", b"PK hello", "no .npz file"),
    "cut npz": ("a.npz", npz(x=npy(np.zeros(9)))[:-5], "no .npz file"),
    "lying npz": ("a.npz", npz(x=npy(np.zeros(9))[:-30]), "x in the data file .* is cut off"),
    "pickled npz": ("a.npz", npz(x=npy(np.array([{}], object), allow_pickle=True)), "x in the data file a.npz holds Python"),
    "empty npz": ("a.npz", npz(), "holds no array"),
    "lengths": ("a.npz", npz(x=npy(np.zeros(2)), y=npy(np.zeros(3))), r"different lengths \(x 2, y 3\)"),
    "short header": ("a.safetensors", b"\xff" * 4, "no .safetensors file"),
    "long header": ("a.safetensors", b"\xff" * 12, "no .safetensors file"),
    "no json": ("a.safetensors", tensors(b"{"), "no .safetensors file"),
    "deep json": ("a.safetensors", tensors(b"[" * 100_000), "no .safetensors file"),
    "list": ("a.safetensors", tensors([1]), "no .safetensors file"),
    "no shape": ("a.safetensors", tensors({"x": {"dtype": "F32", "data_offsets": [0, 8]}}), "KeyError: 'shape'"),
    "negative": ("a.safetensors", tensors({"x": {**F4, "data_offsets": [-8, 0]}}, bytes(8)), "offsets that do not fit"),
    "too large": ("a.safetensors", tensors({"x": {**F4, "shape": [3]}}, bytes(12)), "offsets that do not fit"),
    "cut tensors": ("a.safetensors", tensors({"x": F4}, bytes(7)), "x in the data file .* is cut off"),
    "bfloat16": ("a.safetensors", tensors({"x": {**F4, "dtype": "BF16"}}, bytes(8)), "BF16, which NumPy has not"),
    "no tar": ("a.tar", b"x" * 2000, "no .tar file"),
    "empty tar": ("a.tar", b"", "no .tar file"),
    "cut tar": ("a.tar", tar("a.x", "b.x")[:1800], "cut off"),
    "twice": ("a.tar", tar("a.x", "a.X"), "a.X twice"),
    "no sample": ("a.tar", tar("README"), "hold no sample"),
    "packed": ("a.tar.gz", b"", "is compressed"),
}


def read_all(files: DataFiles) -> list[Any]:
    shards = smlt.open_shards(files)
    return shards.__getitems__(range(len(shards)))


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("far", [False, True], ids=["local", "streamed"])
def test_a_file_that_is_not_what_its_name_says_is_named(data: Path, tmp_path: Path, case: str, far: bool) -> None:
    name, content, text = BROKEN[case]
    (data / name).write_bytes(content)
    files: DataFiles = LocalFiles(data)
    if far:
        files = streamed(DirectoryObjectStore(tmp_path / "objects"), data, tmp_path / "scratch")
    with pytest.raises(TaskError, match=text) as caught:
        read_all(files)
    assert name in str(caught.value) or case == "no sample"


def test_a_part_of_a_sample_that_cannot_be_read_is_named(data: Path) -> None:
    with tarfile.open(data / "a.tar", "w") as archive:
        add(archive, "one.json", b"{")
        add(archive, "two.cls", b"cat")
        add(archive, "three.npy", npy(np.array([{}], object), allow_pickle=True))
    shards = smlt.open_shards(LocalFiles(data))
    for index, text in enumerate(["'one'.*json", "'two'.*cls", "'three'.*npy"]):
        with pytest.raises(TaskError, match=text):
            shards[index]


def test_files_whose_samples_differ_are_named(data: Path) -> None:
    np.save(data / "a.npy", np.zeros((2, 3), "f4"))
    np.save(data / "b.npy", np.zeros((2, 4), "f4"))
    with pytest.raises(TaskError, match=r"a\.npy and b\.npy differ: float32 \(3,\), and float32 \(4,\)"):
        smlt.open_shards(LocalFiles(data))
    with pytest.raises(TaskError, match=r"no data file fits 'c\*': --data has a\.npy, b\.npy"):
        smlt.open_shards(LocalFiles(data), "c*")


# ---- files ----


def test_files_are_read_as_files(data: Path, opened: Opener) -> None:
    content = RNG.bytes(10 * BLOCK + 5)
    (data / "deep").mkdir()
    (data / "deep/a.bin").write_bytes(content)
    (data / "b.bin").write_bytes(b"")
    files = opened()
    assert files.names() == ["b.bin", "deep/a.bin"]
    assert files.names("*a.bin") == ["deep/a.bin"]
    assert files.size("deep/a.bin") == len(content)
    with files.open("deep/a.bin") as file:
        assert file.read() == content
        assert file.seek(-7, 2) == len(content) - 7
        assert file.read(100) == content[-7:]
        assert file.seek(3) == 3
        assert file.read(2 * BLOCK) == content[3 : 3 + 2 * BLOCK]
        assert file.seek(1, 1) == 4 + 2 * BLOCK
        assert file.read(1) == content[4 + 2 * BLOCK : 5 + 2 * BLOCK]
    with files.open("b.bin") as file:
        assert file.read() == b""
    assert files.path("deep/a.bin").read_bytes() == content
    with pytest.raises(TaskError, match="ends before byte"):
        files.read([("deep/a.bin", 10 * BLOCK, 6)])
    for name in ("c", "../data/b.bin", "deep"):
        with pytest.raises(TaskError, match=r"there is no data file .*: --data has b\.bin, deep/a\.bin"):
            files.size(name)


def test_blocks_are_kept_and_bounded(data: Path, tmp_path: Path, bucket: Any) -> None:
    content = RNG.bytes(64 * BLOCK)
    (data / "a").write_bytes(content)
    objects = bucket.store()
    files = streamed(objects, data, tmp_path / "scratch", cache_bytes=8 * BLOCK)
    objects.requests.clear()
    wanted = [("a", number * BLOCK + 5, 10) for number in (1, 2, 3, 7, 2)]
    expected = [content[start : start + length] for _, start, length in wanted]
    assert files.read(wanted) == expected
    assert objects.requests == {"get": 2}  # 1 to 3 in one, 7
    assert files.read(wanted) == expected
    assert objects.requests == {"get": 2}
    files.read([("a", number * BLOCK, 1) for number in range(20, 27)])
    assert files._kept == 8 * BLOCK
    assert files.read(wanted) == expected
    assert objects.requests["get"] == 2 + 1 + 3  # 2 was used last and is still there


def test_a_tar_files_bodies_are_skipped(data: Path, tmp_path: Path, bucket: Any) -> None:
    with tarfile.open(data / "a.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number}.bin", bytes(200 * BLOCK))
    objects = bucket.store()
    files = streamed(objects, data, tmp_path / "scratch")
    assert len(smlt.open_shards(files)) == 4
    assert files._kept < 100 * BLOCK


@pytest.mark.parametrize("far", ["directory", "s3"])
def test_a_file_that_is_put_anew_while_it_is_streamed_is_an_error(
    request: pytest.FixtureRequest, data: Path, tmp_path: Path, far: str
) -> None:
    objects: ObjectStore = DirectoryObjectStore(tmp_path / "objects")
    if far == "s3":
        objects = request.getfixturevalue("bucket").store()
    np.save(data / "a.npy", np.zeros((100, 1000)))
    shards = smlt.open_shards(streamed(objects, data, tmp_path / "scratch"))
    shards[3]
    objects.put("run/data/a.npy", npy(np.ones((100, 1000))))
    with pytest.raises(StoreError, match=r"run/data/a\.npy .*has changed since it was opened"):
        shards[50]


def test_what_does_not_fit_is_streamed_and_what_needs_a_folder_is_told_how_much_it_lacks(
    data: Path, tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(data / "a.npy", np.arange(30_000))
    np.save(data / "b.npy", np.arange(10))
    objects, scratch = bucket.store(), tmp_path / "scratch"
    ArtifactManager(objects, "run").upload_data(data)
    assert module.open_data(objects, "run/data", scratch / "roomy").folder() == scratch / "roomy"
    assert np.load(scratch / "roomy/a.npy").sum() == sum(range(30_000))

    monkeypatch.setattr(module, "room", lambda folder: 100_000)
    objects.requests.clear()
    files = module.open_data(objects, "run/data", scratch / "tight")
    assert isinstance(files, StreamedFiles)
    assert objects.requests == {"get": 2, "list": 1}  # the manifest: is there one, and what it says
    told = r"needs 0\.2 MB, and .*tight has room for 0\.1 MB: give it more room .*ephemeral storage"
    for needy in (files.folder, lambda: files.path("a.npy"), lambda: module.fetch_data(objects, "run/data", scratch / "t2")):
        with pytest.raises(StoreFull, match=told.replace("tight", "(tight|t2)")):
            needy()
    assert not (scratch / "t2").exists()
    assert np.load(files.path("b.npy")).tolist() == list(range(10))
    assert [sample.item() for sample in smlt.open_shards(files, "a*").__getitems__([29_999, 5])] == [29_999, 5]
    task = type("T", (smlt.Task,), {})()
    task.data_files = files
    with pytest.raises(SmltError, match="ephemeral storage"):
        _ = task.data_dir


def test_a_file_that_is_not_the_manifests_is_refused_when_it_is_brought(data: Path, tmp_path: Path, bucket: Any) -> None:
    (data / "a").write_bytes(b"1" * 1000)
    objects = bucket.store()
    files = streamed(objects, data, tmp_path / "scratch")
    objects.put("run/data/a", b"2" * 1000)
    for bring in (lambda: files.path("a"), lambda: module.fetch_data(objects, "run/data", tmp_path / "s2")):
        with pytest.raises(SmltError, match=r"run/data/a is not what was uploaded"):
            bring()
    assert not (tmp_path / "scratch/a").exists()
    assert not (tmp_path / "s2").exists()
