"""What was measured of a choice, in one round of training."""

from __future__ import annotations

from dataclasses import dataclass

from smlt.client.optimizer.space import Choice


@dataclass(frozen=True)
class Observation:
    """The steps of a round under one choice.

    `step_s`: mean wall time of a step, in seconds, everything in it; `noise`: the relative standard error of that mean.
    `compute_s`, `communication_s`, `data_s`: of that, the slowest worker's means; 0 where they are not known. `at_step`: the
    global step behind which the round ended. `time`: epoch s.
    """

    choice: Choice
    step_s: float
    steps: int
    global_batch_size: int
    noise: float = 0.05
    compute_s: float = 0.0
    communication_s: float = 0.0
    data_s: float = 0.0
    rss_mb: float = 0.0
    at_step: int = 0
    time: float = 0.0
