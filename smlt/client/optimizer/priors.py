"""How wrong a prior mean of step times may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HyperPriors:
    """Standard deviations of log step time around its prior mean, and lengths over which its error changes.

    `offset`: of an error that all choices share (a processor twice as fast as thought). `era`: of what they share within one
    era, a time in which the training's dynamics do not change, and not with another. `shape`: of an error that depends on the
    choice. Lengths are in natural logarithms: 1.2 is a factor of 3.3 in the number of workers. A shape s with a length l has a
    slope of s/l (a power of the number of workers) and a curvature of 1.7 s/l², give or take. `ripple`: of what so smooth a
    curve leaves out, in all directions within `ripple_length`.
    """

    offset: float = 0.4
    era: float = 0.2
    shape: float = 0.3
    workers_length: float = 1.2
    memory_length: float = 1.5
    batch_length: float = 2.0
    ripple: float = 0.05
    ripple_length: float = 0.8


#: Where a cost model is the prior mean.
WITH_MODEL = HyperPriors()
#: Where nothing is known. A step may take any time. Throughput grows at most in proportion to the workers, so powers are within
#: about 1, and what it costs turns them over within a factor of ten or so in workers: a curvature of 0.7.
WITHOUT_MODEL = HyperPriors(offset=10.0, shape=2.0, workers_length=2.0, memory_length=2.0)
