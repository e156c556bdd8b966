"""What a shared library needs: its machine and the newest version of glibc that it names. The few fields of ELF that tell."""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = b"\x7fELF"
#: e_machine of the two that Lambda has.
MACHINES = {62: "x86_64", 183: "aarch64"}

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_STRTAB, _DT_VERNEED, _DT_VERNEEDNUM = 0, 5, 0x6FFFFFFE, 0x6FFFFFFF


@dataclass(frozen=True)
class Library:
    """`machine`: as `uname -m` says it, "machine 40" for others. `glibc`: (2, 17) for GLIBC_2.17; (0, 0) when none is named."""

    machine: str
    glibc: tuple[int, ...]


def read_library(content: bytes) -> Library:
    """Read a 64-bit little-endian ELF file, whole. ValueError when it is none, or its tables lead out of the file.

    The layout: System V ABI, chapters 4 and 5; the version tables: Linux Standard Base, "Symbol Versioning".
    """
    if content[:4] != MAGIC:
        raise ValueError("not an ELF file")
    if content[4:6] != b"\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    try:
        return Library(_machine(content), max(map(_glibc_version, _needed_versions(content)), default=(0, 0)))
    except (struct.error, IndexError) as error:
        raise ValueError("a damaged ELF file") from error


def _machine(content: bytes) -> str:
    number = struct.unpack_from("<H", content, 18)[0]
    return MACHINES.get(number, f"machine {number}")


def _glibc_version(name: str) -> tuple[int, ...]:
    """(2, 17) of "GLIBC_2.17"; (0, 0) of other libraries' versions and of GLIBC_PRIVATE, GLIBC_ABI_DT_RELR and the like."""
    numbers = name.removeprefix("GLIBC_").split(".")
    if not name.startswith("GLIBC_") or not all(number.isdecimal() for number in numbers):
        return (0, 0)
    return tuple(map(int, numbers))


def _needed_versions(content: bytes) -> list[str]:
    """The names of all symbol versions that the file wants of others."""
    loads, dynamic = _segments(content)
    tags: dict[int, int] = {}
    if dynamic is not None:
        offset, size = dynamic
        for at in range(offset, offset + size, 16):
            tag, value = struct.unpack_from("<qQ", content, at)
            if tag == _DT_NULL:
                break
            tags[tag] = value
    if _DT_VERNEED not in tags:
        return []
    names, at = _offset(loads, tags[_DT_STRTAB]), _offset(loads, tags[_DT_VERNEED])
    found = []
    for _ in range(tags.get(_DT_VERNEEDNUM, 0)):
        count, aux, following = struct.unpack_from("<2xH4xII", content, at)  # Elf64_Verneed
        inner = at + aux
        for _ in range(count):
            name, next_aux = struct.unpack_from("<8xII", content, inner)  # Elf64_Vernaux
            found.append(_string(content, names + name))
            inner += next_aux
        at += following
    return found


def _segments(content: bytes) -> tuple[list[tuple[int, int, int]], tuple[int, int] | None]:
    """((address, offset, size) of what is loaded, (offset, size) of the dynamic section)."""
    (table,) = struct.unpack_from("<Q", content, 32)
    entry, count = struct.unpack_from("<HH", content, 54)
    loads, dynamic = [], None
    for number in range(count):
        kind, offset, address, size = struct.unpack_from("<I4xQQ8xQ", content, table + number * entry)
        if kind == _PT_LOAD:
            loads.append((address, offset, size))
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, size)
    return loads, dynamic


def _offset(loads: list[tuple[int, int, int]], address: int) -> int:
    for start, offset, size in loads:
        if start <= address < start + size:
            return offset + address - start
    raise IndexError(address)


def _string(content: bytes, at: int) -> str:
    end = content.find(b"\0", at)
    if end < 0:
        raise IndexError(at)
    return content[at:end].decode("ascii", "replace")
