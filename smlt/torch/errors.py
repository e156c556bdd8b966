"""SMLT's errors as PyTorch's programs expect them: each is what it was and a `torch.distributed.DistBackendError` too."""

from __future__ import annotations

import torch.distributed as dist

from smlt.errors import SmltError

_classes: dict[type[SmltError], type[SmltError]] = {}


def _torch_class(kind: type[SmltError]) -> type[SmltError]:
    if kind not in _classes:
        members = {"__doc__": kind.__doc__, "__module__": kind.__module__}
        _classes[kind] = type(kind.__name__, (kind, dist.DistBackendError), members)
    return _classes[kind]


def as_torch(error: SmltError, what: str = "") -> SmltError:
    """The same error, of a class that derives from its own and from `DistBackendError` (a `RuntimeError`).

    So `except smlt.errors.WorkerLostError` and `except RuntimeError`, which programs written for gloo have, both see it.
    `what` was called is said first.
    """
    if isinstance(error, dist.DistBackendError):
        return error
    made = _torch_class(type(error)).__new__(_torch_class(type(error)), *error.args)
    made.__dict__.update(error.__dict__)
    made.args = (f"{what}: {error.args[0]}" if what and error.args else str(error), *error.args[1:])
    return made
