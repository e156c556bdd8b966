"""What a round's rows say of its choice, and what is kept of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt.client.optimizer.observations import (
    FILE,
    EpochEnds,
    Observation,
    append_observation,
    carried_observations,
    comparable,
    observe_round,
    read_observations,
    relative_error,
)
from smlt.client.optimizer.space import Choice

TWO = Choice(2, 1769)


def rows_of(
    seconds: list[float],
    *,
    workers: int = 2,
    samples: int = 64,
    steps_per_epoch: int = 10**6,
    first: int = 1,
    start: float = 1000.0,
) -> list[dict[str, Any]]:
    """Step rows as metrics.jsonl has them; the first of them only starts the clock."""
    now, rows = start, []
    for i, second in enumerate([0.0, *seconds]):
        now += second
        step = first + i
        rows.append(
            {
                "kind": "step",
                "step": step,
                "epoch": (step - 1) // steps_per_epoch,
                "samples": samples,
                "ranks": list(range(workers)),
                "compute_s": [0.06 + 0.01 * rank for rank in range(workers)],
                "communication_s": [0.04 - 0.01 * rank for rank in range(workers)],
                "data_s": [0.0] * workers,
                "rss_mb": [100.0 + rank for rank in range(workers)],
                "time": now,
            }
        )
    return rows


def test_a_round_is_the_mean_of_its_steps_and_the_slowest_workers_parts() -> None:
    found = observe_round(rows_of([0.1, 0.12, 0.08, 0.1]), TWO)
    assert found is not None
    assert found.step_s == pytest.approx(0.1)
    assert (found.steps, found.global_batch_size, found.at_step) == (4, 64, 5)
    assert (found.compute_s, found.communication_s, found.rss_mb) == pytest.approx((0.07, 0.03, 101.0))
    assert found.time == pytest.approx(1000.4)


def test_steps_in_which_the_membership_changed_and_the_first_behind_it_do_not_count() -> None:
    rows = rows_of([0.1] * 4 + [9.0, 0.5] + [0.1] * 4)
    change = {"kind": "membership", "step": 6, "noticed": 1000.9, "recovery_s": 8.0, "lost_ranks": [1]}
    rows.insert(6, change)
    found = observe_round(rows, TWO)
    assert found is not None
    assert found.step_s == pytest.approx(0.1)
    assert found.steps == 8


def test_steps_of_another_number_of_workers_do_not_count() -> None:
    rows = rows_of([0.3] * 3, workers=3) + rows_of([0.5] + [0.1] * 5, first=5, start=1001.0)
    found = observe_round(rows, TWO)
    assert found is not None
    assert found.step_s == pytest.approx(0.1)


def test_a_step_that_is_not_reported_makes_no_step_twice_as_long() -> None:
    rows = rows_of([0.1] * 9)
    del rows[4]
    found = observe_round(rows, TWO)
    assert found is not None
    assert found.step_s == pytest.approx(0.1)


def test_one_pause_of_the_machine_does_not_count_but_steps_that_are_often_slow_do() -> None:
    once = observe_round(rows_of([0.1] * 10 + [30.0] + [0.1] * 10), TWO)
    often = observe_round(rows_of([0.1, 0.1, 0.1, 1.0] * 5), TWO)
    assert once is not None
    assert often is not None
    assert once.step_s == pytest.approx(0.1)
    assert often.step_s == pytest.approx(0.325)


def test_a_smaller_last_batch_of_an_epoch_does_not_count() -> None:
    rows = rows_of([0.1] * 9 + [0.02])
    rows[-1]["samples"] = 7
    found = observe_round(rows, TWO)
    assert found is not None
    assert (found.step_s, found.global_batch_size) == (pytest.approx(0.1), 64)


@pytest.mark.parametrize("seconds", [[], [0.1], [-0.1, 0.0, 0.1]])
def test_a_round_with_too_few_steps_is_not_judged(seconds: list[float]) -> None:
    assert observe_round(rows_of(seconds), TWO) is None


def test_the_end_of_an_epoch_is_shared_out_over_all_of_its_steps() -> None:
    ends = EpochEnds(lambda batch: 100.0)
    seconds = [0.1] * 30
    seconds[9] = 5.1  # step 11 comes behind an epoch of 10
    found = observe_round(rows_of(seconds, steps_per_epoch=100, first=91), TWO, ends)
    assert found is not None
    assert found.step_s == pytest.approx(0.1 + 5.0 / 100)
    later = observe_round(rows_of([0.1] * 20), TWO, ends)  # a round without one
    assert later is not None
    assert later.step_s == pytest.approx(0.1 + 5.0 / 100)


def test_what_an_epochs_end_takes_elsewhere_scales_what_the_model_says_of_it() -> None:
    ends = EpochEnds(lambda batch: 100.0, lambda choice, batch: 0.08 / choice.workers)
    four = Choice(4, 1769)
    assert ends.share_s(four, 64) == pytest.approx(0.02)
    ends.saw(TWO, 64, [8.0])  # 0.08 s a step where the model has 0.04
    assert ends.share_s(TWO, 64) == pytest.approx(0.08)
    assert ends.share_s(four, 64) == pytest.approx(0.04)


def test_without_knowing_an_epochs_length_its_end_counts_as_often_as_it_was_seen_and_makes_the_mean_less_sure() -> None:
    seconds = [0.1] * 30
    seconds[9] = 3.1
    found = observe_round(rows_of(seconds, steps_per_epoch=100, first=91), TWO)
    assert found is not None
    assert found.step_s == pytest.approx(0.2, rel=0.01)
    assert found.noise > 0.4


def test_noise_is_that_of_the_mean_of_independent_steps() -> None:
    drawn = np.random.default_rng(0).normal(1.0, 0.1, (300, 50))
    claimed = np.mean([relative_error(list(one)) ** 2 for one in drawn]) ** 0.5
    assert claimed == pytest.approx(drawn.mean(axis=1).std(), rel=0.15)


def test_noise_is_larger_where_steps_hang_together() -> None:
    rng, seconds, off = np.random.default_rng(1), [], 0.0
    for _ in range(500):
        off = 0.8 * off + rng.normal(0, 0.12)
        seconds.append(1 + off)
    shuffled = list(rng.permutation(seconds))
    assert relative_error(seconds) > 1.8 * relative_error(shuffled)


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=50))
def test_noise_is_finite_and_has_a_floor(seconds: list[float]) -> None:
    assert 0.005 <= relative_error(seconds) < math.inf


# ---- observations.jsonl ----


def an_observation(step_s: float = 0.5) -> Observation:
    return Observation(TWO, step_s, 20, 64, 0.01, 0.3, 0.1, 0.05, 120.0, 400, 1.7e9)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert read_observations(tmp_path) == []
    for step_s in (0.5, 0.25):
        append_observation(tmp_path, an_observation(step_s))
    assert read_observations(tmp_path) == [an_observation(0.5), an_observation(0.25)]


def test_a_row_that_was_cut_off_is_left_out_and_the_next_one_is_not(tmp_path: Path) -> None:
    append_observation(tmp_path, an_observation(0.5))
    append_observation(tmp_path, an_observation(0.4))
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-30])
    assert read_observations(tmp_path) == [an_observation(0.5)]
    append_observation(tmp_path, an_observation(0.3))
    assert read_observations(tmp_path) == [an_observation(0.5), an_observation(0.3)]


@pytest.mark.parametrize(
    "change",
    [
        {"step_s": 0},
        {"step_s": -1},
        {"step_s": "fast"},
        {"step_s": None},
        {"steps": 0},
        {"steps": 1.5},
        {"choice": None},
        {"choice": {"workers": 2}},
        {"choice": {"workers": True, "memory_mb": 1769}},
        {"noise": math.inf},
        {"global_batch_size": 0},
    ],
)
def test_a_row_that_makes_no_sense_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    append_observation(tmp_path, an_observation())
    row = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**row, **change}) + "\n[]\nnull\n")
    assert read_observations(tmp_path) == []


def test_later_runs_get_the_newest_observations_of_the_same_task_only(tmp_path: Path) -> None:
    append_observation(tmp_path, an_observation(0.9), "another")
    for step_s in (0.5, 0.4, 0.3):
        append_observation(tmp_path, an_observation(step_s), "this")
    assert [one.step_s for one in carried_observations(tmp_path, "this", most=2)] == [0.4, 0.3]
    assert len(carried_observations(tmp_path)) == 4


def test_tasks_are_the_same_when_script_place_and_codec_are() -> None:
    config = {"script": "a/train.py", "codec": "fp16", "on": "local", "function": "smlt", "workers": 2, "seed": 0}
    same = comparable(config, "x86_64, 8 cores")
    assert (
        comparable({**config, "script": "b/train.py", "workers": 9, "seed": 5, "function": "other"}, "x86_64, 8 cores") == same
    )
    for change in ({"script": "other.py"}, {"codec": "fp32"}, {"on": "lambda"}):
        assert comparable({**config, **change}, "x86_64, 8 cores") != same
    assert comparable(config, "arm64, 8 cores") != same
