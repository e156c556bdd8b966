"""A step from its first gradient to its commit, and what is known of it."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smlt.collective.feedback import ErrorFeedback
from smlt.collective.work import Work
from smlt.worker.minibatch import Minibatch


@dataclass
class StepUnderWay:
    """A step from its first gradient to its commit."""

    minibatch: Minibatch
    data_s: float
    started: float
    computed: float = 0.0
    first_sent: float = math.inf
    works: list[Work] = field(default_factory=list)  # its buckets, the last one with the step's numbers
    feedbacks: list[ErrorFeedback | None] = field(default_factory=list)
    stats: Any = None
    sent: bool = False  # all of it: another worker may have completed the step


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a worker's random numbers at a step: resuming there gives the same ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def resident_mb() -> float:
    """This process's resident memory in MB (on macOS its peak)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
