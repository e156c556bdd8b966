"""What is left of a training, for a forecast."""

from __future__ import annotations

from itertools import groupby

from smlt.client.optimizer.goals import Phase
from smlt.worker.schedule import BatchSchedule


def phases(schedule: BatchSchedule, samples: int, epochs: int, epoch: int, step_in_epoch: int) -> tuple[Phase, ...]:
    """The steps from there to the end of epoch `epochs` - 1, as stretches of one global batch size.

    `samples`: length of the training set; `step_in_epoch`: steps of `epoch` that are done. What a callback will choose is not
    known: give `BatchSchedule.constant(batch in force)`, which lets the current batch stay. An early stop is not foreseen.

    >>> phases(BatchSchedule.parse("2:128", 64), samples=1000, epochs=4, epoch=1, step_in_epoch=6)
    (Phase(steps=10, global_batch_size=64), Phase(steps=16, global_batch_size=128))
    """
    steps = [(schedule.at(number), schedule.steps_in(number, samples)) for number in range(epoch, epochs)]
    if steps:
        steps[0] = (steps[0][0], max(0, steps[0][1] - step_in_epoch))
    stretches = [(size, sum(count for _, count in group)) for size, group in groupby(steps, key=lambda pair: pair[0])]
    return tuple(Phase(count, size) for size, count in stretches if count)


def place_of(schedule: BatchSchedule, samples: int, step: int) -> tuple[int, int]:
    """Epoch and steps done within it, behind so many global steps from the beginning, by a schedule that was known then.

    With a callback take the last epoch row of metrics.jsonl: (its epoch + 1, step - its step).

    >>> place_of(BatchSchedule.parse("2:128", 64), samples=1000, step=33)
    (2, 1)
    """
    epoch = 0
    while step >= (steps := schedule.steps_in(epoch, samples)):
        epoch, step = epoch + 1, step - steps
    return epoch, step
