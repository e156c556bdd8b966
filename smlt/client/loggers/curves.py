"""What loggers of curves share: which rows of a run become which points."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

from smlt.client.loggers import scalars
from smlt.client.watching import Unwatched


class CurveLogger(Unwatched):
    """Writes down numbers over steps; how, `_add` knows."""

    @abstractmethod
    def _add(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        """A point of each of the curves `values`, at a step and a time in seconds since 1970."""

    def step(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._add(row["step"], row["time"], scalars.of_step(row))

    def epoch(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._add(row["step"], time.time(), scalars.of_epoch(row))

    def membership(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._add(row["step"], time.time(), scalars.of_membership(row))

    def decision(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._add(row["step"], row["time"], scalars.of_decision(row))
