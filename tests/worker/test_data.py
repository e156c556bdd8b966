"""The sample order: one permutation an epoch, the same global batches for any number of workers."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt.errors import ConfigError, TaskError
from smlt.worker.data import DataIterator, dataset_length, take

sizes = st.tuples(st.integers(1, 200), st.integers(1, 64), st.integers(0, 2**40), st.integers(1, 7))


@given(sizes, st.integers(0, 5))
def test_an_epoch_shows_every_sample_once_whatever_the_number_of_workers(size: tuple[int, int, int, int], epoch: int) -> None:
    length, batch, seed, n = size
    workers = [DataIterator(length, lambda epoch: batch + epoch, seed, rank, n) for rank in range(n)]
    alone = DataIterator(length, lambda epoch: batch + epoch, seed, 0, 1)
    seen: list[int] = []
    for step in range(alone.steps_in(epoch)):
        parts = [worker.indices(epoch, step) for worker in workers]
        joined = np.concatenate([indices for indices, _ in parts])
        np.testing.assert_array_equal(joined, alone.indices(epoch, step)[0])
        assert {total for _, total in parts} == {len(joined)}
        assert max(len(indices) for indices, _ in parts) - min(len(indices) for indices, _ in parts) <= 1
        seen += joined.tolist()
    assert sorted(seen) == list(range(length))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    one, two = (DataIterator(100, lambda epoch: 100, seed, 0, 1) for seed in (1, 2))
    orders = [one.indices(0, 0)[0], one.indices(1, 0)[0], two.indices(0, 0)[0]]
    assert len({order.tobytes() for order in orders}) == 3
    np.testing.assert_array_equal(DataIterator(100, lambda epoch: 100, 1, 0, 1).indices(1, 0)[0], orders[1])


def test_steps_go_on_from_anywhere() -> None:
    iterator = DataIterator(10, lambda epoch: 3, 0, 0, 2)
    everything = [(epoch, step, indices.tolist(), total) for epoch, step, indices, total in iterator.steps(0, 0, 3)]
    later = [(epoch, step, indices.tolist(), total) for epoch, step, indices, total in iterator.steps(1, 2, 3)]
    assert len(everything) == 12
    assert later == everything[6:]


def test_an_empty_training_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="training set is empty"):
        DataIterator(0, lambda epoch: 4, 0, 0, 1)


class Squares:
    """A map-style data set."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return np.full(3, index), index**2


@pytest.mark.parametrize("indices", [[0, 3, 4], []])
def test_batches_have_the_form_of_the_data_set(indices: list[int]) -> None:
    wanted = np.array(indices, np.int64)
    x, y = np.arange(10).reshape(5, 2), np.arange(5)
    np.testing.assert_array_equal(take((x, y), wanted)[0], x[wanted])
    np.testing.assert_array_equal(take({"x": x}, wanted)["x"], x[wanted])
    features, squares = take(Squares(), wanted)
    assert features.shape == (len(indices), 3)
    assert squares.tolist() == [i**2 for i in indices]


def test_a_data_set_that_can_gives_a_batch_at_once() -> None:
    class Together(Squares):
        asked: ClassVar[list[list[int]]] = []

        def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
            self.asked.append(indices)
            return [self[index] for index in indices]

    features, squares = take(Together(), np.array([4, 0, 4]))
    assert features[:, 0].tolist() == [4, 0, 4]
    assert squares.tolist() == [16, 0, 16]
    assert take(Together(), np.array([], np.int64))[0].shape == (0, 3)
    assert Together.asked == [[4, 0, 4]]


def test_parts_of_different_length_are_refused() -> None:
    with pytest.raises(TaskError, match="different lengths"):
        dataset_length((np.zeros(3), np.zeros(4)))
    with pytest.raises(TaskError, match="no length"):
        dataset_length(iter([]))
