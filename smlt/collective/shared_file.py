"""The file that the processes of a machine share: where it lies, whose it is, and what the dead have left."""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import struct
import tempfile
from pathlib import Path
from typing import Any

from smlt.collective import _shared
from smlt.errors import ConfigError

MAGIC = b"SMLTshm1"
#: Magic, the maker's process, its start and namespace, key, local size, bytes of a block, blocks (csrc/shared.c).
HEADER = struct.Struct("=8sqQQQIII")


def folders() -> list[Path]:
    shared = Path("/dev/shm")
    temporary = Path(tempfile.gettempdir())
    return [shared, temporary] if shared.is_dir() and os.access(shared, os.W_OK | os.X_OK) else [temporary]


def reserve(descriptor: int, size: int) -> None:
    """Zeros, so that a full file system is an error here, not a signal (SIGBUS) in the middle of a reduction."""
    zeros = bytes(1 << 20)
    while size > 0:
        written = os.write(descriptor, zeros[: min(size, len(zeros))])
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size -= written


def read_header(path: Path) -> tuple[Any, ...] | None:
    """The header of a group's file of this user; None for what is none, or is there no more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return None
        header = os.pread(descriptor, HEADER.size, 0)
    finally:
        os.close(descriptor)
    return HEADER.unpack(header) if len(header) == HEADER.size else None


def living_maker(path: Path) -> int | None:
    """The process that has made the file, None when it has ended or is unknown."""
    header = read_header(path)
    if header is None or header[0] != MAGIC:
        return None
    _, pid, start, namespace, *_ = header
    if namespace == _shared.process_namespace() and _shared.process_start(pid) != start:
        return None
    return int(pid)


def sweep(folder: Path) -> None:
    """Delete what this user's dead processes have left."""
    named = re.compile(rf"smlt-{os.geteuid()}-[0-9a-f]{{16}}(\.\d+)?")
    for path in folder.glob(f"smlt-{os.geteuid()}-*"):
        if named.fullmatch(path.name) is None:
            continue
        pid = path.suffix[1:]
        if pid.isdigit():  # one that was being made
            if _shared.process_start(int(pid)) == 0:
                path.unlink(missing_ok=True)
        elif (header := read_header(path)) is not None and header[0] == MAGIC and living_maker(path) is None:
            path.unlink(missing_ok=True)


def map_file(path: Path) -> mmap.mmap | None:
    """The file mapped; None when it is not there, or is a dead process's. ConfigError when it can be no file of ours."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"the shared memory {path} cannot be opened: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ConfigError(f"the shared memory {path} is not a file of this user alone: delete it")
        header = os.pread(descriptor, HEADER.size, 0)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ConfigError(f"the shared memory {path} is not what this group has made: delete it")
        if living_maker(path) is None:
            return None
        return mmap.mmap(descriptor, found.st_size)
    finally:
        os.close(descriptor)
