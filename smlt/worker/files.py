"""A job's data files as a worker has them: in a local folder, or, when they take more room than there is, in the object store.

Streamed files are read by range, in blocks that are kept while there is room for them. An object that is put anew while it is
streamed is an error (its ETag was noted when the files were opened); the SHA-256 of the manifest is not compared then, for
nobody reads the whole. What `path` and `fetch_data` bring is compared.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from smlt.errors import CheckpointError, StoreAuthError, StoreError, StoreFull, StoreUnavailable, TaskError
from smlt.store.object import ObjectStat, ObjectStore, Progress
from smlt.worker.manifest import read_manifest

#: Left free in the scratch folder: for the task's own files.
RESERVE_BYTES = 128 << 20
#: What is read around a sample. A request to S3 takes as long to be answered as this takes to be sent, about 20 ms to 30 ms:
#: https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html
BLOCK_BYTES = 256 << 10
#: Blocks are kept up to so much.
CACHE_BYTES = 128 << 20
#: What one request asks for at most.
RUN_BYTES = 8 << 20
#: Requests at a time.
THREADS = 16
#: Files at a time; each large one comes in parts, side by side.
FILES_AT_ONCE = 4

#: File, first byte, how many.
Range = tuple[str, int, int]


class DataFiles(Protocol):
    """The files given by `--data DIR`, by their names below it ("train/0001.npy")."""

    def names(self, pattern: str = "*") -> list[str]:
        """The names that fit, sorted. `*` also stands for slashes."""

    def size(self, name: str) -> int:
        """In bytes. TaskError when there is no such file, as of all methods."""

    def open(self, name: str) -> BinaryIO:
        """The file for reading; it can seek."""

    def path(self, name: str) -> Path:
        """The file on this disk, brought there if need be. StoreFull when there is no room for it."""

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes in these ranges, in their order; from a store side by side. TaskError when a file ends before."""

    def folder(self) -> Path:
        """The folder with all the files. StoreFull when they are streamed because there is no room for them."""


class LocalFiles:
    """Data files in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def names(self, pattern: str = "*") -> list[str]:
        found = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        return sorted(name for name in found if fnmatchcase(name, pattern))

    def size(self, name: str) -> int:
        return self.path(name).stat().st_size

    def open(self, name: str) -> BinaryIO:
        return self.path(name).open("rb")

    def path(self, name: str) -> Path:
        path = self.root / name
        if ".." in path.parts or not path.is_file():
            raise _no_file(name, self.names())
        return path

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        found: list[bytes] = [b""] * len(ranges)
        for name, numbers in _by_name(ranges).items():
            with self.open(name) as file:
                for number in numbers:
                    _, start, length = ranges[number]
                    file.seek(start)
                    found[number] = file.read(length)
                    if len(found[number]) != length:
                        raise _ends_before(name, start + length)
        return found

    def folder(self) -> Path:
        return self.root


class StreamedFiles:
    """Data files below `prefix` in `objects`, read by range; `scratch` is where `path` brings one.

    `digests` and `stats`: of the manifest and of the store, by name. Several threads may read.
    """

    def __init__(
        self,
        objects: ObjectStore,
        prefix: str,
        digests: dict[str, str],
        stats: dict[str, ObjectStat],
        scratch: Path,
        *,
        block_bytes: int = BLOCK_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.objects, self.prefix, self.scratch = objects, prefix, scratch
        self.block_bytes, self.cache_bytes = block_bytes, cache_bytes
        self._digests, self._stats = digests, stats
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._kept = 0
        self._lock, self._fetching = threading.Lock(), threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="smlt-data")

    def names(self, pattern: str = "*") -> list[str]:
        return sorted(name for name in self._stats if fnmatchcase(name, pattern))

    def size(self, name: str) -> int:
        return self._stat(name).size

    def _stat(self, name: str) -> ObjectStat:
        if name not in self._stats:
            raise _no_file(name, self.names())
        return self._stats[name]

    def open(self, name: str) -> BinaryIO:
        return io.BufferedReader(_Remote(self, name), self.block_bytes)

    def path(self, name: str) -> Path:
        size, target = self.size(name), self.scratch / name
        with self._fetching:
            if not target.exists():
                check_room(self.scratch, size, f"the file {name}")
                fetch_file(self.objects, self.prefix, name, self._digests[name], self.scratch)
        return target

    def folder(self) -> Path:
        needed = sum(stat.size for stat in self._stats.values())
        check_room(self.scratch, needed, "the data")
        raise StoreFull(f"the data is streamed, for there was no room for it in {self.scratch}: {ADVICE}")

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        for name, start, length in ranges:
            if start + length > self.size(name):
                raise _ends_before(name, start + length)
        found = self._kept_blocks(ranges)
        missing = defaultdict(set)
        for name, number in self._numbers(ranges):
            if (name, number) not in found:
                missing[name].add(number)
        runs = [(name, first, count) for name, numbers in missing.items() for first, count in self._runs(sorted(numbers))]
        for loaded in self._pool.map(lambda run: self._load(*run), runs):
            found.update(loaded)
            self._keep(loaded)
        return [self._cut(found, wanted) for wanted in ranges]

    def _numbers(self, ranges: Iterable[Range]) -> Iterator[tuple[str, int]]:
        for name, start, length in ranges:
            for number in range(start // self.block_bytes, -(-(start + length) // self.block_bytes) if length else 0):
                yield name, number

    def _kept_blocks(self, ranges: Sequence[Range]) -> dict[tuple[str, int], bytes]:
        found = {}
        with self._lock:
            for key in self._numbers(ranges):
                if key in self._blocks:
                    self._blocks.move_to_end(key)
                    found[key] = self._blocks[key]
        return found

    def _runs(self, numbers: list[int]) -> Iterator[tuple[int, int]]:
        """Blocks that follow one another, as (first, how many): one request each."""
        most = max(1, RUN_BYTES // self.block_bytes)
        first = count = 0
        for number in numbers:
            if count and number == first + count and count < most:
                count += 1
                continue
            if count:
                yield first, count
            first, count = number, 1
        if count:
            yield first, count

    def _load(self, name: str, first: int, count: int) -> dict[tuple[str, int], bytes]:
        size, stat = self.block_bytes, self._stat(name)
        start = first * size
        length = min(count * size, stat.size - start)
        data = self.objects.get_range(f"{self.prefix}/{name}", start, length, stat.version)
        if len(data) != length:
            raise _ends_before(name, start + length)
        return {(name, first + i): data[i * size : (i + 1) * size] for i in range(count)}

    def _keep(self, loaded: dict[tuple[str, int], bytes]) -> None:
        with self._lock:
            for key, data in loaded.items():
                if key not in self._blocks:
                    self._blocks[key] = data
                    self._kept += len(data)
            while self._kept > self.cache_bytes:
                self._kept -= len(self._blocks.popitem(last=False)[1])

    def _cut(self, blocks: dict[tuple[str, int], bytes], wanted: Range) -> bytes:
        name, start, length = wanted
        numbers = [number for _, number in self._numbers([wanted])]
        if not numbers:
            return b""
        data = b"".join(blocks[name, number] for number in numbers) if len(numbers) > 1 else blocks[name, numbers[0]]
        offset = start - numbers[0] * self.block_bytes
        return data[offset : offset + length]


class _Remote(io.RawIOBase):
    """A streamed file that can seek. Read in order, it reads further and further ahead."""

    def __init__(self, files: StreamedFiles, name: str) -> None:
        self._files, self._name, self._size = files, name, files.size(name)
        self._at = self._ended = 0
        self._ahead = files.block_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        block = self._files.block_bytes
        in_order = self._ended <= self._at <= self._ended + block
        self._ahead = min(2 * self._ahead, RUN_BYTES // 2) if in_order else block
        ahead = min(max(self._ahead, length), self._size - self._at)
        data = self._files.read([(self._name, self._at, ahead)])[0]
        buffer[:length] = data[:length]
        self._at += length
        self._ended = self._at
        return length


ADVICE = (
    "give it more room (a function's ephemeral storage, up to 10240 MB), or let the task read self.data_files or "
    "smlt.open_shards instead of self.data_dir, which streams what does not fit"
)


def room(folder: Path) -> int:
    """How many bytes of data `folder` may still take."""
    while not folder.exists():
        folder = folder.parent
    return max(0, shutil.disk_usage(folder).free - RESERVE_BYTES)


def check_room(folder: Path, needed: int, what: str) -> None:
    """StoreFull when there is no room for `needed` bytes."""
    there = room(folder)
    if needed > there:
        raise StoreFull(f"{what} needs {_amount(needed)}, and {folder} has room for {_amount(there)}: {ADVICE}")


def open_data(objects: ObjectStore, prefix: str, folder: Path) -> DataFiles:
    """The data below `prefix`, and nothing that the manifest does not name: brought to `folder` if it fits, else streamed.

    Raises CheckpointError naming the file that is missing or is not what the manifest says.
    """
    digests = read_manifest(objects, prefix)
    if objects.copies:
        stats = stats_of(objects, prefix, digests)
        if sum(stat.size for stat in stats.values()) > room(folder):
            return StreamedFiles(objects, prefix, digests, stats, folder)
    return LocalFiles(fetch_data(objects, prefix, folder))


def fetch_data(objects: ObjectStore, prefix: str, folder: Path) -> Path:
    """Make the data below `prefix` available in `folder`, and nothing that the manifest does not name; returns `folder`.

    Data may be larger than this machine's memory and disk: `folder` holds links to the object store's own files when it
    is a directory. They are compared with the manifest's SHA-256 once, now; who may write to that directory can change
    them later. From S3 copies come, several files and parts of them at a time. Raises CheckpointError naming the file that
    is missing or is not what the manifest says, and StoreFull, before anything is fetched, when there is no room.
    """
    digests = read_manifest(objects, prefix)
    if objects.copies:
        needed = sum(stat.size for stat in stats_of(objects, prefix, digests).values())
        check_room(folder, needed, f"the data of {prefix}")
    pool, stopping = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="smlt-fetch"), threading.Event()

    def go_on(_: int) -> None:
        if stopping.is_set():
            raise StoreError(f"another file of {prefix} could not be brought")

    try:
        for _ in pool.map(lambda name: fetch_file(objects, prefix, name, digests[name], folder, go_on), digests):
            pass
    except BaseException:
        stopping.set()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    pool.shutdown()
    return folder


def fetch_file(
    objects: ObjectStore, prefix: str, name: str, digest: str, folder: Path, progress: Progress | None = None
) -> None:
    """Bring one file. CheckpointError when it is missing or its SHA-256 is not `digest`; then it is not there."""
    with named(f"{prefix}/{name}"):
        found = objects.fetch(f"{prefix}/{name}", folder / name, progress)
    if found != digest:
        (folder / name).unlink()
        raise changed(f"{prefix}/{name}")


def stats_of(objects: ObjectStore, prefix: str, digests: dict[str, str]) -> dict[str, ObjectStat]:
    """Size and version by name, from one list. CheckpointError for the first file that is missing."""
    found = objects.stats(f"{prefix}/")
    for name in digests:
        if f"{prefix}/{name}" not in found:
            raise CheckpointError(f"{prefix}/{name} is missing")
    return {name: found[f"{prefix}/{name}"] for name in digests}


@contextmanager
def named(key: str) -> Iterator[None]:
    """What goes wrong with the file is the run's error; with the store, the store's."""
    try:
        yield
    except (StoreUnavailable, StoreAuthError, StoreFull):  # nothing is known of the file
        raise
    except StoreError as error:
        raise CheckpointError(f"{key} is missing or cannot be read: {error}") from error


def changed(key: str) -> CheckpointError:
    """What is raised when a file's SHA-256 is another one than the manifest's."""
    return CheckpointError(f"{key} is not what was uploaded: its SHA-256 differs from the manifest's")


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _by_name(ranges: Sequence[Range]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, (name, _, _) in enumerate(ranges):
        numbers[name].append(number)
    return numbers


def _ends_before(name: str, end: int) -> TaskError:
    return TaskError(f"the data file {name} ends before byte {end}: it is cut off, or was changed")


def _no_file(name: str, names: list[str]) -> TaskError:
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return TaskError(f"there is no data file {name!r}: --data has {some or 'none'}")
