"""Pictures for resnet.py. `--data DIR` may hold

    CIFAR-10, the binary version: data_batch_1.bin ... data_batch_5.bin, test_batch.bin, in DIR or a folder in it
    a folder for each class: train/cat/1.jpg, ..., val/cat/9.jpg, ... (val or test), as ImageNet is laid out
    tar files as WebDataset has them: train/*.tar, val/*.tar with 17.jpg and 17.cls, and classes.txt, a name a line

Without --data it is scikit-learn's 1,797 handwritten digits, four times as large. Pictures are read when a batch wants them;
SMLT loads batches ahead of the step.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import smlt
from smlt.errors import ConfigError, TaskError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
CIFAR_PIXELS, CIFAR_CLASSES = 32, 10
#: A label and 3x32x32 values: https://www.cs.toronto.edu/~kriz/cifar.html
CIFAR_RECORD_BYTES = 1 + 3 * CIFAR_PIXELS**2
#: Pillow decodes without the GIL.
DECODERS = 4


@dataclass
class Images:
    """Data sets of (uint8 (3, side, side), int64 label). A model sees squares of `pixels` of them; side is not less."""

    name: str
    train: Any
    test: Any
    classes: int
    pixels: int
    may_be_mirrored: bool = True


def open_images(task, pixels=0):
    """What --data holds, or the digits. `pixels`: the side a model shall see; 0: what suits the data. TaskError if damaged."""
    try:
        files = task.data_files
    except TaskError:
        return digits(pixels)
    names = files.names()
    if any(name.endswith(("data_batch_1.bin", "test_batch.bin")) for name in names):
        return cifar10(files, names, pixels)
    if any(name.endswith("data_batch_1") for name in names):
        raise TaskError(
            "this is the Python version of CIFAR-10, which is pickled, and unpickling can run anything: take the binary "
            "version, cifar-10-binary.tar.gz, from https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    if any(name.startswith("train/") and name.endswith(".tar") for name in names):
        return tar_files(files, names, pixels or 224)
    return class_folders(files, names, pixels or 224)


def digits(pixels):
    """scikit-learn's digits of 8x8 pixels, 32x32 for us: they need no files."""
    from sklearn.datasets import load_digits

    if pixels not in (0, CIFAR_PIXELS):
        raise ConfigError(f"{pixels} pixels: the digits have {CIFAR_PIXELS}; give pictures of your own with --data DIR")
    found, labels = load_digits(return_X_y=True)
    grey = (found.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = np.repeat(grey.repeat(4, 2).repeat(4, 3), 3, axis=1)
    held_out = np.arange(len(labels)) % 5 == 0
    train, test = ((large[part], labels[part].astype(np.int64)) for part in (~held_out, held_out))
    return Images("scikit-learn's digits (no --data was given)", _Pairs(*train), _Pairs(*test), 10, CIFAR_PIXELS, False)


class _Pairs:
    """Arrays of images and labels."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class CifarRecords:
    """The records of binary CIFAR-10 files, read where they lie."""

    def __init__(self, files, names):
        self.files, self.names, self.counts = files, names, []
        for name in names:
            count, beside = divmod(files.size(name), CIFAR_RECORD_BYTES)
            if beside or not count:
                raise TaskError(f"{name} is damaged: {files.size(name):,} bytes are no multiple of {CIFAR_RECORD_BYTES:,}")
            self.counts.append(count)
        self.ends = np.cumsum(self.counts)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        numbers = np.searchsorted(self.ends, indices, side="right")
        rows = [index - int(self.ends[number]) + self.counts[number] for index, number in zip(indices, numbers, strict=True)]
        ranges = [
            (self.names[number], row * CIFAR_RECORD_BYTES, CIFAR_RECORD_BYTES)
            for number, row in zip(numbers, rows, strict=True)
        ]
        return [self._sample(place, record) for place, record in zip(ranges, self.files.read(ranges), strict=True)]

    def _sample(self, place, record):
        if record[0] >= CIFAR_CLASSES:
            raise TaskError(f"{place[0]} is damaged: record {place[1] // CIFAR_RECORD_BYTES} is of class {record[0]} of 0 to 9")
        return np.frombuffer(record, np.uint8, offset=1).reshape(3, CIFAR_PIXELS, CIFAR_PIXELS), np.int64(record[0])


def cifar10(files, names, pixels):
    """The binary version. TaskError naming what is missing or cut off."""
    if pixels not in (0, CIFAR_PIXELS):
        raise ConfigError(f"{pixels} pixels: CIFAR-10's pictures have {CIFAR_PIXELS}")
    found = {name.rpartition("/")[2]: name for name in names}
    parts = [f"data_batch_{number}.bin" for number in range(1, 6)]
    if missing := [name for name in [*parts, "test_batch.bin"] if name not in found]:
        raise TaskError(f"CIFAR-10 is not complete: there is no {', no '.join(missing)}")
    train, test = CifarRecords(files, [found[name] for name in parts]), CifarRecords(files, [found["test_batch.bin"]])
    return Images("CIFAR-10", train, test, CIFAR_CLASSES, CIFAR_PIXELS)


def decoded(content, name, side):
    """The middle square of an image file, scaled: uint8 (3, side, side). TaskError naming the file that is no picture."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ConfigError("pictures are read by Pillow: pip install pillow") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (side, side))  # of a JPEG no more is decoded than is needed
            square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TaskError(f"the picture {name} cannot be read: {error}") from error
    return np.asarray(square).transpose(2, 0, 1)


class ClassFolders:
    """The pictures `names`, train/<class>/<picture> or the like, of one of `classes`."""

    def __init__(self, files, names, classes, side):
        self.files, self.names, self.side = files, names, side
        numbers = {name: number for number, name in enumerate(classes)}
        of = [name.split("/")[1] for name in names]
        if unknown := sorted(set(of) - set(numbers)):
            raise TaskError(f"there are pictures of {unknown[0]} to test with, and none in train/{unknown[0]}")
        self.labels = np.array([numbers[name] for name in of], np.int64)
        self.pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        names = [self.names[index] for index in indices]
        contents = self.files.read([(name, 0, self.files.size(name)) for name in names])
        images = self.pool.map(partial(decoded, side=self.side), contents, names)
        return list(zip(images, self.labels[list(indices)], strict=True))


def class_folders(files, names, pixels):
    """train/<class>/*, and val/ or test/ like it."""
    pictures = [name for name in names if name.lower().endswith(ENDINGS) and name.count("/") >= 2]
    train = [name for name in pictures if name.startswith("train/")]
    classes = sorted({name.split("/")[1] for name in train})
    if len(classes) < 2:
        some = ", ".join(names[:3])
        raise TaskError(
            f"--data has pictures of {len(classes)} classes in train/<class>/ ({some}, ...): it wants two classes or more, or "
            "CIFAR-10's *.bin, or train/*.tar"
        )
    side = pixels * 8 // 7
    test = [name for name in pictures if name.startswith(_held_out(pictures))]
    train_set, test_set = (ClassFolders(files, part, classes, side) for part in (train, test))
    return Images(f"pictures of {len(classes)} classes", train_set, test_set, len(classes), pixels)


def _held_out(names):
    for folder in ("val/", "test/"):
        if any(name.startswith(folder) for name in names):
            return folder
    raise TaskError("--data has pictures in train/ but none in val/ or test/, which the model is tested with")


def tar_files(files, names, pixels):
    """train/*.tar and val/*.tar with a picture and its .cls, a number, for each sample."""
    with files.open("classes.txt") as file:
        classes = len(file.read().decode().splitlines())
    side = pixels * 8 // 7

    def sample(parts):
        picture = next((parts[ending[1:]] for ending in ENDINGS if ending[1:] in parts), None)
        label = parts.get("cls")
        if picture is None or not isinstance(label, int) or not 0 <= label < classes:
            raise TaskError(
                f"a sample of a tar file has {', '.join(parts)}: it wants a picture, and .cls from 0 to {classes - 1}"
            )
        return decoded(picture, "in a tar file", side), np.int64(label)

    train, test = (smlt.open_shards(files, f"{part}*.tar", transform=sample) for part in ("train/", _held_out(names)))
    return Images(f"tar files with pictures of {classes} classes", train, test, classes, pixels)
