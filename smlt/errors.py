"""Every error SMLT raises on purpose. One root; below it, what a caller can act on.

A message says what happened, where (rank, step, key, address) and what to do next; it never holds a secret.
"""

from __future__ import annotations

from collections.abc import Sequence


class SmltError(Exception):
    """The root of SMLT's errors. `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(SmltError, ValueError):
    """An argument, environment variable, event or server setting that cannot work."""

    exit_code = 2


class StoreError(SmltError):
    """The parameter store or the object store answered, but not as it must."""

    exit_code = 3


class StoreUnavailable(StoreError, ConnectionError):
    """The store cannot be reached, or the connection to it was lost and did not come back."""


class StoreDataLost(StoreUnavailable):
    """The store was restarted or failed over, and no longer has what the job had written."""


class StoreFull(StoreError):
    """The store refused a write for want of memory or disk."""


class StoreAuthError(StoreError):
    """The store refused the user name, the password or a permission."""


class CollectiveError(SmltError):
    """A collective that could not be completed."""

    exit_code = 4


class MismatchError(CollectiveError):
    """The workers called a collective with different shapes, dtypes, operations or codecs."""


class CollectiveTimeout(CollectiveError, TimeoutError):
    """A collective did not complete before its deadline, though every worker takes part in it."""


class WorkerLostError(CollectiveError):
    """Workers did not take part in a collective before its deadline, or were reported lost.

    `ranks` are the missing workers and `step` is the number of the collective.
    """

    def __init__(self, message: str, ranks: Sequence[int] = (), step: int = 0) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.step = step

    @property
    def rank(self) -> int | None:
        """The lowest missing rank, None when it is not known."""
        return self.ranks[0] if self.ranks else None


class FencedError(CollectiveError):
    """This worker is no longer a member: its rank is held by another, or a newer generation has begun."""


class DeployError(SmltError):
    """Code or data could not be packed, uploaded or installed."""

    exit_code = 7


class GoalMissed(SmltError):
    """A run was stopped, at a checkpoint, because its deadline or its budget cannot be kept."""

    exit_code = 8


class TaskError(SmltError):
    """The user's script does not import, lacks a part, or raised in a worker."""

    exit_code = 5


class CheckpointError(SmltError):
    """A checkpoint or run folder is missing, incomplete or corrupt."""

    exit_code = 6
