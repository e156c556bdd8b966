"""Files of JSON lines in a run's folder, to which several threads or processes may add."""

from __future__ import annotations

import os
from pathlib import Path

from smlt.errors import CheckpointError


def append_row(path: Path, line: str) -> None:
    """Add a line of JSON to a file. CheckpointError when it cannot be written."""
    content = line.encode() + b"\n"
    try:
        # One write to a file opened for appending: rows do not mix, and are there as a whole or cut off at the end.
        with open(path, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line before was cut short when its writer ended
                    content = b"\n" + content
            file.write(content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
