"""The guard: a shell beside the emulator that ends every sandbox and removes the folder, however the emulator ends.

A frozen sandbox (SIGSTOP) does not see its connection close, and nobody would ever wake it; the guard sees a pipe close,
which happens for SIGKILL too, on Linux and macOS.
"""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

_GUARD = """
folder=$1; groups=" "
trap '' TERM INT HUP
while read -r sign group; do
  case $sign in
    +) groups="$groups$group " ;;
    -) case $groups in *" $group "*) groups="${groups%% $group *} ${groups#* $group }" ;; esac ;;
  esac
done
for group in $groups; do kill -s KILL -- "-$group" 2>/dev/null; done
rm -rf "$folder"
"""


class Guard:
    """Knows the process groups that must not outlive the emulator, and the folder that must not be left."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "smlt-lambda-guard", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
            cwd="/",
        )

    def add(self, group: int) -> None:
        """The process group lives from now on."""
        self._tell(f"+ {group}\n")

    def remove(self, group: int) -> None:
        """The process group is about to be reaped: its number may be given to another."""
        self._tell(f"- {group}\n")

    def close(self) -> None:
        """Let the guard end what is left, and wait for it."""
        pipe = self._shell.stdin
        assert pipe is not None
        with self._lock:
            pipe.close()
        self._shell.wait()

    def _tell(self, line: str) -> None:
        pipe = self._shell.stdin
        assert pipe is not None
        with self._lock:
            if not pipe.closed:
                pipe.write(line.encode())
                pipe.flush()
