"""What must be in a source distribution and in a wheel, and nothing else: compared with the files of the repository."""

from __future__ import annotations

import base64
import email
import hashlib
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Files of the package that are for building it.
SOURCES = {".pyx", ".pxd"}
#: What packing adds to a source distribution.
PACKED = {"PKG-INFO", "setup.cfg"}
#: What a wheel has to say of itself.
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
#: What building from a source distribution takes, and what its reader expects.
NEEDED = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "setup.py", "smlt/py.typed", "smlt/_version.py"}


def tracked() -> set[str]:
    """The repository's files, as git has them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split("\n")) - {""}


def packaged() -> set[str]:
    """Those that an installation has."""
    return {name for name in tracked() if name.startswith("smlt/") and Path(name).suffix not in SOURCES}


def of_sdist(path: Path, version: str) -> Iterator[str]:
    """What is wrong with a source distribution, a sentence each."""
    top, files = f"smlt-{version}/", tracked()
    with tarfile.open(path) as archive:
        held = {member.name.removeprefix(top): member for member in archive.getmembers() if member.isfile()}
        for name, member in held.items():
            if name in PACKED or name.startswith("smlt.egg-info/"):
                continue
            content = archive.extractfile(member)
            if name not in files:
                yield f"{path.name} holds {name}, which is no file of the repository"
            elif content is None or content.read() != (ROOT / name).read_bytes():
                yield f"{path.name} holds another {name} than the repository"
    built = {name for name in files if name.startswith(("smlt/", "csrc/"))}
    for name in sorted((NEEDED | built) - set(held)):
        yield f"{path.name} lacks {name}"


def of_wheel(path: Path, version: str) -> Iterator[str]:
    """What is wrong with a wheel, a sentence each: every file but the libraries is the repository's, byte for byte."""
    expected, info = packaged(), f"smlt-{version}.dist-info/"
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        libraries = {name for name in names if re.fullmatch(r"smlt/collective/_(native|shared)\.[\w.-]*so", name)}
        if sorted(name.split("/")[-1].split(".")[0] for name in libraries) != ["_native", "_shared"]:
            yield f"{path.name} holds {len(libraries)} native libraries, not one _native and one _shared"
        for name in sorted(names - libraries - expected - {info + one for one in METADATA}):
            yield f"{path.name} holds {name}, which does not belong there"
        for name in sorted((expected | {info + one for one in METADATA}) - names):
            yield f"{path.name} lacks {name}"
        for name in sorted(names & expected):
            if archive.read(name) != (ROOT / name).read_bytes():
                yield f"{path.name} holds another {name} than the repository"
        yield from _record(path, archive, info)
        said = email.message_from_bytes(archive.read(info + "METADATA"))["Version"]
        if said != version:
            yield f"{path.name} calls itself {said}, not {version}"


def _record(path: Path, archive: zipfile.ZipFile, info: str) -> Iterator[str]:
    names = set(archive.namelist()) - {info + "RECORD"}
    digests = {line.rsplit(",", 2)[0]: line.rsplit(",", 2)[1] for line in archive.read(info + "RECORD").decode().splitlines()}
    del digests[info + "RECORD"]
    if names != set(digests):
        yield f"{path.name} records other files than it holds: {', '.join(sorted(names ^ set(digests)))}"
    for name, digest in digests.items():
        if name not in names:
            continue
        found = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
        if digest != f"sha256={found}":
            yield f"{path.name} records another digest of {name}"


def names_of(wheel: Path) -> set[str]:
    """The files of a wheel, without what differs from one system to another: the libraries' ending."""
    with zipfile.ZipFile(wheel) as archive:
        return {re.sub(r"_(native|shared)\..*so$", r"_\1.so", name) for name in archive.namelist()}
