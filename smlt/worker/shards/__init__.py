"""Data sets over many files: `smlt.open_shards(self.data_files, "train-*.npy")`.

A format says which bytes of a file make a sample and what they are; where the bytes come from, this disk or the object
store, is the matter of `smlt.worker.files`. So a data set that is streamed is the very one that lies on the disk.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from smlt.errors import ConfigError, TaskError
from smlt.worker.files import THREADS, DataFiles
from smlt.worker.shards.npy import open_npy
from smlt.worker.shards.npz import open_npz
from smlt.worker.shards.plain import open_plain
from smlt.worker.shards.safetensors import open_safetensors
from smlt.worker.shards.tar import open_tar


class Shard(Protocol):
    """One file's samples."""

    kind: str  # equal for files whose samples look alike

    def __len__(self) -> int:
        """How many samples."""

    def ranges(self, index: int) -> list[tuple[int, int]]:
        """Which bytes of the file (start, length) the sample is made of."""

    def sample(self, index: int, pieces: list[bytes]) -> Any:
        """The sample that these bytes make."""


#: Opens a file as a shard; `columns` are the arrays that are wanted of those that have names.
Open = Callable[[DataFiles, str, Sequence[str] | None], Shard]

FORMATS: dict[str, Open] = {
    "npy": open_npy,
    "npz": open_npz,
    "safetensors": open_safetensors,
    "tar": open_tar,
    "plain": open_plain,
}
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Shards:
    """A map-style data set: the samples of `shards` (by the names of their files), one file behind the other.

    A batch's samples are read side by side. `transform` is called with each sample.
    """

    def __init__(self, files: DataFiles, shards: dict[str, Shard], transform: Callable[[Any], Any] | None = None) -> None:
        self.files, self.transform = files, transform
        self.names, self._shards = list(shards), list(shards.values())
        self._ends = np.array(list(accumulate(map(len, self._shards))), np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[Any]:
        """The samples of a batch."""
        places = [self._place(operator.index(index)) for index in indices]
        wanted = [self._shards[shard].ranges(row) for shard, row in places]
        names = [self.names[shard] for shard, _ in places]
        pieces = iter(self.files.read([(name, *one) for name, ranges in zip(names, wanted, strict=True) for one in ranges]))
        samples = []
        for (shard, row), ranges in zip(places, wanted, strict=True):
            sample = self._shards[shard].sample(row, [next(pieces) for _ in ranges])
            samples.append(sample if self.transform is None else self.transform(sample))
        return samples

    def _place(self, index: int) -> tuple[int, int]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"sample {index} of {length}")
        index %= length
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)


def open_shards(
    files: DataFiles,
    pattern: str = "*",
    *,
    columns: Sequence[str] | None = None,
    transform: Callable[[Any], Any] | None = None,
    format: str | None = None,
) -> Shards:
    """The samples of all `files` whose name fits `pattern`, in the order of their names.

    By the name's end, or by `format`: "npy": the rows of an array. "npz", "safetensors": rows of arrays of equal length, as a
    dict, or as a tuple of those named by `columns`. "tar": files of equal name up to the first dot are one sample, a dict by
    what follows the dot: .json, .cls (a number), .npy, .txt decoded, others bytes (as WebDataset has it). "plain", for all
    other names: the bytes of the whole file.
    `transform` makes of a sample what `loss` shall get: arrays of one shape, tuples or dicts of them.

    >>> images = smlt.open_shards(self.data_files, "train-*.tar", transform=decode)  # doctest: +SKIP
    >>> return {"train": images, "test": smlt.open_shards(self.data_files, "test.npz", columns=("x", "y"))}

    Raises TaskError when no file fits, and naming the file that is not what its name says, or has samples of another form than
    the first; ConfigError for a format that there is none of.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    names = files.names(pattern)
    if not names:
        some = files.names()
        raise TaskError(f"no data file fits {pattern!r}: --data has {', '.join(some[:3]) or 'none'}{', ...' * (len(some) > 3)}")
    openers = [FORMATS[format or format_of(name)] for name in names]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="smlt-shards") as pool:
        opened = pool.map(lambda opener, name: opener(files, name, columns), openers, names)
        shards: dict[str, Shard] = dict(zip(names, opened, strict=True))
    first = names[0]
    for name, shard in shards.items():
        if shard.kind != shards[first].kind:
            raise TaskError(f"the data files {first} and {name} differ: {shards[first].kind}, and {shard.kind}")
    if not sum(map(len, shards.values())):
        raise TaskError(f"the data files that fit {pattern!r} hold no sample")
    return Shards(files, shards, transform)


def format_of(name: str) -> str:
    """The format that the name's end tells."""
    lowered = name.lower()
    if lowered.endswith(_PACKED):
        raise TaskError(f"the data file {name} is compressed: samples are read out of a plain .tar only")
    end = lowered.rpartition(".")[2]
    return end if end in FORMATS else "plain"
