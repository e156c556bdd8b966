"""Communication hooks: fewer bits on the wire, nothing lost in the long run."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import ddp_cases
import hook_cases as cases
import numpy as np
from ddp_pair import Pair
from test_ddp import assert_alike

STEPS = 20


@pytest.mark.parametrize(("codec", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 1e-2), ("int8", 3e-2)])
def test_a_hook_trains_as_fp32_does_within_the_codecs_error(pair: Pair, codec: str, tolerance: float) -> None:
    exact, found = pair.run("gloo", ddp_cases.tutorial), pair.run("smlt", cases.hooked, codec)
    assert_alike(exact, found, tolerance)
    assert_alike(found[0]["model"], found[1]["model"], tolerance=0.0)
    if codec != "fp32":
        differ = [name for name in exact[0]["model"] if (exact[0]["model"][name] != found[0]["model"][name]).any()]
        assert differ  # it was compressed


def test_workers_of_one_machine_train_through_its_memory_as_with_gloo(pair: Pair, job: str) -> None:
    exact, found = pair.run("gloo", ddp_cases.tutorial), pair.run("gloo", cases.hooked_two_level, job)
    assert "rank 1 has left the job" in found[0].pop("error")
    assert_alike(exact, found, 1e-6)
    assert_alike(found[0]["model"], found[1]["model"], tolerance=0.0)


def test_a_hook_goes_with_unused_parameters_and_gradients_that_accumulate(pair: Pair) -> None:
    found = pair.run("smlt", cases.hooked_branches)
    assert_alike(found[0], found[1], tolerance=0.0)


def test_collectives_of_ones_own_may_be_under_way_between_the_hooks(pair: Pair) -> None:
    for sums in pair.run("smlt", cases.among_others):
        assert sums == [2.0] * 11


def test_without_feedback_small_gradients_never_arrive(pair: Pair) -> None:
    for found in pair.run("smlt", cases.constants_after, STEPS, False):
        np.testing.assert_array_equal(found["small"], 0)
        np.testing.assert_allclose(found["large"], -STEPS, rtol=1e-3)
        assert found["residuals"] == {}


def test_with_int8_what_a_step_loses_is_added_to_the_next(pair: Pair) -> None:
    for found in pair.run("smlt", cases.constants_after, STEPS, None):
        np.testing.assert_allclose(found["small"], -STEPS * 0.3 * cases.STEP, atol=2 * cases.STEP)


def test_residuals_follow_their_parameters_when_ddp_lays_its_buckets_out_anew(pair: Pair) -> None:
    first = pair.run("smlt", cases.constants_after, 1, None)[0]
    np.testing.assert_array_equal(first["small"], 0)
    second = pair.run("smlt", cases.constants_after, 2, None)[0]
    assert first["buckets"] != second["buckets"]
    # 0.3 steps were owed and 0.3 came: together they are nearer to 1 than to 0.
    np.testing.assert_allclose(second["small"], -cases.STEP, rtol=1e-2)


@pytest.mark.parametrize("saved_after", [1, 3])
def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(pair: Pair, saved_after: int) -> None:
    straight = pair.run("smlt", cases.constants_after, 6, None)
    resumed = pair.run("smlt", cases.constants_after, 6, None, saved_after)
    for one, other in zip(straight, resumed, strict=True):
        assert_alike([one["small"], one["large"], one["residuals"]], [other["small"], other["large"], other["residuals"]])


def test_a_state_that_does_not_fit_is_refused(pair: Pair) -> None:
    codec, model = pair.run("smlt", cases.misfitting_state)[0]
    assert "codec int8, not of fp16" in codec
    assert "layers.0" in model


def test_a_hook_on_a_group_of_another_backend_says_what_to_do(pair: Pair) -> None:
    for error in pair.run("smlt", cases.on_group_of_gloo):
        assert 'init_process_group("smlt")' in error


def test_workers_with_different_hooks_all_hear_of_it(pair: Pair) -> None:
    for error in pair.run("smlt", cases.disagreeing):
        assert "fp16" in error
        assert "bf16" in error
