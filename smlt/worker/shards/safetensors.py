"""Shards of .safetensors files: rows of tensors by name. https://huggingface.co/docs/safetensors/index#format

The library reads local files only; the header, which is all that is needed, is small.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from smlt.errors import TaskError
from smlt.worker.files import DataFiles
from smlt.worker.shards.rows import Column, Rows, check_lengths, chosen

#: As the library has it.
HEADER_BYTES_MAX = 100_000_000

DTYPES = {
    "BOOL": "?",
    **{f"{kind}{bits}": f"<{letter}{bits // 8}" for kind, letter in (("I", "i"), ("U", "u")) for bits in (8, 16, 32, 64)},
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}


def open_safetensors(files: DataFiles, name: str, columns: Sequence[str] | None) -> Rows:
    """The rows of tensors. TaskError when the file is none, is cut off, or has a dtype that NumPy has not."""
    size = files.size(name)
    with files.open(name) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_BYTES_MAX, size - 8):
            raise TaskError(f"the data file {name} is no .safetensors file: its header would have {length} bytes")
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        found = {}
        for column in chosen(name, sorted(header), columns):
            found[column] = _column(header[column], 8 + length, size, f"{column} in the data file {name}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TaskError(f"the data file {name} is no .safetensors file: {type(error).__name__}: {error}") from error
    check_lengths(name, {column: one.shape for column, one in found.items()})
    return Rows(found, "dict" if columns is None else "tuple")


def _column(described: dict[str, Any], data_start: int, size: int, what: str) -> Column:
    if described["dtype"] not in DTYPES:
        raise TaskError(f"{what} is {described['dtype']}, which NumPy has not: save F32 or F16")
    begin, end = (int(offset) for offset in described["data_offsets"])
    shape = tuple(int(length) for length in described["shape"])
    column = Column(data_start + begin, np.dtype(DTYPES[described["dtype"]]), shape)
    if begin < 0 or min(shape, default=0) < 0 or column.end != data_start + end:
        raise TaskError(f"{what} has offsets that do not fit its shape")
    if column.end > size:
        raise TaskError(f"{what} is cut off")
    return column
