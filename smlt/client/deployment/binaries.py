"""Whether compiled files fit the function's architecture and Python, seen from their names and first bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable

from smlt.errors import DeployError

#: e_machine in an ELF header: https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html
_MACHINES = {62: "x86_64", 183: "arm64"}
_EXTENSION = re.compile(r"\.cpython-(\d)(\d+)t?-[\w-]+\.so$|\.cp(\d)(\d+)-[\w-]+\.pyd$")


def check_binaries(where: str, names: Iterable[str], head: Callable[[str], bytes], arch: str, python: str) -> None:
    """DeployError for the first compiled file that Lambda could not load; `head` gives a file's first 20 bytes."""
    for name in names:
        if not re.search(r"\.so(\.[\d.]+)?$|\.pyd$|\.dylib$", name):
            continue
        begin = head(name)
        if begin[:4] != b"\x7fELF" or len(begin) < 20:
            raise DeployError(f"{where}: {name} is not compiled for Linux, which Lambda runs")
        (machine,) = struct.unpack("<H", begin[18:20])
        if _MACHINES.get(machine) != arch:
            raise DeployError(
                f"{where}: {name} is compiled for {_MACHINES.get(machine, 'another machine')}, the function is {arch}"
            )
        found = _EXTENSION.search(name)
        if found and f"{found[1]}.{found[2]}" != python:
            raise DeployError(f"{where}: {name} is compiled for Python {found[1]}.{found[2]}, the function runs {python}")
