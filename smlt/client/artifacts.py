"""The Artifact Manager: packs the training script and its data and puts them in the object store."""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path

from smlt.errors import CheckpointError, SmltError, TaskError
from smlt.store.object import ObjectStore
from smlt.worker.files import FILES_AT_ONCE
from smlt.worker.manifest import check_names, read_manifest, write_manifest

#: Told how many bytes have been sent, and how many there are to send.
UploadProgress = Callable[[int, int], None]


class ArtifactManager:
    """Uploads below `<run>/` in `objects`; the manifest is written last and names every file with its SHA-256.

    Several files go at a time, none is held in memory. An interrupted upload leaves `<run>/<kind>.sent.json`, which says
    what was sent: the next one sends the rest only. `progress` is called from several threads, one at a time.
    """

    def __init__(self, objects: ObjectStore, run: str, progress: UploadProgress | None = None) -> None:
        self.objects, self.run, self.progress = objects, run, progress
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
        journal = f"{prefix}.sent.json"
        there = {**self._manifest(prefix), **self._sent_before(journal)}
        before = {name: _state(path) for name, path in files.items()}
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            manifest = dict(zip(files, pool.map(_digest, files.values()), strict=True))
        wanted = {name: path for name, path in files.items() if there.get(name) != manifest[name]}
        total, sent, done = sum(before[name][0] for name in wanted), 0, {}
        lock, stopping = threading.Lock(), threading.Event()

        def report(count: int) -> None:
            nonlocal sent
            if stopping.is_set():  # ends what is under way in the other threads
                raise KeyboardInterrupt
            if not count:
                return
            with lock:
                sent += count
                if self.progress is not None:
                    self.progress(sent, total)

        def send(name: str) -> None:
            self.objects.put(f"{prefix}/{name}", wanted[name], report)
            if _state(wanted[name]) != before[name]:
                raise TaskError(f"{wanted[name]} was changed while it was uploaded: start again when it is complete")
            done[name] = manifest[name]

        pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="smlt-upload")
        try:
            for _ in pool.map(send, wanted):
                pass
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            if done:
                with suppress(SmltError):
                    self.objects.put(journal, json.dumps({**self._sent_before(journal), **done}).encode())
            raise
        pool.shutdown()
        digest = write_manifest(self.objects, prefix, manifest)
        self.objects.delete(journal)
        return total, digest

    def _manifest(self, prefix: str) -> dict[str, str]:
        try:
            return read_manifest(self.objects, prefix)
        except CheckpointError:
            return {}

    def _sent_before(self, journal: str) -> dict[str, str]:
        """What an interrupted upload has sent, by name; what cannot be read is sent again."""
        if not self.objects.exists(journal):
            return {}
        try:
            return {str(name): str(digest) for name, digest in json.loads(self.objects.get(journal)).items()}
        except (ValueError, AttributeError, RecursionError):
            return {}


def _state(path: Path) -> tuple[int, int]:
    """What tells that a file was written to: its size and time."""
    try:
        found = path.stat()
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror or error}") from error
    return found.st_size, found.st_mtime_ns


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror or error}") from error


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
