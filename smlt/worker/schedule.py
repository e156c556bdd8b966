"""How many samples a step takes in which epoch, and what becomes of the learning rate when that changes. Pure, no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from smlt.errors import ConfigError

#: A global batch beyond this is a mistake, and no number of samples.
LARGEST = 2**31 - 1

#: What the learning rate is multiplied by when the global batch becomes so many times as large.
#: linear: Goyal et al., 2017, arXiv:1706.02677. sqrt: Krizhevsky, 2014, arXiv:1404.5997; Hoffer et al., 2017, arXiv:1705.08741.
#: none: the learning rate stays, so that a larger batch lowers the noise as a lower learning rate would: Smith et al., 2018,
#: arXiv:1711.00489.
LR_RULES: Mapping[str, Callable[[float], float]] = {"none": lambda times: 1.0, "linear": lambda times: times, "sqrt": math.sqrt}


def lr_ratio(rule: str, before: int, after: int) -> float:
    """What `rule` multiplies the learning rate by when the global batch changes from `before` to `after` samples."""
    return LR_RULES[rule](after / before)


def check_lr_rule(rule: str) -> None:
    """ConfigError for a rule that there is not."""
    if rule not in LR_RULES:
        raise ConfigError(f"--lr-rule {rule!r}: choose one of {', '.join(LR_RULES)}")


@dataclass(frozen=True)
class BatchSchedule:
    """The global batch by epoch. `changes`: (epoch, samples), epochs ascending from 0; each holds until the next.

    >>> schedule = BatchSchedule.parse("5:128,10:256", 64)
    >>> str(schedule), schedule.at(4), schedule.at(5), schedule.smallest(from_epoch=7)
    ('0:64,5:128,10:256', 64, 128, 128)
    """

    changes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        epochs = [epoch for epoch, _ in self.changes]
        if not epochs or epochs[0] != 0:
            raise ConfigError(f"a batch schedule begins with epoch 0, not with {epochs[:1]}")
        for before, after in pairwise(epochs):
            if after <= before:
                raise ConfigError(f"a batch schedule's epochs ascend: {after} stands behind {before}")
        for epoch, size in self.changes:
            if not 1 <= size <= LARGEST:
                raise ConfigError(f"a batch schedule's epoch {epoch} has a global batch of {size}, not of 1 to {LARGEST}")

    @classmethod
    def constant(cls, global_batch_size: int) -> BatchSchedule:
        """The same global batch in every epoch."""
        return cls(((0, global_batch_size),))

    @classmethod
    def parse(cls, text: str, first: int) -> BatchSchedule:
        """The schedule in "epoch:samples,epoch:samples"; `first` is the global batch of epoch 0 where the text has none.

        ConfigError names what is wrong with the text.
        """
        changes = []
        for entry in text.split(","):
            epoch, colon, size = (part.strip() for part in entry.partition(":"))
            # isascii: int() takes digits of any script
            if not (colon and epoch.isascii() and epoch.isdigit() and size.isascii() and size.isdigit()):
                raise ConfigError(f"--batch-schedule {text!r}: {entry.strip()!r} is not EPOCH:SAMPLES, such as 5:128")
            changes.append((int(epoch), int(size)))
        if changes[0][0] != 0:
            changes.insert(0, (0, first))
        try:
            return cls(tuple(changes))
        except ConfigError as error:
            raise ConfigError(f"--batch-schedule {text!r}: {error}") from None

    def __str__(self) -> str:
        return ",".join(f"{epoch}:{size}" for epoch, size in self.changes)

    def at(self, epoch: int) -> int:
        """The global batch of an epoch."""
        return next(size for start, size in reversed(self.changes) if start <= epoch)

    def smallest(self, from_epoch: int = 0) -> int:
        """The smallest global batch of that epoch and those behind it."""
        return min([self.at(from_epoch), *(size for start, size in self.changes if start >= from_epoch)])

    def steps_in(self, epoch: int, samples: int) -> int:
        """How many global batches make an epoch of so many samples; the last one may be short."""
        return -(-samples // self.at(epoch))
