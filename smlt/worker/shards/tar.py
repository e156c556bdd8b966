"""Shards of .tar files as WebDataset has them: https://github.com/webdataset/webdataset#the-webdataset-format

Files whose names are equal up to the first dot behind the last slash are one sample.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from smlt.errors import TaskError
from smlt.worker.files import DataFiles

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class Tar:
    """The samples of a tar file: by key, what they are made of as (extension, first byte, length)."""

    def __init__(self, name: str, members: dict[str, list[tuple[str, int, int]]], columns: Sequence[str] | None) -> None:
        self.name, self.columns = name, columns
        self._keys, self._members = list(members), list(members.values())
        self.kind = "samples of a tar file"

    def __len__(self) -> int:
        return len(self._keys)

    def ranges(self, index: int) -> list[tuple[int, int]]:
        return [(start, length) for _, start, length in self._members[index]]

    def sample(self, index: int, pieces: list[bytes]) -> Any:
        where = f"sample {self._keys[index]!r} in the data file {self.name}"
        names = [extension for extension, _, _ in self._members[index]]
        parts = {name: decoded(name, piece, where) for name, piece in zip(names, pieces, strict=True)}
        return parts if self.columns is None else tuple(parts[name] for name in self.columns)


def open_tar(files: DataFiles, name: str, columns: Sequence[str] | None) -> Tar:
    """The samples of a tar file; only headers are read. TaskError when it is none, is cut off, or a sample is not whole."""
    members: dict[str, list[tuple[str, int, int]]] = {}
    size = files.size(name)
    try:
        with files.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                found = _NAME.fullmatch(member.name)
                if found is None or not member.isreg() or member.issparse():
                    continue
                key, extension = found[1], found[2].lower()
                if member.offset_data + member.size > size:
                    raise TaskError(f"the data file {name} is cut off within {member.name}")
                parts = members.setdefault(key, [])
                if any(other == extension for other, _, _ in parts):
                    raise TaskError(f"the data file {name} holds {member.name} twice")
                parts.append((extension, member.offset_data, member.size))
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any nonsense for the end
                raise TaskError(f"the data file {name} does not end as a .tar file does: it is cut off")
    except tarfile.TarError as error:
        raise TaskError(f"the data file {name} is no .tar file, or is cut off: {error}") from error
    if columns is not None:
        for key, parts in members.items():
            there = {part[0]: part for part in parts}
            for column in columns:
                if column not in there:
                    raise TaskError(f"sample {key!r} in the data file {name} has no .{column}: it has {', '.join(there)}")
            members[key] = [there[column] for column in columns]
    return Tar(name, members, columns)


def decoded(extension: str, data: bytes, where: str) -> Any:
    """What a part of a sample is, by the end of its name. TaskError when it is not what that says."""
    end = extension.rpartition(".")[2]
    try:
        if end == "json":
            return json.loads(data)
        if end == "cls":
            return int(data)
        if end == "npy":
            return np.load(io.BytesIO(data), allow_pickle=False)
        if end == "txt":
            return data.decode()
    except (ValueError, EOFError, RecursionError) as error:
        raise TaskError(f"{where}: .{extension} cannot be read: {error}") from error
    return data
