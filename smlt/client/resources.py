"""The Resource Manager: reads each worker's metadata key, keeps the history, notices who is missing."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from smlt.store.parameter import ParameterStore

#: How often the existence of the metadata keys is looked at.
CHECK_EVERY_S = 1.0

#: A poll gives at most so many reports of a worker (`ParameterStore.read_reports`); with fewer in all, it gave all.
REPORTS_PER_READ = 1000
#: How many iterations of each worker are kept.
HISTORY = 10_000


class ResourceManager:
    """The workers' reports of a job, as they come in."""

    def __init__(self, parameters: ParameterStore, world_size: int, memory_mb: float | None = None) -> None:
        self.parameters, self.world_size, self.memory_mb = parameters, world_size, memory_mb
        # By rank: the rows of its last iterations (metrics.jsonl holds them all).
        self.history = {rank: deque[dict[str, Any]](maxlen=HISTORY) for rank in range(world_size)}
        self.latest: dict[int, dict[str, Any]] = {}
        self._last_ids: dict[int, str] = {}
        self._checked = time.monotonic()

    def poll(self, block_ms: int) -> list[dict[str, Any]]:
        """New reports of all workers, waiting up to `block_ms` for the first."""
        rows = []
        for rank, entry, row in self.parameters.read_reports(range(self.world_size), self._last_ids, block_ms):
            self._last_ids[rank] = entry
            self.latest[rank] = row
            if "loss" in row:
                self.history[rank].append(row)
            rows.append(row)
        return rows

    def lost(self) -> list[int]:
        """Workers whose metadata key was there and is gone (it expires when nobody renews it)."""
        if time.monotonic() - self._checked < CHECK_EVERY_S or not self.latest:
            return []
        self._checked = time.monotonic()
        return [rank for rank, there in self.parameters.alive(self.latest).items() if not there]

    def over_memory(self) -> tuple[int, float] | None:
        """A worker that holds more memory than it was given: (rank, MB); None when there is none."""
        if self.memory_mb is not None:
            for rank, row in self.latest.items():
                if row.get("rss_mb", 0) > self.memory_mb:
                    return rank, float(row["rss_mb"])
        return None
