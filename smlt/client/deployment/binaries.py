"""Whether a package's compiled files fit the function's architecture, Python and system."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from smlt.client.elf import MAGIC, read_library
from smlt.client.layer_check import ARCHITECTURES, GLIBC
from smlt.errors import DeployError

#: What has such a name and is no ELF file is for another system than Lambda's.
_COMPILED = re.compile(r"\.(so(\.[\d.]+)?|pyd|dylib|dll)$")


def check_binaries(where: str, files: Mapping[str, Path], arch: str, python: str) -> None:
    """DeployError for the first compiled file that Lambda could not load."""
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            is_elf = file.read(len(MAGIC)) == MAGIC
        if not is_elf and _COMPILED.search(name):
            raise DeployError(f"{where}: {name} is not compiled for Linux, which Lambda runs")
        if is_elf:
            _check(f"{where}: {name}", path.read_bytes(), arch, python)


def _check(what: str, content: bytes, arch: str, python: str) -> None:
    try:
        library = read_library(content)
    except ValueError as error:
        raise DeployError(f"{what} is {error}") from error
    if library.machine != ARCHITECTURES[arch]:
        raise DeployError(f"{what} is compiled for {library.machine}, the function is {arch}")
    found = re.search(r"\.cpython-3(\d+)[a-z]*-[^/]*\.so$", what)  # one for every Python has no such name
    if found and f"3.{found[1]}" != python:
        raise DeployError(f"{what} is compiled for Python 3.{found[1]}, the function runs {python}")
    if library.glibc > GLIBC[python]:
        wants, has = (".".join(map(str, version)) for version in (library.glibc, GLIBC[python]))
        raise DeployError(f"{what} needs glibc {wants}, Lambda's python{python} has {has}")
