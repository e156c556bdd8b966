"""Hugging Face Accelerate with the backend "smlt"."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import example_cases as cases
from ddp_pair import Pair
from test_ddp import assert_alike


def test_accelerate_takes_the_group_that_is_there_and_trains_as_with_gloo(pair: Pair) -> None:
    with_gloo, with_smlt = pair.run("gloo", cases.accelerate), pair.run("smlt", cases.accelerate)
    assert_alike(with_gloo, with_smlt)
    assert with_smlt[0]["accuracy"] > 0.8


def test_a_hook_may_be_registered_on_the_prepared_model(pair: Pair) -> None:
    exact, found = pair.run("smlt", cases.accelerate), pair.run("smlt", cases.accelerate, "--fp16")
    assert_alike(found[0], found[1], tolerance=0.0)
    assert_alike(exact[0]["model"], found[0]["model"], tolerance=2e-2)
    assert any((exact[0]["model"][name] != value).any() for name, value in found[0]["model"].items())


def test_accelerate_refuses_the_backends_name_in_its_own_settings(pair: Pair) -> None:
    """docs/ddp.md says to form the group first until this fails."""
    for refusals in pair.run("smlt", cases.accelerate_with_backend_named):
        assert "smlt is not available" in refusals[0]


def test_transformers_trainer_trains_as_with_gloo(pair: Pair, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    runs = [pair.run(backend, cases.transformers_trainer, str(tmp_path)) for backend in ("gloo", "smlt")]
    assert_alike(*runs)
