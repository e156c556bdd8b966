"""The function's zip: a script with its local modules, or a folder, and further packages. Same input, same bytes."""

from __future__ import annotations

import os
import zipfile
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from smlt.client.artifacts import imported_names, local_modules
from smlt.errors import DeployError, TaskError
from smlt.worker.manifest import check_names

#: What no function needs: caches, and the folders that `smlt train` leaves beside a script.
_LEFT_OUT = ("__pycache__", "smlt-runs", "node_modules")
#: The oldest time that a zip can hold.
_TIME = (1980, 1, 1, 0, 0, 0)
#: What is imported when a sandbox starts rather than in the first call (SMLT_PRELOAD), where the function has it.
PRELOADABLE = ("jax", "keras", "pandas", "scipy", "sklearn", "tensorflow", "torch", "torchvision", "transformers")


@dataclass(frozen=True)
class Package:
    """A zip on this machine. `sizes`: its files' bytes, by name."""

    zip: Path
    sha256: str
    sizes: Mapping[str, int]

    @property
    def code_sha256(self) -> str:
        """The digest as Lambda shows it."""
        return lambda_digest(self.sha256)

    @property
    def modules(self) -> frozenset[str]:
        """The top-level modules in it."""
        return frozenset(name.partition("/")[0].partition(".")[0] for name in self.sizes)


def lambda_digest(hexadecimal: str) -> str:
    """A SHA-256 in base64, as Lambda's CodeSha256 is."""
    return b64encode(bytes.fromhex(hexadecimal)).decode()


def collect(package: Path) -> dict[str, Path]:
    """The package's own files by their names in the zip. DeployError for a package that is none."""
    if package.is_dir():
        files = _folder(package)
        if not any(name.endswith(".py") for name in files):
            raise DeployError(f"package {package}: there is no Python file in that folder")
    elif package.exists():
        try:
            files = {path.relative_to(package.parent).as_posix(): path for path in local_modules(package)}
        except TaskError as error:
            raise DeployError(f"package {package}: {error}") from error
    else:
        raise DeployError(f"package {package}: there is no such script or folder")
    try:
        check_names(files)
    except ValueError as error:
        raise DeployError(f"package {package}: {error}") from None
    return files


def _folder(folder: Path) -> dict[str, Path]:
    found, root = {}, folder.resolve()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if any(part.startswith(".") or part in _LEFT_OUT for part in name.parts) or path.suffix == ".pyc" or not path.is_file():
            continue
        if not path.resolve().is_relative_to(root):
            raise DeployError(f"package {folder}: {name} is a link that leads out of the folder")
        found[name.as_posix()] = path
    return found


def imports_of(files: Mapping[str, Path]) -> frozenset[str]:
    """Top-level modules that the Python files among them import. DeployError for one that is not Python."""
    found: set[str] = set()
    for name, path in files.items():
        if name.endswith(".py"):
            try:
                found |= imported_names(path)
            except TaskError as error:
                raise DeployError(f"package: {error}") from error
    return frozenset(found)


def pack(files: Mapping[str, Path], target: Path) -> Package:
    """Write the files to the zip `target`: sorted, with one time and two modes, whatever they have on this machine."""
    sizes = {}
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for name in sorted(files):
                content = files[name].read_bytes()
                info = zipfile.ZipInfo(name, _TIME)
                info.create_system, info.compress_type = 3, zipfile.ZIP_DEFLATED  # 3: Unix, on every machine
                runs = os.access(files[name], os.X_OK)
                info.external_attr = (0o100755 if runs else 0o100644) << 16  # Lambda's user is not the owner
                archive.writestr(info, content)
                sizes[name] = len(content)
    except OSError as error:
        raise DeployError(f"cannot pack {error.filename or target}: {error.strerror or error}") from error
    return Package(target, digest(target), sizes)


def digest(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read by pieces."""
    found = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
