"""Unpacked code: each zip and each row of layers once on disk, read by all sandboxes that run it."""

from __future__ import annotations

import hashlib
import io
import shutil
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

from smlt.emulator.functions import Archive


class CodeStore:
    """Unpacks archives below `folder`. Safe for several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def task(self, code: Archive) -> Path:
        """The folder that stands for /var/task: the function's own zip."""
        return self._unpacked(self._folder / "code" / code.sha256[:16] / "var" / "task", [code])

    def layers(self, layers: Sequence[Archive]) -> Path:
        """The folder that stands for /opt: the layers one over the other, the last one wins."""
        name = hashlib.sha256("".join(layer.sha256 for layer in layers).encode()).hexdigest()[:16]
        return self._unpacked(self._folder / "layers" / name / "opt", layers)

    def _unpacked(self, target: Path, archives: Sequence[Archive]) -> Path:
        with self._guard:
            lock = self._locks.setdefault(str(target), threading.Lock())
        with lock:
            if not target.exists():
                part = target.with_name(target.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
                for archive in archives:
                    _unpack(archive, part)
                part.rename(target)
        return target


def _unpack(archive: Archive, target: Path) -> None:
    if not archive.content:
        return
    with zipfile.ZipFile(io.BytesIO(archive.content)) as zipped:
        for entry in zipped.infolist():
            path = Path(zipped.extract(entry, target))  # keeps within the target whatever the name says
            mode = entry.external_attr >> 16 & 0o777
            if mode and not entry.is_dir():
                path.chmod((mode | 0o400) & ~0o222)  # on Lambda nobody writes there either
