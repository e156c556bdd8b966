"""Shards of .npz files: rows of arrays by name. numpy.savez stores them plainly: rows are read by range. What
numpy.savez_compressed has packed is unpacked as a whole and kept, for no row can be read by itself.
"""

from __future__ import annotations

import math
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from smlt.errors import TaskError
from smlt.worker.files import CACHE_BYTES, DataFiles
from smlt.worker.shards.rows import Column, Rows, as_array, check_lengths, chosen, formed, read_npy_header

#: A local file header, up to the lengths of name and extra: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
_LOCAL = struct.Struct("<4s22xHH")

#: The arrays that were unpacked last, of each set of files.
_unpacked: WeakKeyDictionary[DataFiles, Unpacked] = WeakKeyDictionary()
_lock = threading.Lock()


class Unpacked:
    """Arrays in memory, by file and name, up to `limit_bytes`."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._arrays: OrderedDict[tuple[str, str], npt.NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, files: DataFiles, name: str, member: str) -> npt.NDArray[Any]:
        with self._lock:
            if (name, member) not in self._arrays:
                self._arrays[name, member] = _unpack(files, name, member)
                while len(self._arrays) > 1 and sum(array.nbytes for array in self._arrays.values()) > self.limit_bytes:
                    self._arrays.popitem(last=False)
            self._arrays.move_to_end((name, member))
            return self._arrays[name, member]


class PackedRows:
    """A shard of which at least one array is compressed."""

    def __init__(self, files: DataFiles, name: str, columns: dict[str, Column | None], rows: Rows, form: str) -> None:
        self.files, self.name, self.columns, self.form = files, name, columns, form
        self.kind, self._length = rows.kind, len(rows)
        with _lock:
            self._arrays = _unpacked.setdefault(files, Unpacked())

    def __len__(self) -> int:
        return self._length

    def ranges(self, index: int) -> list[tuple[int, int]]:
        return [column.range(index) for column in self.columns.values() if column is not None]

    def sample(self, index: int, pieces: list[bytes]) -> Any:
        plain = iter(pieces)
        rows = [
            as_array(self._arrays.get(self.files, self.name, name), index) if column is None else column.row(next(plain))
            for name, column in self.columns.items()
        ]
        return formed(rows, list(self.columns), self.form)


def open_npz(files: DataFiles, name: str, columns: Sequence[str] | None) -> Rows | PackedRows:
    """The rows of arrays. TaskError when the file is none, an array was pickled, or is compressed and too large to be kept."""
    with files.open(name) as file, _as_zip(file, name) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        found: dict[str, Column] = {}
        packed = set()
        for array in chosen(name, sorted(members), columns):
            info, what = members[array], f"{array} in the data file {name}"
            if info.flag_bits & 1:
                raise TaskError(f"{what} is encrypted")
            if info.compress_type == zipfile.ZIP_STORED:
                begin = _begin(file, info, what)
                file.seek(begin)
                shape, dtype = read_npy_header(file, what)
                found[array] = Column(file.tell(), dtype, shape)
                if found[array].end != begin + info.file_size:
                    raise TaskError(f"{what} is cut off")
                continue
            with archive.open(info) as member:
                shape, dtype = read_npy_header(member, what)  # type: ignore[arg-type]
            if dtype.itemsize * math.prod(shape) > CACHE_BYTES:
                raise TaskError(f"{what} is compressed and too large to be kept: numpy.savez lets rows be read by themselves")
            packed.add(array)
            found[array] = Column(0, dtype, shape)
    check_lengths(name, {array: column.shape for array, column in found.items()})
    form = "dict" if columns is None else "tuple"
    rows = Rows(found, form)
    if not packed:
        return rows
    return PackedRows(files, name, {array: None if array in packed else found[array] for array in found}, rows, form)


def _as_zip(file: BinaryIO, name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise TaskError(f"the data file {name} is no .npz file: {error}") from error


def _begin(file: BinaryIO, info: zipfile.ZipInfo, what: str) -> int:
    """Where the member's own bytes begin."""
    file.seek(info.header_offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
        raise TaskError(f"{what} is not where the directory of the file says")
    _, name_length, extra_length = _LOCAL.unpack(head)
    return info.header_offset + _LOCAL.size + int(name_length) + int(extra_length)


def _unpack(files: DataFiles, name: str, member: str) -> npt.NDArray[Any]:
    with files.open(name) as file, _as_zip(file, name) as archive:
        try:
            with archive.open(f"{member}.npy") as packed:
                array: npt.NDArray[Any] = np.lib.format.read_array(packed, allow_pickle=False)
                return array
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            raise TaskError(f"{member} in the data file {name} cannot be unpacked: {error}") from error
