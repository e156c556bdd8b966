"""What a run has cost so far, while it goes on: the bill itself is known when its invocations have ended."""

from __future__ import annotations

from smlt.client.cost import StepModel
from smlt.client.optimizer.space import Choice


class Spending:
    """Adds up what every second costs. `usd`: so far, with what earlier starts of the run have cost (`before_usd`)."""

    def __init__(self, model: StepModel, before_usd: float = 0.0) -> None:
        self.model, self.usd = model, before_usd
        self._seen: float | None = None

    def tick(self, now: float, workers: int, memory_mb: int) -> None:
        """So many workers, those that only wait among them, have run until `now` (monotonic) since the last call."""
        if self._seen is not None and workers:
            self.usd += (now - self._seen) * self.model.usd_per_s(Choice(workers, memory_mb))
        self._seen = now
