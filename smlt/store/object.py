"""The object store: code, data and checkpoints by key. A directory here; S3 behind the same methods later."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from smlt.errors import ConfigError, StoreError, StoreFull

#: What the name of an unfinished file begins with. No object's does.
TEMPORARY = ".put-"
#: As in S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
KEY_LENGTH = 1024


class ObjectStore(Protocol):
    """Objects by key ("run/code/train.py"). Every method raises StoreError (StoreFull when there is no room)."""

    url: str

    def put(self, key: str, data: bytes | Path) -> None:
        """Store `data`, bytes or a file's content, at `key`, wholly or not at all."""

    def get(self, key: str) -> bytes:
        """The object's content."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer when the object ends before."""

    def open_path(self, key: str) -> Path:
        """A local file with the object's content, not to be written to."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    def list(self, prefix: str) -> list[str]:
        """Keys that begin with `prefix`, sorted."""

    def delete(self, key: str) -> None:
        """Delete the object; no error when there is none."""

    def size(self, key: str) -> int:
        """The object's size in bytes."""


class DirectoryObjectStore:
    """An object store in the directory `root`, made when the first object is put."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.url = str(self.root)

    def put(self, key: str, data: bytes | Path) -> None:
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
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, target)  # readers see the old content or the new
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise self._error("write", key, error) from error

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except OSError as error:
            raise self._error("read", key, error) from error

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if start < 0 or length < 0:
            raise StoreError(f"cannot read {key}: a range of {length} bytes from {start} is none")
        try:
            with self._path(key).open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise self._error("read", key, error) from error

    def open_path(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise StoreError(f"there is no object {key} in {self.root}")
        return path

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str) -> list[str]:
        folder = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(TEMPORARY))
        return sorted(key for key in (path.relative_to(self.root).as_posix() for path in files) if key.startswith(prefix))

    def delete(self, key: str) -> None:
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
        parts = key.split("/")
        if len(key) > KEY_LENGTH or not all(map(_is_name, parts)):
            raise StoreError(f"{key[:100]!r} is no object key")
        path = self.root.joinpath(*parts)
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


def _is_name(part: str) -> bool:
    """Whether a key may hold `part` between two slashes. "", "." and ".." may not: an object has one key, below the root."""
    if part in ("", ".", "..") or "\0" in part or "\\" in part or part.startswith(TEMPORARY):
        return False
    try:
        return len(os.fsencode(part)) <= 255  # what file systems take
    except UnicodeEncodeError:
        return False


def open_object_store(url: str) -> ObjectStore:
    """The object store at `url`: a path, or file:///path. ConfigError for any other scheme."""
    scheme, host, path, *_ = urlsplit(url)
    if scheme == "" and url:
        return DirectoryObjectStore(Path(url).expanduser())
    if scheme == "file" and host in ("", "localhost") and path:
        return DirectoryObjectStore(Path(unquote(path)))
    if scheme == "s3":
        raise ConfigError("object store s3:// is not supported yet: give a directory")
    raise ConfigError(f"object store {url!r}: give a directory, or file:///path")
