"""The examples' loaders: pictures and text as people have them, here or in an object store; what is damaged is named."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import smlt
from smlt.client.artifacts import ArtifactManager
from smlt.errors import ConfigError, TaskError
from smlt.store.object import DirectoryObjectStore
from smlt.worker.data import take
from smlt.worker.files import StreamedFiles, stats_of
from smlt.worker.manifest import read_manifest

pytest.importorskip("PIL")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import bert_text  # noqa: E402
import resnet_images  # noqa: E402
from PIL import Image  # noqa: E402

RNG = np.random.default_rng(3)


def on_disk(folder: Path, scratch: Path) -> Any:
    task = smlt.Task()
    task.data_dir = folder
    return task


def streamed(folder: Path, scratch: Path) -> Any:
    """The files are in an object store, and read from there as they are needed."""
    objects, task = DirectoryObjectStore(scratch / "objects"), smlt.Task()
    ArtifactManager(objects, "run").upload_data(folder)
    digests = read_manifest(objects, "run/data")
    stats = stats_of(objects, "run/data", digests)
    task.data_files = StreamedFiles(objects, "run/data", digests, stats, scratch, block_bytes=1 << 10)
    return task


Opener = Callable[[Path, Path], Any]
everywhere = pytest.mark.parametrize("opener", [on_disk, streamed])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def cifar(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """The six files of CIFAR-10's binary version, with a few records each."""
    found = {}
    for count, name in enumerate([*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"], start=2):
        records = RNG.integers(0, 256, (count, resnet_images.CIFAR_RECORD_BYTES), dtype=np.uint8)
        records[:, 0] %= 10
        write(folder / "cifar-10-batches-bin" / name, records.tobytes())
        found[name] = records
    return found


def picture(seed: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@everywhere
def test_cifar_10_is_read_record_by_record_over_all_its_files(data: Path, tmp_path: Path, opener: Opener) -> None:
    files = cifar(data)
    found = resnet_images.open_images(opener(data, tmp_path))
    records = np.concatenate([files[f"data_batch_{number}.bin"] for number in range(1, 6)])
    assert (len(found.train), len(found.test), found.classes, found.pixels) == (20, 7, 10, 32)
    order = RNG.permutation(20)
    images, labels = take(found.train, order)
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (20, 3, 32, 32), np.int64)
    assert np.array_equal(images.reshape(20, -1), records[order, 1:])
    assert labels.tolist() == records[order, 0].tolist()
    assert take(found.test, np.array([6]))[1] == files["test_batch.bin"][6, 0]


def test_what_is_wrong_with_cifar_10_is_said(data: Path, tmp_path: Path) -> None:
    cifar(data)
    task, folder = on_disk(data, tmp_path), data / "cifar-10-batches-bin"
    with pytest.raises(ConfigError, match="64 pixels"):
        resnet_images.open_images(task, 64)
    second = (folder / "data_batch_2.bin").read_bytes()
    write(folder / "data_batch_2.bin", second[:-1])
    with pytest.raises(TaskError, match=r"data_batch_2\.bin is damaged: 9,218 bytes are no multiple of 3,073"):
        resnet_images.open_images(task)
    write(folder / "data_batch_2.bin", second[:3073] + b"\x0b" + second[3074:])
    found = resnet_images.open_images(task)
    take(found.train, np.array([2, 4]))
    with pytest.raises(TaskError, match=r"data_batch_2\.bin is damaged: record 1 is of class 11"):
        take(found.train, np.array([3]))
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(TaskError, match=r"not complete: there is no data_batch_2\.bin"):
        resnet_images.open_images(task)


def test_the_pickled_cifar_10_is_not_opened(data: Path, tmp_path: Path) -> None:
    write(data / "cifar-10-batches-py" / "data_batch_1", b"cos\nsystem\n")
    with pytest.raises(TaskError, match=r"pickled.*take the binary version, cifar-10-binary\.tar\.gz"):
        resnet_images.open_images(on_disk(data, tmp_path))


def class_folders(folder: Path) -> None:
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog", "emu")):
            for index in range(3):
                kind, ending = (("PNG", "png"), ("JPEG", "JPEG"), ("BMP", "bmp"))[index]
                write(folder / part / name / f"{index}.{ending}", picture(number * 3 + index, kind=kind))
    write(folder / "train" / "cat" / "notes.txt", b"no picture")


@everywhere
def test_folders_are_classes_and_pictures_are_cut_square(data: Path, tmp_path: Path, opener: Opener) -> None:
    class_folders(data)
    found = resnet_images.open_images(opener(data, tmp_path), 28)
    assert (len(found.train), len(found.test), found.classes, found.pixels) == (9, 9, 3, 28)
    images, labels = take(found.train, np.arange(9))
    assert (images.dtype, images.shape) == (np.uint8, (9, 3, 32, 32))  # an eighth more than a model sees
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(images[3], resnet_images.decoded(picture(3), "dog", 32))
    assert images[3].std() > 20


def test_a_damaged_picture_is_named_when_a_batch_wants_it(data: Path, tmp_path: Path) -> None:
    class_folders(data)
    whole = (data / "train/dog/1.JPEG").read_bytes()
    write(data / "train/dog/1.JPEG", whole[: len(whole) // 2])
    write(data / "train/emu/0.png", b"\x89PNG nonsense")
    found = resnet_images.open_images(on_disk(data, tmp_path), 28)
    take(found.train, np.arange(4))
    for index, name in ((4, "train/dog/1.JPEG"), (6, "train/emu/0.png")):
        with pytest.raises(TaskError, match=f"the picture {name} cannot be read"):
            take(found.train, np.array([index]))


def test_folders_that_make_no_data_set_are_refused(data: Path, tmp_path: Path) -> None:
    task = on_disk(data, tmp_path)
    write(data / "train/cat/0.png", picture(0))
    with pytest.raises(TaskError, match=r"pictures of 1 classes in train/<class>/ \(train/cat/0\.png, \.\.\.\)"):
        resnet_images.open_images(task)
    write(data / "train/dog/0.png", picture(1))
    with pytest.raises(TaskError, match=r"none in val/ or test/"):
        resnet_images.open_images(task)
    write(data / "test/fox/0.png", picture(1))
    with pytest.raises(TaskError, match=r"pictures of fox to test with, and none in train/fox"):
        resnet_images.open_images(task)


@everywhere
def test_pictures_in_tar_files_are_read_too(data: Path, tmp_path: Path, opener: Opener) -> None:
    write(data / "classes.txt", b"cat\ndog\n")
    for part, count in (("train/0.tar", 4), ("train/1.tar", 2), ("val/0.tar", 2)):
        (data / part).parent.mkdir(exist_ok=True)
        with tarfile.open(data / part, "w") as archive:
            for index in range(count):
                for ending, content in (("jpg", picture(index, kind="JPEG")), ("cls", str(index % 2).encode())):
                    member = tarfile.TarInfo(f"{index}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    found = resnet_images.open_images(opener(data, tmp_path), 28)
    images, labels = take(found.train, np.arange(6))
    assert (len(found.train), len(found.test), found.classes) == (6, 2, 2)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert np.array_equal(images[1], resnet_images.decoded(picture(1, kind="JPEG"), "", 32))
    write(data / "classes.txt", b"cat\n")
    with pytest.raises(TaskError, match=r"wants a picture, and \.cls from 0 to 0"):
        take(resnet_images.open_images(on_disk(data, tmp_path), 28).train, np.arange(2))


def test_without_data_there_are_the_digits_and_it_is_said() -> None:
    pytest.importorskip("sklearn")
    found = resnet_images.open_images(smlt.Task())
    assert "no --data was given" in found.name
    images, _ = take(found.train, np.arange(4))
    assert (images.shape, images.dtype, images.max()) == ((4, 3, 32, 32), np.uint8, 255)


# ---- text ----


@everywhere
def test_windows_of_text_go_on_from_file_to_file(data: Path, tmp_path: Path, opener: Opener) -> None:
    sizes = [0, 1, 700, 3, 0, 5, 5000, 40]
    texts = [RNG.integers(0, 256, size, dtype=np.uint8).tobytes() for size in sizes]
    for number, text in enumerate(texts):
        write(data / f"part-{number % 2}" / f"{number}.txt", text)
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.txt"))
    whole = b"".join((data / name).read_bytes() for name in names)
    found = bert_text.open_text(opener(data, tmp_path), 16)
    count = len(whole) // 16
    assert (len(found.train), len(found.test)) == (int(count * 0.9), count - int(count * 0.9))
    rows = np.concatenate([take(found.train, np.arange(len(found.train))), take(found.test, np.arange(len(found.test)))])
    assert rows.dtype == np.int64
    assert bytes((rows - bert_text.FIRST_BYTE).astype(np.uint8).reshape(-1)) == whole[: count * 16]
    assert found.used == 261


def test_text_that_is_too_short_or_not_there_is_refused(data: Path, tmp_path: Path) -> None:
    task = on_disk(data, tmp_path)
    write(data / "a.md", b"text")
    with pytest.raises(TaskError, match=r"neither train/\*\.npy nor \*\.txt: it has a\.md"):
        bert_text.open_text(task, 16)
    write(data / "a.txt", b"too short a text")
    with pytest.raises(TaskError, match=r"the text has 16 bytes: it wants some samples of 16"):
        bert_text.open_text(task, 16)
    write(data / "a.txt", b"")
    with pytest.raises(TaskError, match=r"the text has 0 bytes"):
        bert_text.open_text(task, 16)


def test_without_data_there_is_the_standard_library_and_it_is_said() -> None:
    found = bert_text.open_text(smlt.Task(), 64)
    assert "no --data was given" in found.name
    assert len(found.train) > 50_000
    assert take(found.train, np.array([0, 7])).shape == (2, 64)


def test_tokens_are_made_of_text_once_and_read_by_rows(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    words = ["gradient", "worker", "store", "shard", "chunk", "epoch"]
    for number in range(12):
        write(tmp_path / f"text/{number:02d}.txt", " ".join(RNG.choice(words, 200)).encode())
    data.rmdir()
    command = [sys.executable, EXAMPLES / "bert_tokens.py", data, "--text", tmp_path / "text", "--tokens", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("rows of 16: 125 to train and 25 to test\n"), done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "is not empty" in again.stderr

    task = on_disk(data, tmp_path)
    found = bert_text.open_text(task, 16)
    rows = take(found.train, np.arange(125))
    vocabulary = (data / "vocab.txt").read_text().splitlines()
    assert (rows.shape, rows.dtype, len(found.test), found.used) == ((125, 16), np.int64, 25, len(vocabulary))
    text = " ".join(vocabulary[token] for token in rows[0]).replace(" ##", "")
    assert (tmp_path / "text/00.txt").read_text().startswith(text)
    with pytest.raises(TaskError, match=r"uint16 \(32,\).*BERT_TOKENS"):
        take(bert_text.open_text(task, 32).train, np.array([0]))
    (data / "vocab.txt").write_text("\n".join(vocabulary[:10]))
    with pytest.raises(TaskError, match=r"below 10 are wanted"):
        take(bert_text.open_text(task, 16).train, np.array([0]))
    (data / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(TaskError, match=r"vocab\.txt holds 2 tokens, which do not begin with \[PAD\]"):
        bert_text.open_text(task, 16)
