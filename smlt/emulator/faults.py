"""What can be made to go wrong on purpose, from one seed: throttling, duplicates, killed sandboxes, slow starts."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass

from smlt.errors import ConfigError


@dataclass
class Faults:
    """Settings; each may be changed while the emulator runs, by `LambdaLocal.faults`.

    `throttle`, `duplicate`, `kill`: fractions in 0..1 of the invocations. `kill_after_s`: the range of the moment at which
    the sandbox is killed, seconds from the start of the invocation. `cold_start_s`: what every cold start takes longer.
    """

    throttle: float = 0.0
    duplicate: float = 0.0
    kill: float = 0.0
    kill_after_s: tuple[float, float] = (0.0, 5.0)
    cold_start_s: float = 0.0

    def check(self) -> None:
        """Raise ConfigError for what cannot be meant."""
        for name in ("throttle", "duplicate", "kill"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} is a fraction from 0 to 1, not {getattr(self, name)}")
        low, high = self.kill_after_s
        if not 0 <= low <= high:
            raise ConfigError(f"--kill-after is a range of seconds such as 0:5, not {low:g}:{high:g}")
        if self.cold_start_s < 0:
            raise ConfigError(f"--cold-start is a number of seconds, not {self.cold_start_s:g}")


class Dice:
    """Draws what goes wrong. Same seed, same order of invocations: same faults. Counts what was injected."""

    def __init__(self, faults: Faults, seed: int) -> None:
        faults.check()
        self.faults = faults
        self.injected: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def throttles(self) -> bool:
        """Whether this invocation is refused."""
        return self._falls("throttle", self.faults.throttle)

    def duplicates(self) -> bool:
        """Whether this invocation shall run a second time."""
        return self._falls("", self.faults.duplicate)

    def kills_after(self) -> float | None:
        """The seconds after which this invocation's sandbox is killed; None: it is not."""
        with self._lock:
            if not self.faults.kill or self._random.random() >= self.faults.kill:
                return None
            return self._random.uniform(*self.faults.kill_after_s)

    def count(self, fault: str) -> None:
        """Note that a fault has happened."""
        with self._lock:
            self.injected[fault] += 1

    def _falls(self, name: str, fraction: float) -> bool:
        with self._lock:
            falls = fraction > 0 and self._random.random() < fraction
            if falls and name:
                self.injected[name] += 1
            return falls
