"""Error feedback: over the steps nothing is lost; a failed step leaves it as it was; its state goes into checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from groups import Group

import smlt
from smlt import Communicator
from smlt.errors import ConfigError

STEPS = 30


def values(rank: int, size: int) -> np.ndarray:
    """Some large, most so small beside them that int8 loses them."""
    rng = np.random.default_rng(rank)
    return (rng.standard_normal(size) * np.where(rng.random(size) < 0.01, 100.0, 0.1)).astype(np.float32)


@pytest.mark.parametrize("codec", ["int8", "bf16"])
@pytest.mark.parametrize("algorithm", ["one-shot", "hierarchical"])
def test_over_many_steps_nothing_is_lost(group: Callable[..., Group], codec: str, algorithm: str) -> None:
    workers, size = group(2, codec=codec, algorithm=algorithm), 2_000
    exact = STEPS * np.mean([values(rank, size) for rank in range(2)], axis=0)

    def total(comm: Communicator, feedback: smlt.ErrorFeedback | None) -> np.ndarray:
        x = values(comm.rank, size)
        return sum(comm.allreduce(x, feedback=feedback).astype(np.float64) for _ in range(STEPS))

    plain = workers.run(lambda comm: total(comm, None))[0]
    kept = workers.run(lambda comm: total(comm, smlt.ErrorFeedback()))[0]
    assert np.abs(kept - exact).mean() < 0.2 * np.abs(plain - exact).mean()


def test_a_restored_state_goes_on_to_the_same_bits(group: Callable[..., Group]) -> None:
    workers = group(2, codec="int8")

    def run(comm: Communicator) -> None:
        x, feedback, restored = values(comm.rank, 50_000), smlt.ErrorFeedback(), smlt.ErrorFeedback()
        for _ in range(3):
            comm.allreduce(x, feedback=feedback)
        restored.load_state_dict(feedback.state_dict())
        one, other = comm.allreduce(x, feedback=feedback), comm.allreduce(x, feedback=restored)
        assert one.tobytes() == other.tobytes()

    workers.run(run)


def test_it_belongs_to_one_buffer_and_one_call_at_a_time(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> None:
        feedback = smlt.ErrorFeedback()
        work = comm.allreduce_async(np.ones(50_000, np.float32), codec="int8", feedback=feedback)
        with pytest.raises(ConfigError, match="in use"):
            comm.allreduce(np.ones(50_000, np.float32), codec="int8", feedback=feedback)
        work.wait()
        with pytest.raises(ConfigError, match="one buffer"):
            comm.allreduce(np.ones(60_000, np.float32), codec="int8", feedback=feedback)
        with pytest.raises(ConfigError, match="max"):
            comm.allreduce(np.ones(50_000, np.float32), op="max", feedback=feedback)
        np.testing.assert_allclose(comm.allreduce(np.ones(50_000, np.float32), codec="int8", feedback=feedback), 1, atol=0.02)

    group(2).run(run)


def test_a_state_of_another_size_is_refused(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> None:
        feedback = smlt.ErrorFeedback()
        feedback.load_state_dict({"0": np.zeros(7, np.float32)})
        with pytest.raises(ConfigError, match="does not fit"):
            comm.allreduce(np.ones(50_000, np.float32), codec="int8", feedback=feedback)

    group(2).run(run)


def test_a_step_that_is_taken_back_and_done_again_gives_the_same_bits(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> None:
        x, feedback = values(comm.rank, 50_000), smlt.ErrorFeedback()
        with pytest.raises(ConfigError, match="no completed step"):
            feedback.undo()
        for _ in range(3):  # the first has no residual before it
            before = feedback.state_dict()
            first = comm.allreduce(x, codec="int8", feedback=feedback)
            after = feedback.state_dict()
            feedback.undo()
            assert feedback.state_dict().keys() == before.keys()
            assert all((feedback.state_dict()[name] == before[name]).all() for name in before)
            with pytest.raises(ConfigError, match="one level"):
                feedback.undo()
            assert comm.allreduce(x, codec="int8", feedback=feedback).tobytes() == first.tobytes()
            assert all((feedback.state_dict()[name] == after[name]).all() for name in after)
        work = comm.allreduce_async(x, codec="int8", feedback=feedback)
        with pytest.raises(ConfigError, match="under way"):
            feedback.undo()
        work.wait()

    group(2).run(run)
