"""When training has stopped getting better. Pure, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smlt.errors import ConfigError

STOP_MODES = ("max", "min")


@dataclass(frozen=True)
class EarlyStop:
    """Ends training when `metric` of evaluate() has not been better than its best for `patience` epochs.

    `mode`: "max" when more of it is better, "min" when less is. A NaN is never better.
    """

    patience: int
    metric: str = "accuracy"
    mode: str = "max"

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"--patience {self.patience} is not positive")
        if self.mode not in STOP_MODES:
            raise ConfigError(f"--stop-mode {self.mode!r}: choose one of {', '.join(STOP_MODES)}")

    def reached(self, values: Sequence[float]) -> bool:
        """Whether the best of `values`, one an epoch, lies `patience` epochs back."""
        sign = 1.0 if self.mode == "max" else -1.0
        best, since = -math.inf, 0
        for value in values:
            if sign * value > best:
                best, since = sign * value, 0
            else:
                since += 1
        return since >= self.patience
