"""The object store: code, data and checkpoints by key. A directory here; S3 behind the same methods in `s3`."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from smlt.errors import ConfigError, StoreError, StoreFull

#: What the name of an unfinished file begins with. No object's does.
TEMPORARY = ".put-"
#: As in S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
KEY_LENGTH = 1024


#: Told of bytes as they have been sent or have come, from several threads. What it raises ends the transfer; KeyboardInterrupt
#: ends it without another attempt, and without waiting for the parts under way.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ObjectStat:
    """What is known of an object without reading it."""

    size: int  # bytes
    version: str  # another content, another version: S3's ETag


class ObjectStore(Protocol):
    """Objects by key ("run/code/train.py"). Every method raises StoreError (StoreFull when there is no room)."""

    url: str
    #: Whether `fetch` takes room on this machine's disk.
    copies: bool

    def put(self, key: str, data: bytes | Path, progress: Progress | None = None) -> None:
        """Store `data`, bytes or a file's content, at `key`, wholly or not at all."""

    def get(self, key: str) -> bytes:
        """The object's content."""

    def get_range(self, key: str, start: int, length: int, version: str | None = None) -> bytes:
        """`length` bytes from `start`; fewer when the object ends before. `version`: StoreError when it is another one now."""

    def fetch(self, key: str, target: Path, progress: Progress | None = None) -> str:
        """Make the object's content a local file at `target`, not to be written to; returns its SHA-256.

        `target` must not be there yet. StoreError when it cannot be done, and then it is not there either.
        """

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    def list(self, prefix: str) -> list[str]:
        """Keys that begin with `prefix`, sorted."""

    def stats(self, prefix: str) -> dict[str, ObjectStat]:
        """What `list` gives, with each object's size and version."""

    def delete(self, *keys: str) -> None:
        """Delete the objects, in any order; no error where there is none."""

    def size(self, key: str) -> int:
        """The object's size in bytes."""


class DirectoryObjectStore:
    """An object store in the directory `root`, made when the first object is put."""

    copies = False

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.url = str(self.root)

    def put(self, key: str, data: bytes | Path, progress: Progress | None = None) -> None:
        target = self._path(key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    if isinstance(data, bytes):
                        file.write(data)
                    else:  # by pieces: a data set need not fit in memory
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
                    size = file.tell()
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, target)  # readers see the old content or the new
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise self._error("write", key, error) from error
        if progress is not None:
            progress(size)

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except OSError as error:
            raise self._error("read", key, error) from error

    def get_range(self, key: str, start: int, length: int, version: str | None = None) -> bytes:
        check_range(key, start, length)
        try:
            with self._path(key).open("rb") as file:
                if version is not None and _stat(file.fileno()).version != version:
                    raise has_changed(key, self.url)
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise self._error("read", key, error) from error

    def fetch(self, key: str, target: Path, progress: Progress | None = None) -> str:
        """A link to the store's own file: data may be larger than this disk. Whoever may write to it can change it later."""
        path = self._path(key)
        if any(part.is_symlink() for part in (path, *list(path.parents)[: key.count("/")])):
            raise StoreError(f"{key} is a link to another file: an object must lie where its key says")
        try:
            with path.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except OSError as error:
            raise self._error("read", key, error) from error
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
        except OSError as error:
            raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
        if progress is not None:
            progress(size)
        return digest

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str) -> list[str]:
        return sorted(self._files(prefix))

    def stats(self, prefix: str) -> dict[str, ObjectStat]:
        try:
            return {key: _stat(path) for key, path in sorted(self._files(prefix).items())}
        except OSError as error:
            raise self._error("list", prefix, error) from error

    def _files(self, prefix: str) -> dict[str, Path]:
        folder = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(TEMPORARY))
        named = ((path.relative_to(self.root).as_posix(), path) for path in files)
        return {key: path for key, path in named if key.startswith(prefix)}

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._delete(key)

    def _delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._error("delete", key, error) from error
        for folder in path.parents:  # an object store has no empty folders
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:
                return

    def size(self, key: str) -> int:
        try:
            return self._path(key).stat().st_size
        except OSError as error:
            raise self._error("read", key, error) from error

    def _path(self, key: str) -> Path:
        check_key(key)
        path = self.root.joinpath(*key.split("/"))
        try:
            inside = path.resolve().is_relative_to(self.root.resolve())
        except RuntimeError as error:  # a loop of links, before Python 3.13
            raise StoreError(f"{key!r} in {self.root}: {error}") from error
        if not inside:
            raise StoreError(f"{key!r} leads out of the object store at {self.root}")
        return path

    def _error(self, doing: str, key: str, error: OSError) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFull(f"cannot {doing} {key}: no room left on the disk of {self.root}")
        return StoreError(f"cannot {doing} {key} in {self.root}: {error.strerror or error}")


def check_key(key: str) -> None:
    """StoreError for what no object may be called: an object has one key, which is also a path below a folder."""
    if len(key) > KEY_LENGTH or not all(map(_is_name, key.split("/"))):
        raise StoreError(f"{key[:100]!r} is no object key")


def check_range(key: str, start: int, length: int) -> None:
    """StoreError for a range that is none."""
    if start < 0 or length < 0:
        raise StoreError(f"cannot read {key}: a range of {length} bytes from {start} is none")


def has_changed(key: str, where: str) -> StoreError:
    """What is raised when an object is no longer the one that was opened."""
    return StoreError(f"{key} in {where} has changed since it was opened: put data that changes at another key")


def _stat(file: int | Path) -> ObjectStat:
    found = os.stat(file)
    return ObjectStat(found.st_size, f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}")


def _is_name(part: str) -> bool:
    """Whether a key may hold `part` between two slashes. "", "." and ".." may not: an object has one key, below the root."""
    if part in ("", ".", "..") or "\0" in part or "\\" in part or part.startswith(TEMPORARY):
        return False
    try:
        return len(os.fsencode(part)) <= 255  # what file systems take
    except UnicodeEncodeError:
        return False


def open_object_store(url: str) -> ObjectStore:
    """The object store at `url`: a path, file:///path or s3://bucket/prefix. ConfigError for what is none of them."""
    if url.startswith("s3://"):
        from smlt.store.s3 import S3ObjectStore

        return S3ObjectStore(url)
    scheme, host, path, *_ = urlsplit(url)
    if scheme == "" and url:
        return DirectoryObjectStore(Path(url).expanduser())
    if scheme == "file" and host in ("", "localhost") and path:
        return DirectoryObjectStore(Path(unquote(path)))
    raise ConfigError(f"object store {url!r}: give a directory, file:///path or s3://bucket/prefix")
