"""What a step, and a job, take and cost with so many workers of so much memory."""

from __future__ import annotations

from typing import Protocol

from smlt.client.optimizer.space import Choice


class StepModel(Protocol):
    """What the optimizer asks of a model of costs; `CostModel` is the real one."""

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        """Predicted wall time of one global step, in seconds: compute, communication that it does not hide, overhead."""

    def usd_per_s(self, choice: Choice) -> float:
        """What a second of the job costs: functions, their disk, the store; requests to S3 and Lambda by their mean rate."""

    def switch_s(self, before: Choice | None, after: Choice) -> float:
        """Seconds for which training stands still when it changes over (None: at the start)."""

    def why_not(self, choice: Choice) -> str:
        """ "" when a choice can work, else why it cannot: too little memory, more workers than samples in a batch."""
