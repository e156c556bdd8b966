"""The Artifact Manager: packs the training script and its data and puts them in the object store."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from smlt.errors import CheckpointError, TaskError
from smlt.store.object import ObjectStore
from smlt.worker.manifest import check_names, read_manifest, write_manifest


class ArtifactManager:
    """Uploads below `<run>/` in `objects`; the manifest is written last and names every file with its SHA-256."""

    def __init__(self, objects: ObjectStore, run: str) -> None:
        self.objects, self.run = objects, run
        self.code_sha256: str | None = None  # of the manifest of the code that was uploaded

    def upload_code(self, script: Path) -> str:
        """The script and the local modules it imports; returns the script's path below `<run>/code/`.

        TaskError when the script is missing or is not Python.
        """
        files = local_modules(script)
        _, self.code_sha256 = self._upload("code", {path.relative_to(script.parent).as_posix(): path for path in files})
        return script.name

    def upload_data(self, folder: Path, leave_out: Sequence[Path] = ()) -> int:
        """Every file below `folder`; returns how many bytes were sent (what lies there already is not sent again).

        `leave_out`: folders below it that are no data: with `--data .` the runs must not be copied into the run.
        """
        if not folder.is_dir():
            raise TaskError(f"--data {folder}: no such folder")
        no_data = [path.resolve() for path in leave_out if folder.resolve() in path.resolve().parents]
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not any(path.resolve().is_relative_to(other) for other in no_data)
        }
        if not files:
            raise TaskError(f"--data {folder}: the folder is empty")
        sent, _ = self._upload("data", files)
        return sent

    def _upload(self, kind: str, files: dict[str, Path]) -> tuple[int, str]:
        """How many bytes were sent, and the manifest's SHA-256."""
        prefix = f"{self.run}/{kind}"
        try:
            check_names(files)
        except ValueError as error:
            raise TaskError(f"{kind}: {error}") from None
        try:
            there = read_manifest(self.objects, prefix)
        except CheckpointError:
            there = {}
        manifest, sent = {}, 0
        for name, path in files.items():
            content = path.read_bytes()
            manifest[name] = sha256(content).hexdigest()
            if there.get(name) != manifest[name]:
                self.objects.put(f"{prefix}/{name}", content)
                sent += len(content)
        return sent, write_manifest(self.objects, prefix, manifest)


def local_modules(script: Path) -> list[Path]:
    """The script and, transitively, the modules and packages beside it that it imports."""
    if not script.is_file():
        raise TaskError(f"there is no script {script}")
    root, found, todo = script.parent, {script}, [script]
    while todo:
        path = todo.pop()
        for name in imported_names(path):
            for candidate in _files_of(root, name):
                if candidate not in found:
                    found.add(candidate)
                    todo.append(candidate)
    return sorted(found)


def imported_names(path: Path) -> set[str]:
    """The top-level modules that a Python file imports. TaskError when it is not Python."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise TaskError(f"{path.name}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise TaskError(f"{path.name} is not a Python script: {error}") from error
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _files_of(root: Path, name: str) -> list[Path]:
    """A module beside the script, or every Python file of a package there (relative imports stay inside it)."""
    if (root / f"{name}.py").is_file():
        return [root / f"{name}.py"]
    return sorted((root / name).rglob("*.py"))  # with or without __init__.py; nothing when there is no such folder
