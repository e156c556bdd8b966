"""Folders of runs and sweeps: made under a name that is free, their files replaced whole."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from smlt.errors import CheckpointError, ConfigError, StoreError


def make_folder(parent: Path, script: Path, name: str | None, *, kind: str, name_max: int, to_resume: str) -> Path:
    """A new folder in `parent` with `logs` in it, called `name` or, without one, after the time and the script.

    `kind` ("run", "sweep") and `to_resume` are for messages. ConfigError when the name is taken or no name at all,
    StoreError when the folder cannot be made.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", script.stem)[: name_max - 20] or kind
    for attempt in range(100):
        made = time.strftime("%Y%m%d-%H%M%S-") + stem + (f"-{attempt}" if attempt else "")
        chosen = made if name is None else name
        if not re.fullmatch(rf"[A-Za-z0-9_-]{{1,{name_max}}}", chosen):
            raise ConfigError(f"{kind} name {chosen!r}: use 1 to {name_max} letters, digits, '_' and '-'")
        path = Path(parent).absolute() / chosen
        try:
            (path / "logs").mkdir(parents=True)
        except FileExistsError:
            if name is not None:
                raise ConfigError(f"there is a run or sweep {name} in {parent} already; {to_resume}") from None
            continue
        except OSError as error:
            raise StoreError(f"cannot make the {kind} folder {path}: {error.strerror}") from error
        return path
    raise ConfigError(f"no free name for a {kind} in {parent}")


def replace_file(path: Path, text: str) -> None:
    """Write a file anew: whoever reads it meanwhile sees the old one or the new one."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def read_object(path: Path, whose: str) -> dict[str, Any]:
    """A file that holds a JSON object. CheckpointError, which begins with `whose`, when it does not."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{whose}: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{whose}: {path} is not a JSON object")
    return value
