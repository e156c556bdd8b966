"""The Resource Manager: reads what the workers report after each iteration, keeps it, sees who lags or holds too much."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

from smlt.store.coordination import Coordination

#: How many iterations of each rank are kept.
HISTORY = 10_000
#: A straggler is told by the median of so many steps.
STRAGGLER_STEPS = 20
#: Times the median of the others: from here on a worker is shown as a straggler.
STRAGGLER_FACTOR = 1.5
#: A lag of less than that is nothing.
STRAGGLER_S = 0.005


class ResourceManager:
    """The workers' reports of a job, as they come in."""

    def __init__(self, coordination: Coordination, memory_mb: float | None = None) -> None:
        self.coordination, self.memory_mb = coordination, memory_mb
        # By rank: the rows of its last iterations (metrics.jsonl holds them all).
        self.history: dict[int, deque[dict[str, Any]]] = {}
        self.latest: dict[int, dict[str, Any]] = {}
        self._last_ids: dict[str, str] = {}

    def poll(self, ranks: int, block_ms: int) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
        """New reports of the ranks below `ranks`, and the workers' words, waiting up to `block_ms` for the first."""
        events = self.coordination.read_events(range(ranks), self._last_ids, block_ms)
        for rank, row in events.reports:
            self.latest[rank] = row
            if "loss" in row:
                self.history.setdefault(rank, deque(maxlen=HISTORY)).append(row)
        return [row for _, row in events.reports], events.words

    def begin_anew(self, world_size: int) -> None:
        """The membership has changed: who reports from now on is another, or elsewhere."""
        self.latest.clear()
        for rank in list(self.history):
            if rank >= world_size:
                del self.history[rank]
            else:
                self.history[rank].clear()

    def streams_are_new(self) -> None:
        """The store has lost its data: its streams begin again."""
        self._last_ids.clear()

    def stragglers(self) -> dict[int, float]:
        """Ranks whose steps take longer than the others', by how many times: compute and data, not communication."""
        recent = {
            rank: median(row["compute_s"] + row["data_s"] for row in list(rows)[-STRAGGLER_STEPS:])
            for rank, rows in self.history.items()
            if len(rows) >= STRAGGLER_STEPS
        }
        found = {}
        for rank, seconds in recent.items():
            others = [value for other, value in recent.items() if other != rank]
            if others and seconds > STRAGGLER_FACTOR * median(others) and seconds - median(others) > STRAGGLER_S:
                found[rank] = seconds / max(median(others), 1e-9)
        return found

    def over_memory(self) -> tuple[int, float] | None:
        """A worker that holds more memory than it was given: (rank, MB); None when there is none."""
        if self.memory_mb is not None:
            for rank, row in self.latest.items():
                if row.get("rss_mb", 0) > self.memory_mb:
                    return rank, float(row["rss_mb"])
        return None
