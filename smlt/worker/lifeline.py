"""The life line of a child process: a pipe on stdin that closes when whoever started it is gone, however that ended."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable

EXIT_CODE = 130


def end_with_parent(last_words: Callable[[], None] | None = None, take_line: Callable[[bytes], None] | None = None) -> None:
    """From now on this process ends (exit code 130) when stdin closes, after `last_words` have been said.

    `take_line` is given each line that comes before.
    """

    def watch() -> None:
        rest = b""
        while data := os.read(0, 1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if take_line is not None:
                    take_line(line)
        try:
            with contextlib.suppress(OSError):  # stderr may have gone the same way
                print("smlt: whoever started this process is gone; ending", file=sys.stderr, flush=True)
            if last_words is not None:
                last_words()
        finally:
            os._exit(EXIT_CODE)

    threading.Thread(target=watch, name="smlt-life-line", daemon=True).start()
