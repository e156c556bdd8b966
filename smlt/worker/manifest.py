"""Manifests: which files an upload consists of, and what each must be. Nothing in one is believed before it is checked.

A manifest comes out of an object store that others may write to: a name must not lead out of the folder that the files
are brought to, and a file is what the manifest says when its SHA-256 is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from hashlib import sha256

from smlt.errors import CheckpointError
from smlt.store.object import ObjectStore

NAME = "MANIFEST.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")


def write_manifest(objects: ObjectStore, prefix: str, digests: dict[str, str]) -> str:
    """Put the manifest of the files below `prefix`; returns its own SHA-256."""
    content = json.dumps(digests, indent=1).encode()
    objects.put(f"{prefix}/{NAME}", content)
    return sha256(content).hexdigest()


def read_manifest(objects: ObjectStore, prefix: str, expected_sha256: str | None = None) -> dict[str, str]:
    """Names below `prefix` and their SHA-256, all names safe to write below a folder.

    CheckpointError when there is no manifest, when it cannot be read, when its own SHA-256 is not the expected one, and
    naming the first name that is not safe.
    """
    key = f"{prefix}/{NAME}"
    if not objects.exists(key):
        raise CheckpointError(f"{key} is missing: the upload was not completed")
    content = objects.get(key)
    if expected_sha256 is not None and sha256(content).hexdigest() != expected_sha256:
        raise CheckpointError(f"{key} is not what was uploaded: its SHA-256 is not the one that this run was started with")
    try:
        manifest = json.loads(content, object_pairs_hook=_once)
        digests = {str(name): str(digest) for name, digest in manifest.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{key} is not a manifest: {error}") from error
    try:
        check_names(digests)
    except ValueError as error:
        raise CheckpointError(f"{key}: {error}") from None
    for name, digest in digests.items():
        if not _DIGEST.fullmatch(digest):
            raise CheckpointError(f"{key}: {name!r} has no SHA-256")
    return digests


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON takes the last of several equal names; whoever checks another one than is used is deceived."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def check_names(names: Iterable[str]) -> None:
    """ValueError for the first name that must not be joined to a folder, or that a file system may take for another."""
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        problem = _problem(name)
        if problem:
            raise ValueError(f"the name {name[:200]!r} {problem}")
        if (folded := _folded(name)) in seen:
            raise ValueError(f"the names {seen[folded]!r} and {name!r} are the same where case does not count: rename one")
        seen[folded] = name
        parts = name.split("/")
        folders.update((_folded("/".join(parts[:depth])), name) for depth in range(1, len(parts)))
    for folded in seen.keys() & folders.keys():
        raise ValueError(f"{seen[folded]!r} is both a file and the folder of {folders[folded]!r}")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _problem(name: str) -> str:
    if "\0" in name:
        return "holds a NUL"
    if "\\" in name:
        return "holds a backslash"
    if name.startswith("/"):
        return "is absolute"
    if re.match(r"[A-Za-z]:", name):
        return "begins with a drive letter"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "leads out of its folder, or has an empty part"
    if _folded(name) == NAME.casefold():
        return "is the manifest's own"
    return ""
