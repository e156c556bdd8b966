"""The Data Iterator: which samples a worker takes at each step, and how it gets at its code.

The order of samples is one permutation per epoch, drawn from the job's seed. A step consumes one global batch; rank r of
n takes the r-th of n nearly equal parts of it. So what the model sees depends on the seed and the global batch size, not
on the number of workers, on restarts, or on where a run was resumed. The global batch may differ from epoch to epoch.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smlt.errors import ConfigError, TaskError
from smlt.store.object import ObjectStore
from smlt.worker.files import FILES_AT_ONCE, changed, named
from smlt.worker.manifest import read_manifest

Indices = npt.NDArray[np.int64]


class DataIterator:
    """The steps of a data set of `length` samples for one worker.

    `batch_of`: the global batch of an epoch. The last one of an epoch may be short, and a worker's part of it empty. Raises
    ConfigError for an empty training set.
    """

    def __init__(self, length: int, batch_of: Callable[[int], int], seed: int, rank: int, world_size: int) -> None:
        if length < 1:
            raise ConfigError("the training set is empty")
        self.length, self.batch_of, self.seed = length, batch_of, seed
        self.rank, self.world_size = rank, world_size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def steps_in(self, epoch: int) -> int:
        """How many global batches an epoch has."""
        return -(-self.length // self.batch_of(epoch))

    def global_indices(self, epoch: int, step: int) -> Indices:
        """The samples of a global batch: int64, shape (at most the epoch's batch,)."""
        if epoch != self._epoch:
            # Counter-based: the permutation of any epoch without those before it.
            generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self.length)
        size = self.batch_of(epoch)
        return self._order[step * size : (step + 1) * size]

    def indices(self, epoch: int, step: int) -> tuple[Indices, int]:
        """This worker's samples of a step, and the size of the global batch."""
        batch = self.global_indices(epoch, step)
        return part(batch, self.rank, self.world_size), len(batch)

    def steps(self, epoch: int, step: int, epochs: int) -> Iterator[tuple[int, int, Indices, int]]:
        """(epoch, step, indices, global batch size) from there to the end of epoch `epochs` - 1."""
        while epoch < epochs:
            while step < self.steps_in(epoch):
                yield epoch, step, *self.indices(epoch, step)
                step += 1
            epoch, step = epoch + 1, 0


def part(batch: Indices, rank: int, world_size: int) -> Indices:
    """The rank-th of world_size nearly equal contiguous parts."""
    return batch[len(batch) * rank // world_size : len(batch) * (rank + 1) // world_size]


def dataset_length(dataset: Any) -> int:
    """How many samples a data set has. TaskError when its parts disagree or it has no length."""
    if isinstance(dataset, dict):
        return dataset_length(tuple(dataset.values()))
    if isinstance(dataset, tuple):
        lengths = {len(column) for column in dataset}
        if len(lengths) != 1:
            raise TaskError(f"the data set's parts have different lengths: {sorted(lengths)}")
        return lengths.pop()
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TaskError(
            f"data() gave a {type(dataset).__name__}, which has no length or no samples by index: give arrays, tensors, or a "
            "data set with __len__ and __getitem__ (the Dataset, not its DataLoader: SMLT makes the batches)"
        )
    return len(dataset)


def take(dataset: Any, indices: Indices) -> Any:
    """The batch of these samples, in the form of the data set."""
    if isinstance(dataset, dict):
        return {name: take(column, indices) for name, column in dataset.items()}
    if isinstance(dataset, tuple):
        return tuple(take(column, indices) for column in dataset)
    if isinstance(dataset, np.ndarray):
        return dataset[indices]
    if type(dataset).__module__.partition(".")[0] == "torch" and hasattr(dataset, "index_select"):
        import torch

        return dataset[torch.from_numpy(np.ascontiguousarray(indices))]
    wanted = [int(index) for index in indices]
    if wanted and callable(together := getattr(dataset, "__getitems__", None)):  # PyTorch's name for it
        return _stacked(list(together(wanted)), dataset)
    return _stacked([dataset[index] for index in wanted], dataset)


def _stacked(samples: list[Any], dataset: Any) -> Any:
    """Samples of a map-style data set as a batch; an empty batch takes its form from the first sample."""
    template = samples[0] if samples else dataset[0]
    if isinstance(template, (tuple, list)):
        return tuple(_stacked([s[i] for s in samples], [t]) for i, t in enumerate(template))
    if isinstance(template, dict):
        return {name: _stacked([s[name] for s in samples], [value]) for name, value in template.items()}
    if type(template).__module__.partition(".")[0] == "torch":
        import torch

        return torch.stack(samples) if samples else template.new_empty((0, *template.shape))
    return np.stack(samples) if samples else np.empty((0, *np.shape(template)), np.asarray(template).dtype)


def fetch_code(objects: ObjectStore, prefix: str, folder: Path, manifest_sha256: str | None = None) -> Path:
    """Bring the code below `prefix` to `folder`, and nothing that the manifest does not name; returns `folder`.

    Always a copy, of the very bytes whose SHA-256 was compared: a file that is changed in the object store afterwards, or
    put beside the others, is not run. `manifest_sha256`: what the manifest's own must be.
    Raises CheckpointError naming the file that is missing or is not what the manifest says.
    """
    digests = read_manifest(objects, prefix, manifest_sha256)

    def content_of(name: str) -> bytes:
        with named(f"{prefix}/{name}"):
            return objects.get(f"{prefix}/{name}")

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        contents = dict(zip(digests, pool.map(content_of, digests), strict=True))
    for name, content in contents.items():
        if sha256(content).hexdigest() != digests[name]:
            raise changed(f"{prefix}/{name}")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:  # x: on a file system that takes two names for one, the second is an error
            file.write(content)
        if target.suffix == ".py":
            # For the traceback of a failed task: it is written when the folder is gone. No time: so it is not looked for.
            text = content.decode(errors="replace")
            linecache.cache[str(target)] = (len(content), None, text.splitlines(keepends=True), str(target))
    return folder
