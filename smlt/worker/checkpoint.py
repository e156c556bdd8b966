"""Checkpoints in the object store: safetensors and JSON, never pickle.

<prefix>/<step>/tensors.safetensors    model and optimizer
<prefix>/<step>/state.json             everything else
<prefix>/<step>/feedback-<rank>.safetensors    with error feedback: what that worker's codec has cut off and not sent yet
<prefix>/<step>-<worker>/              the same, when a worker has written it without the others
<prefix>/<step>/MANIFEST.json          SHA-256 of them all, written last: without it there is no checkpoint
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from smlt.errors import CheckpointError, SmltError
from smlt.store.object import ObjectStore
from smlt.worker.frameworks import Tensors
from smlt.worker.manifest import read_manifest

KEPT = 3
log = logging.getLogger("smlt.checkpoint")


def save_feedback(objects: ObjectStore, prefix: str, step: int, rank: int, tensors: Tensors) -> bytes:
    """Write a worker's own part of the checkpoint of `step`, before `save`; returns its SHA-256."""
    content = _packed(tensors)
    objects.put(f"{_where(prefix, step)}/{_feedback_name(rank)}", content)
    return sha256(content).digest()


def save(
    objects: ObjectStore,
    prefix: str,
    step: int,
    tensors: Tensors,
    state: dict[str, Any],
    feedback: Sequence[bytes] = (),
    kept: int = KEPT,
    confirm: Callable[[], None] = lambda: None,
    alone: str = "",
) -> str:
    """Write the checkpoint of `step` and delete all but the last `kept`, and what older ones have left unfinished.

    Returns its key prefix.

    `feedback`: what `save_feedback` gave, by rank. `confirm` is called before anything is written and before the manifest
    makes it a checkpoint, and raises when this worker may no longer write one. `alone`: the name of a worker that does not
    know whether others write the same checkpoint at this moment; it gets one of its own.
    """
    where = _where(prefix, step) + (f"-{alone}" if alone else "")
    put(objects, where, tensors, state, {_feedback_name(rank): digest.hex() for rank, digest in enumerate(feedback)}, confirm)
    for old, keys in _superseded(objects.list(f"{prefix}/"), kept).items():
        _delete(objects, f"{prefix}/{old}", keys)
    return where


def _superseded(keys: list[str], kept: int) -> dict[str, list[str]]:
    """Names and keys of the checkpoints that are not among the last `kept`, and of those that were never finished and never
    will be, for a later one is complete. One of the newest step may be under way in another worker.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        folders[key.split("/")[-2]].append(key)
    complete = sorted(name for name, inside in folders.items() if any(key.endswith("/MANIFEST.json") for key in inside))
    newest = max(complete, default="").partition("-")[0]
    unfinished = [name for name in folders if name not in complete and name.partition("-")[0] < newest]
    return {name: folders[name] for name in [*complete[:-kept], *unfinished]}


def put(
    objects: ObjectStore,
    where: str,
    tensors: Tensors,
    state: dict[str, Any],
    digests: Mapping[str, str] | None = None,
    confirm: Callable[[], None] = lambda: None,
) -> None:
    """Write tensors, state and the manifest that makes them whole. `digests`: of files that were written before."""
    confirm()  # what a worker that may not write leaves unfinished could belong to the checkpoint of another
    contents = {
        "tensors.safetensors": _packed(tensors),
        "state.json": json.dumps(state, indent=1).encode(),
    }
    for name, content in contents.items():
        objects.put(f"{where}/{name}", content)
    manifest = {name: sha256(content).hexdigest() for name, content in contents.items()} | dict(digests or {})
    confirm()
    objects.put(f"{where}/MANIFEST.json", json.dumps(manifest).encode())


def delete(objects: ObjectStore, where: str) -> None:
    """Delete what `put` wrote. The manifest goes first: what is half deleted is no checkpoint."""
    _delete(objects, where, objects.list(f"{where}/"))


def _delete(objects: ObjectStore, where: str, keys: list[str]) -> None:
    manifest = f"{where}/MANIFEST.json"
    if manifest in keys:
        objects.delete(manifest)
    objects.delete(*(key for key in keys if key != manifest))


def _where(prefix: str, step: int) -> str:
    return f"{prefix}/{step:09d}"


def _feedback_name(rank: int) -> str:
    return f"feedback-{rank:05d}.safetensors"


def _packed(tensors: Tensors) -> bytes:
    import safetensors.numpy

    # safetensors writes an array's memory as it lies: a transposed one would come back scrambled.
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in tensors.items()})


def load_feedback(objects: ObjectStore, prefix: str, step: int, rank: int) -> Tensors | None:
    """A worker's own part of the checkpoint of `step`.

    None, and a line in the log, when it is missing or corrupt: a step's rounding is lost, which is no reason to end.
    """
    import safetensors
    import safetensors.numpy

    where, name = _where(prefix, step), _feedback_name(rank)
    try:
        content = objects.get(f"{where}/{name}")
        if sha256(content).hexdigest() != read_manifest(objects, where).get(name):
            raise CheckpointError("its SHA-256 is not the manifest's")
        return safetensors.numpy.load(content)
    except (SmltError, OSError, safetensors.SafetensorError) as error:
        log.warning("%s/%s cannot be used, error feedback begins anew: %s", where, name, error)
        return None


def _steps(objects: ObjectStore, prefix: str) -> list[str]:
    """Names of the complete checkpoints, oldest first."""
    return sorted(key.split("/")[-2] for key in objects.list(f"{prefix}/") if key.endswith("/MANIFEST.json"))


def latest_step(objects: ObjectStore, prefix: str) -> int | None:
    """The step of the newest complete checkpoint, None when there is none."""
    steps = _steps(objects, prefix)
    return int(steps[-1].partition("-")[0]) if steps else None


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
