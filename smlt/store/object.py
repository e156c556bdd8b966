"""The object store: code, data and checkpoints by key. A directory here; S3 behind the same methods later."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

from smlt.errors import ConfigError, StoreError, StoreFull


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
        content = data if isinstance(data, bytes) else data.read_bytes()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".put-", dir=target.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
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
        folder = self._path(prefix) if prefix.endswith("/") else self._path(prefix).parent if prefix else self.root
        keys = (path.relative_to(self.root).as_posix() for path in folder.rglob("*") if path.is_file())
        return sorted(key for key in keys if key.startswith(prefix) and not PurePosixPath(key).name.startswith(".put-"))

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
        parts = PurePosixPath(key).parts
        if not key or key.startswith("/") or ".." in parts or "\0" in key or "\\" in key:
            raise StoreError(f"{key!r} is no object key")
        path = self.root.joinpath(*parts)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise StoreError(f"{key!r} leads out of the object store at {self.root}")
        return path

    def _error(self, doing: str, key: str, error: OSError) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFull(f"cannot {doing} {key}: no room left on the disk of {self.root}")
        return StoreError(f"cannot {doing} {key} in {self.root}: {error.strerror or error}")


def open_object_store(url: str) -> ObjectStore:
    """The object store at `url`: a path, or file:///path. ConfigError for any other scheme."""
    scheme = urlsplit(url).scheme
    if scheme in ("", "file"):
        return DirectoryObjectStore(Path(unquote(urlsplit(url).path) if scheme else url).expanduser())
    if scheme == "s3":
        raise ConfigError("object store s3:// is not supported yet: give a directory")
    raise ConfigError(f"object store {url!r}: give a directory, or file:///path")
