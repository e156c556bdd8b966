"""What is left of a training is what the workers will do."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from smlt.client.optimizer.goals import Phase
from smlt.client.optimizer.remaining import phases, place_of
from smlt.worker.data import DataIterator
from smlt.worker.schedule import BatchSchedule

changes = st.dictionaries(st.integers(1, 9), st.integers(1, 64), max_size=4)
schedules = st.builds(lambda first, later: BatchSchedule(((0, first), *sorted(later.items()))), st.integers(1, 64), changes)


@given(schedules, st.integers(1, 300), st.integers(1, 8), st.integers(0, 10_000))
def test_the_phases_are_the_steps_that_the_data_iterator_has_left(
    schedule: BatchSchedule, samples: int, epochs: int, done: int
) -> None:
    steps = [(epoch, step) for epoch, step, _, _ in DataIterator(samples, schedule.at, 0, 0, 1).steps(0, 0, epochs)]
    done = done % len(steps)
    assert place_of(schedule, samples, done) == steps[done]
    left = phases(schedule, samples, epochs, *steps[done])
    assert [phase.global_batch_size for phase in left for _ in range(phase.steps)] == [schedule.at(e) for e, _ in steps[done:]]
    assert all(before.global_batch_size != after.global_batch_size for before, after in pairwise(left))


def test_behind_the_last_step_nothing_is_left() -> None:
    schedule = BatchSchedule.parse("2:128", 64)
    assert phases(schedule, 1000, 3, 2, 8) == phases(schedule, 1000, 3, 3, 0) == ()
    assert phases(schedule, 1000, 3, 1, 16) == (Phase(8, 128),)
