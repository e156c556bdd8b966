"""How long a worker bears with a store that is away or refuses for now, and how long it pauses between two tries."""

from __future__ import annotations

import random
import time

from smlt.collective import _native

#: How long to wait before connecting again after a lost connection, doubling up to the last.
RECONNECT_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: Each pause is so much shorter or longer, at most: workers that were cut off together shall not come back together.
JITTER = 0.5
#: A store that is full is waited for so long, or half of the timeout when that is less.
FULL_S = 15.0
#: A connection is lost after so many seconds of silence; sooner where the timeout is short, but not for a hiccup.
SILENCE_S, SILENCE_MIN_S = 10.0, 1.0
#: A refusal counts as the reason for what fails within so many seconds after it.
RECENT_S = 3.0


def pause_s(attempt: int) -> float:
    """Before try number `attempt` (from 0): exponential, with jitter."""
    return RECONNECT_PAUSES_S[min(attempt, len(RECONNECT_PAUSES_S) - 1)] * random.uniform(1 - JITTER, 1 + JITTER)


def silence_s(timeout_s: float) -> float:
    """For how long a connection that owes a reply may be still before it counts as lost."""
    return min(SILENCE_S, max(SILENCE_MIN_S, timeout_s / 3))


class Patience:
    """What the store has refused lately. `timeout_s` is that of the collectives."""

    def __init__(self, timeout_s: float) -> None:
        self._full_limit_s = min(FULL_S, timeout_s / 2)
        self._refusals, self._ends = 0, -1  # refusals since the last collective that ended
        self._refused_at = self._full_since = 0.0
        self._reply = ""

    @property
    def reply(self) -> str:
        """The last refusal, if it was a moment ago."""
        return self._reply if self._refused_at and time.monotonic() - self._refused_at < RECENT_S else ""

    def refused(self, status: int, reply: str, ends: int) -> bool:
        """The store answered with an error that passes; False when it has lasted too long. `ends`: of collectives."""
        now = time.monotonic()
        if ends != self._ends:
            self._ends, self._refusals, self._full_since = ends, 0, 0.0
        self._refusals += 1
        self._reply, self._refused_at = reply, now
        if status != _native.STORE_FULL:
            return True
        self._full_since = self._full_since or now
        return now - self._full_since < self._full_limit_s

    @property
    def attempt(self) -> int:
        """How many tries have been refused in a row."""
        return self._refusals
