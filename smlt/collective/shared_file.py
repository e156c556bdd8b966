"""The file that the processes of a machine share: where it lies, whose it is, and what the dead have left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
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


def read_header(descriptor: int) -> tuple[Any, ...] | None:
    """The header of a group's file; None for what is none. Of the open file: another may have come to its path since."""
    header = os.pread(descriptor, HEADER.size, 0)
    return HEADER.unpack(header) if len(header) == HEADER.size and header.startswith(MAGIC) else None


def living_maker(header: tuple[Any, ...]) -> int | None:
    """The process that has made a file, None when it has ended."""
    _, pid, start, namespace, *_ = header
    if namespace == _shared.process_namespace() and _shared.process_start(pid) != start:
        return None
    return int(pid)


def delete_dead(path: Path, *, ours_only: bool = False) -> int | None:
    """Delete what a dead process has left at a path; the process that has made it, when that lives.

    With `ours_only`, what has no header of ours stays. OSError when it cannot be deleted.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:  # a link, or not ours to read
        if not ours_only:
            path.unlink(missing_ok=True)
        return None
    try:
        found = os.fstat(descriptor)
        regular = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        header = read_header(descriptor) if regular else None
        if header is not None and (pid := living_maker(header)) is not None:
            return pid
        if regular and (header is not None or not ours_only):
            _delete_opened(descriptor, path)
        elif not ours_only:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    return None


def _delete_opened(descriptor: int, path: Path) -> None:
    """Delete the file that is open, and none that has come to its path since.

    Several processes may do so at once. They hold a lock on the open file meanwhile: while one has it and the path leads to
    the file, nobody else deletes it, so nothing new can come there.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                path.unlink()
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile has the descriptor too


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
        else:
            delete_dead(path, ours_only=True)


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
        header = read_header(descriptor)
        if header is None:
            raise ConfigError(f"the shared memory {path} is not what this group has made: delete it")
        if living_maker(header) is None:
            return None
        return mmap.mmap(descriptor, found.st_size)
    finally:
        os.close(descriptor)
