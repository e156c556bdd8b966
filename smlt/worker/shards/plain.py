"""Shards of any other files: each is one sample, its bytes."""

from __future__ import annotations

from collections.abc import Sequence

from smlt.errors import TaskError
from smlt.worker.files import DataFiles


class Plain:
    """A file that is a sample."""

    kind = "bytes"

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return 1

    def ranges(self, index: int) -> list[tuple[int, int]]:
        return [(0, self._size)]

    def sample(self, index: int, pieces: list[bytes]) -> bytes:
        return pieces[0]


def open_plain(files: DataFiles, name: str, columns: Sequence[str] | None) -> Plain:
    """The file as a sample."""
    if columns is not None:
        raise TaskError(f"the data file {name} is a sample by itself and has no columns {', '.join(columns)}")
    return Plain(files.size(name))
