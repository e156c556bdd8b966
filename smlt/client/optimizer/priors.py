"""How wrong a prior mean of step times may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HyperPriors:
    """Standard deviations of log step time around its prior mean, and lengths over which its error changes.

    `offset`: of an error that all choices share (a processor twice as fast as thought). `era`: of what they share within one
    era, a time in which the training's dynamics do not change, and not with another. `shape`: of an error that depends on the
    choice. Lengths are in natural logarithms: 1.5 is a factor of 4.5 in the number of workers. `spread`: factors by which shape
    and length may be others than these, as the observations say; a factor f has the log prior -(ln f)²/2.
    """

    offset: float = 0.4
    era: float = 0.2
    shape: float = 0.2
    workers_length: float = 1.5
    memory_length: float = 1.5
    batch_length: float = 2.0
    spread: tuple[float, ...] = (0.5, 1.0, 2.0)


#: Where a cost model is the prior mean.
WITH_MODEL = HyperPriors()
#: Where nothing is known: a step may take any time, and change with the choice by a factor of three or so. Throughput and cost over
#: workers rise and fall once over a range of a factor of ten, so their length scale is about half of that.
WITHOUT_MODEL = HyperPriors(offset=10.0, shape=1.0, workers_length=1.2, memory_length=1.2)
