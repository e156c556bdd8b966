"""Shards of .npy files: the rows of an array. https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"""

from __future__ import annotations

from collections.abc import Sequence

from smlt.errors import TaskError
from smlt.worker.files import DataFiles
from smlt.worker.shards.rows import Column, Rows, check_lengths, read_npy_header


def open_npy(files: DataFiles, name: str, columns: Sequence[str] | None) -> Rows:
    """The rows of an array. TaskError when the file is none, is cut off, or was pickled."""
    if columns is not None:
        raise TaskError(f"the data file {name} is one array and has no columns {', '.join(columns)}")
    with files.open(name) as file:
        shape, dtype = read_npy_header(file, f"the data file {name}")
        column = Column(file.tell(), dtype, shape)
    check_lengths(name, {"": shape})
    size = files.size(name)
    if column.end != size:
        raise TaskError(f"the data file {name} has {size} bytes, and its header tells of {column.end}: it is not whole")
    return Rows({"": column}, "array")
