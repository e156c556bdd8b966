"""Checkpoints in the object store: safetensors and JSON, never pickle.

<prefix>/<step>/tensors.safetensors    model and optimizer
<prefix>/<step>/state.json             everything else
<prefix>/<step>/MANIFEST.json          SHA-256 of the two, written last: without it there is no checkpoint
"""

from __future__ import annotations

import json
import logging
from hashlib import sha256
from typing import Any

import numpy as np

from smlt.errors import CheckpointError, SmltError
from smlt.store.object import ObjectStore
from smlt.worker.data import read_manifest
from smlt.worker.frameworks import Tensors

KEPT = 3
log = logging.getLogger("smlt.checkpoint")


def save(objects: ObjectStore, prefix: str, step: int, tensors: Tensors, state: dict[str, Any]) -> str:
    """Write the checkpoint of `step` and delete all but the last three; returns its key prefix."""
    import safetensors.numpy

    where = f"{prefix}/{step:09d}"
    contents = {
        # safetensors writes an array's memory as it lies: a transposed one would come back scrambled.
        "tensors.safetensors": safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in tensors.items()}),
        "state.json": json.dumps(state, indent=1).encode(),
    }
    for name, content in contents.items():
        objects.put(f"{where}/{name}", content)
    manifest = {name: sha256(content).hexdigest() for name, content in contents.items()}
    objects.put(f"{where}/MANIFEST.json", json.dumps(manifest).encode())
    for old in _steps(objects, prefix)[:-KEPT]:
        # The manifest goes first: what is half deleted is no checkpoint.
        for key in [f"{prefix}/{old}/MANIFEST.json", *objects.list(f"{prefix}/{old}/")]:
            objects.delete(key)
    return where


def _steps(objects: ObjectStore, prefix: str) -> list[str]:
    """Names of the complete checkpoints, oldest first."""
    return sorted(key.split("/")[-2] for key in objects.list(f"{prefix}/") if key.endswith("/MANIFEST.json"))


def latest_step(objects: ObjectStore, prefix: str) -> int | None:
    """The step of the newest complete checkpoint, None when there is none."""
    steps = _steps(objects, prefix)
    return int(steps[-1]) if steps else None


def load(objects: ObjectStore, where: str) -> tuple[Tensors, dict[str, Any]]:
    """The checkpoint at `where`. CheckpointError names the file that is missing or corrupt."""
    import safetensors
    import safetensors.numpy

    manifest, contents = read_manifest(objects, where), {}
    for name in ("tensors.safetensors", "state.json"):
        key = f"{where}/{name}"
        if not objects.exists(key):
            raise CheckpointError(f"{key} is missing")
        contents[name] = objects.get(key)
        if sha256(contents[name]).hexdigest() != manifest.get(name):
            raise CheckpointError(f"{key} is corrupt: its SHA-256 is not the manifest's")
    try:
        return safetensors.numpy.load(contents["tensors.safetensors"]), json.loads(contents["state.json"])
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error


def load_latest(objects: ObjectStore, prefix: str) -> tuple[Tensors, dict[str, Any]] | None:
    """The newest checkpoint that is whole, None when none was ever written.

    A corrupt one is named in the log and the one before is used; CheckpointError when none of them is whole.
    """
    steps = _steps(objects, prefix)
    problems = []
    for step in reversed(steps):
        try:
            return load(objects, f"{prefix}/{step}")
        except SmltError as error:
            log.warning("%s; trying the checkpoint before", error)
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"no checkpoint below {prefix} can be used: {'; '.join(problems)}")
    return None
