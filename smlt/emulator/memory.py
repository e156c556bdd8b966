"""What sandboxes use: memory and /tmp, looked at a few times a second, with Lambda's limits."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from smlt.emulator.sandbox import Sandbox

MB = 1024 * 1024
#: How often main processes, and how often their children and /tmp, are looked at.
TICK_S = 0.1
_SLOW_TICK_S = 1.0


def peak_bytes(pid: int) -> int:
    """The most resident memory the process has had: exact on Linux, elsewhere what it has now. 0 when it is gone."""
    if sys.platform == "linux":
        try:
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            return 0
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


class Monitor:
    """Kills sandboxes that are over their memory or /tmp. `tick` is called along the way, once a second."""

    def __init__(self, sandboxes: Callable[[], Iterable[Sandbox]], tick: Callable[[], None]) -> None:
        self._sandboxes = sandboxes
        self._tick = tick
        self._closed = threading.Event()
        self._families: dict[int, list[int]] = {}
        self._thread = threading.Thread(target=self._watch, name="smlt-lambda-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        slow = 0.0
        while not self._closed.wait(TICK_S):
            sandboxes = [sandbox for sandbox in self._sandboxes() if sandbox.alive and sandbox.running]
            if time.monotonic() - slow >= _SLOW_TICK_S:
                slow = time.monotonic()
                self._families = _families({sandbox.pid for sandbox in sandboxes}) if sandboxes else {}
                for sandbox in sandboxes:
                    self._check_tmp(sandbox)
                self._tick()
            for sandbox in sandboxes:
                self._check_memory(sandbox)

    def _check_memory(self, sandbox: Sandbox) -> None:
        children = self._families.get(sandbox.pid, [])
        used = resident_bytes([sandbox.pid, *children])
        limit = sandbox.function.memory_mb * MB
        if used > limit and children:
            used = resident_bytes([sandbox.pid, *children], shared_once=True)  # dear, so only when it matters
        if children:
            sandbox.max_memory_bytes = max(sandbox.max_memory_bytes, used)
        if max(used, sandbox.measure()) > limit:
            sandbox.kill("memory")

    @staticmethod
    def _check_tmp(sandbox: Sandbox) -> None:
        used = folder_bytes(sandbox.tmp)
        if used > sandbox.function.ephemeral_mb * MB:
            sandbox.kill(
                f"/tmp holds {used // MB} MB, and EphemeralStorage is {sandbox.function.ephemeral_mb} MB. On Lambda the write "
                "fails with: No space left on device; lambda-local ends the sandbox"
            )


def resident_bytes(pids: Iterable[int], *, shared_once: bool = False) -> int:
    """Resident memory of processes. `shared_once`: pages that several of them share are divided among them, on Linux."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            full = process.memory_full_info() if shared_once else None
            total += int(getattr(full, "pss", 0) or process.memory_info().rss)
    return total


def folder_bytes(folder: Path) -> int:
    """Disk space that the files below `folder` take."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


def _families(leaders: set[int]) -> dict[int, list[int]]:
    """The descendants of each leader."""
    children: dict[int, list[int]] = {}
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(process.info["ppid"], []).append(process.pid)
    families = {}
    for leader in leaders:
        found = list(children.get(leader, []))
        for pid in found:
            found += children.get(pid, [])
        families[leader] = found
    return families
