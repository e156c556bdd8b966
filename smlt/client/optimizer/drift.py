"""Whether steps take another time than they did: a test over rounds of one choice."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Two rounds of one choice differ by so much without a reason: standard deviation of log step time.
BETWEEN_ROUNDS = 0.02
#: Page's test (1954): it is best at shifts of twice `_SLACK` standard deviations, and speaks when a sum is above `_LIMIT`.
#: Without any shift, both sums together do so once in some 340 rounds.
_SLACK, _LIMIT = 0.5, 4.7
#: One round alone is not believed to be more than so many standard deviations off: a slow minute is no change of the dynamics.
_MOST = 4.0


@dataclass
class DriftTest:
    """Page's cumulative sums, upwards and downwards, of how far rounds are from what was believed of them."""

    above: float = 0.0
    below: float = 0.0

    def take(self, step_s: float, mean_log: float, std_log: float, noise: float) -> str:
        """A round's mean step time beside what was believed of it: "slower", "faster", or "" while nothing is proven."""
        off = (math.log(step_s) - mean_log) / math.hypot(std_log, noise, BETWEEN_ROUNDS)
        off = min(max(off, -_MOST), _MOST)
        self.above = max(0.0, self.above + off - _SLACK)
        self.below = max(0.0, self.below - off - _SLACK)
        if max(self.above, self.below) <= _LIMIT:
            return ""
        found = "slower" if self.above > self.below else "faster"
        self.above = self.below = 0.0
        return found
