"""Rows of arrays that lie in a file as NumPy writes them: what .npy, .npz and .safetensors have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from smlt.errors import TaskError


@dataclass(frozen=True)
class Column:
    """An array in a file, its first row at byte `start`."""

    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def end(self) -> int:
        return self.start + self.dtype.itemsize * math.prod(self.shape)

    def range(self, row: int) -> tuple[int, int]:
        return self.start + row * self.row_bytes, self.row_bytes

    def row(self, data: bytes) -> Any:
        """A row as an array that may be written to, or as a scalar."""
        return np.ndarray(self.shape[1:], self.dtype, bytearray(data))[()]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape[1:]}"


class Rows:
    """A shard of rows: of one array, or of several by name, as a tuple when they were asked for by name."""

    def __init__(self, columns: dict[str, Column], form: str) -> None:
        self.columns, self.form = columns, form
        self._length = next(iter(columns.values())).shape[0]
        self.kind = ", ".join(f"{name} {column}".strip() for name, column in columns.items())

    def __len__(self) -> int:
        return self._length

    def ranges(self, index: int) -> list[tuple[int, int]]:
        return [column.range(index) for column in self.columns.values()]

    def sample(self, index: int, pieces: list[bytes]) -> Any:
        rows = [column.row(piece) for column, piece in zip(self.columns.values(), pieces, strict=True)]
        return formed(rows, list(self.columns), self.form)


def formed(rows: list[Any], names: Sequence[str], form: str) -> Any:
    """The sample, by `form`: "array", "tuple" or "dict"."""
    if form == "array":
        return rows[0]
    return tuple(rows) if form == "tuple" else dict(zip(names, rows, strict=True))


def chosen(name: str, there: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """Which arrays of the file are wanted. TaskError for one that it does not have."""
    if not there:
        raise TaskError(f"the data file {name} holds no array")
    for column in columns or ():
        if column not in there:
            raise TaskError(f"the data file {name} has no array {column!r}: it has {', '.join(there)}")
    return list(columns) if columns is not None else sorted(there)


def check_lengths(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """TaskError when arrays have no rows, or not equally many."""
    for column, shape in shapes.items():
        if not shape:
            raise TaskError(f"the data file {name}: {column or 'the array'} is a single number and has no rows")
    lengths = {column: shape[0] for column, shape in shapes.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{column} {length}" for column, length in lengths.items())
        raise TaskError(f"the data file {name} has arrays of different lengths ({told}): choose some with columns=")


def read_npy_header(file: BinaryIO, what: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype; the file stands behind the header then. TaskError for what has no rows of plain values in a file."""
    read: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(file)
        if version not in read:
            raise ValueError(f"format version {version[0]}.{version[1]} is not known")
        shape, fortran, dtype = read[version](file)
    except (ValueError, EOFError, OSError) as error:
        if isinstance(error, ConnectionError):
            raise
        raise TaskError(f"{what} is no .npy file: {str(error).splitlines()[0]}") from error
    if dtype.hasobject:
        raise TaskError(f"{what} holds Python objects, which would have to be unpickled: save plain numbers")
    if fortran and len(shape) > 1:
        raise TaskError(f"{what} is in Fortran order, so that its rows are scattered: save numpy.ascontiguousarray of it")
    return tuple(int(size) for size in shape), dtype


def as_array(data: npt.NDArray[Any], row: int) -> Any:
    """A row of an array in memory, as `Column.row` gives it."""
    return data[row].copy()
