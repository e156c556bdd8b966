"""What Lambda's Python runtimes have, and whether a layer's zip file fits one: sizes, machine, Python, glibc.

Run before anything is uploaded: a library for another machine or a newer glibc is found by Lambda only when it is imported.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from smlt.client.elf import MAGIC, read_library
from smlt.errors import ConfigError, DeployError

#: Lambda's names for the machines, and Linux's.
ARCHITECTURES = {"x86_64": "x86_64", "arm64": "aarch64"}

#: By Python, the glibc that its runtime has: python3.11 runs on Amazon Linux 2, later ones on Amazon Linux 2023.
#: https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtimes.html, https://docs.aws.amazon.com/linux/al2023/ug/compare-with-al2.html
GLIBC = {"3.11": (2, 26), "3.12": (2, 34), "3.13": (2, 34), "3.14": (2, 34)}

#: "50 MB (zipped, for direct upload)", "250 MB (unzipped)", all layers and the function together; AWS counts in 2^20.
#: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
ZIPPED_BYTES_MAX = 50 * 2**20
UNPACKED_BYTES_MAX = 250 * 2**20


@dataclass(frozen=True)
class LayerPackage:
    """A distribution in a layer, and the bytes its files take in the zip file and in /opt."""

    name: str
    version: str
    zipped_bytes: int
    unpacked_bytes: int


@dataclass(frozen=True)
class LayerReport:
    """A layer that fits. `glibc`: the newest version that a library in it asks for; `packages`: the largest first."""

    path: Path
    arch: str
    python: str
    sha256: str
    zipped_bytes: int
    unpacked_bytes: int
    glibc: str
    libraries: int
    packages: tuple[LayerPackage, ...]


def check_target(arch: str, python: str) -> None:
    """ConfigError when Lambda has no such architecture or Python."""
    if arch not in ARCHITECTURES:
        raise ConfigError(f"Lambda has no architecture {arch!r}: it has {' and '.join(ARCHITECTURES)}")
    if python not in GLIBC:
        raise ConfigError(f"SMLT does not run on a Lambda runtime with Python {python!r}: take one of {', '.join(GLIBC)}")


def check_layer(path: Path, arch: str, python: str, *, direct_upload: bool = True) -> LayerReport:
    """Look whether a layer's zip file can work with the runtime python<python> on `arch` ("x86_64" or "arm64").

    `direct_upload`: the file is sent in the request itself, which Lambda limits to 50 MB; through S3 only the 250 MB of the
    unpacked layer count.
    DeployError, a sentence, when it holds no smlt, is too large (what is largest is named), or one of its libraries is for
    another machine, another Python or a newer glibc. ConfigError for a target that Lambda does not have.
    """
    check_target(arch, python)
    try:
        with zipfile.ZipFile(path) as layer:
            entries = [entry for entry in layer.infolist() if not entry.is_dir()]
            if not any(entry.filename == "python/smlt/__init__.py" for entry in entries):
                raise DeployError(f"{path} holds no python/smlt: it is no layer that `smlt layer build` has made")
            packages = _packages(layer, entries)
            unpacked = sum(entry.file_size for entry in entries)
            check_sizes(str(path), path.stat().st_size if direct_upload else 0, unpacked, packages)
            newest: tuple[int, ...] = (0, 0)
            libraries = 0
            for name, content in _libraries(layer, entries):
                newest = max(newest, _check_library(f"{path}: {name}", content, arch, python))
                libraries += 1
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DeployError(f"there is no layer {path}: `smlt layer build` makes one") from error
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DeployError(f"{path} cannot be read as a zip file ({error}): build the layer again") from error
    glibc = ".".join(map(str, newest))
    return LayerReport(path, arch, python, digest, path.stat().st_size, unpacked, glibc, libraries, packages)


def check_sizes(what: str, zipped: int, unpacked: int, packages: tuple[LayerPackage, ...]) -> None:
    """DeployError when Lambda does not take so many bytes; it names the largest packages."""
    for size, limit, how in (
        (unpacked, UNPACKED_BYTES_MAX, "unpacked, all layers and the function together"),
        (zipped, ZIPPED_BYTES_MAX, "zipped, in a direct upload"),
    ):
        if size > limit:
            largest = ", ".join(f"{one.name} {one.version} ({megabytes(one.unpacked_bytes)})" for one in packages[:3])
            raise DeployError(
                f"{what} has {megabytes(size)}, Lambda takes {megabytes(limit)} {how}; largest unpacked: {largest}. "
                "Leave packages out, or take a container image: smlt layer dockerfile"
            )


def megabytes(size: int) -> str:
    """As Lambda counts: 2^20 bytes."""
    return f"{size / 2**20:.1f} MB"


def _libraries(layer: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> Iterator[tuple[str, bytes]]:
    """The ELF files, whatever they are called."""
    for entry in entries:
        with layer.open(entry) as file:
            if file.read(len(MAGIC)) == MAGIC:
                yield entry.filename, layer.read(entry)


def _check_library(where: str, content: bytes, arch: str, python: str) -> tuple[int, ...]:
    """The glibc that it needs, when that and all the rest is what the runtime has."""
    try:
        library = read_library(content)
    except ValueError as error:
        raise DeployError(f"{where} is {error}: build the layer again") from error
    if library.machine != ARCHITECTURES[arch]:
        raise DeployError(
            f"{where} is made for {library.machine}, the function's architecture is {arch}: build the layer for it"
        )
    made_for = re.search(r"\.cpython-3(\d+)[a-z]*-[^/]*\.so$", where)  # what is for every Python has no such name
    if made_for and f"3.{made_for[1]}" != python:
        raise DeployError(f"{where} is made for Python 3.{made_for[1]}, the function's is {python}: build the layer for it")
    if library.glibc > GLIBC[python]:
        wants, has = (".".join(map(str, version)) for version in (library.glibc, GLIBC[python]))
        raise DeployError(
            f"{where} needs glibc {wants}, Lambda's python{python} has {has}: take a wheel for that or an older one"
        )
    return library.glibc


def _packages(layer: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> tuple[LayerPackage, ...]:
    """The distributions by their RECORD; what belongs to none is the package "other files"."""
    sizes = {entry.filename: (entry.compress_size, entry.file_size) for entry in entries}
    packages = []
    for record in [name for name in sizes if re.fullmatch(r"python/[^/]+\.dist-info/RECORD", name)]:
        name, _, version = record.split("/")[1].removesuffix(".dist-info").partition("-")
        listed = layer.read(record).decode("utf-8", "replace").splitlines()
        packages.append(_sum(name, version, {"python/" + line.split(",")[0].strip('"') for line in listed}, sizes))
    if sizes:
        packages.append(_sum("other files", "", set(sizes), sizes))
    return tuple(sorted((one for one in packages if one.unpacked_bytes), key=lambda one: -one.unpacked_bytes))


def _sum(name: str, version: str, files: set[str], sizes: dict[str, tuple[int, int]]) -> LayerPackage:
    """The package of those files, which are taken out of `sizes`."""
    taken = [sizes.pop(file) for file in files & sizes.keys()]
    return LayerPackage(name, version, sum(zipped for zipped, _ in taken), sum(unpacked for _, unpacked in taken))


def as_row(report: LayerReport) -> Mapping[str, object]:
    """The report as JSON has it."""
    row = {name: value for name, value in vars(report).items() if name not in ("path", "packages")}
    return {"path": str(report.path), **row, "packages": [vars(package) for package in report.packages]}
