"""DistributedDataParallel and what is built on it: with the backend "smlt" all comes out as with gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import ddp_cases as cases
import numpy as np
from ddp_pair import Pair

TOLERANCE = 1e-6


def assert_alike(one: Any, other: Any, tolerance: float = TOLERANCE) -> None:
    """Nested dicts, lists, arrays and numbers agree."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_alike(value, other[name], tolerance)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for value, its in zip(one, other, strict=True):
            assert_alike(value, its, tolerance)
    else:
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


SAME_MODEL_EVERYWHERE = [
    cases.tutorial,
    cases.bucket_views,
    cases.static_graph,
    cases.unused_parameters,
    cases.gradient_accumulation,
    cases.uneven_inputs,
    cases.mixed_model,
    cases.torch_fp16_hook,
    cases.power_sgd,
    cases.zero_redundancy,
    cases.fsdp,
    cases.fully_shard,
    cases.tensor_parallel,
]


@pytest.mark.parametrize("case", SAME_MODEL_EVERYWHERE, ids=lambda case: case.__name__)
def test_parameters_and_losses_are_gloos(pair: Pair, case: Callable[[], dict[str, Any]]) -> None:
    with_gloo, with_smlt = pair.run("gloo", case), pair.run("smlt", case)
    assert_alike(with_gloo, with_smlt)
    assert with_smlt[0]["losses"][0] != with_smlt[1]["losses"][0] or case in (cases.fully_shard, cases.tensor_parallel)
    parameters = [{name: value for name, value in each["model"].items() if "norm" not in name} for each in with_smlt]
    assert_alike(*parameters, tolerance=0.0)  # batch norm's statistics are taken from rank 0 with the next forward only


def test_parameters_averaged_now_and_then_are_gloos(pair: Pair) -> None:
    assert_alike(pair.run("gloo", cases.local_sgd), pair.run("smlt", cases.local_sgd))


def test_a_distributed_checkpoint_brings_model_and_optimizer_back(pair: Pair, tmp_path: Path) -> None:
    with_gloo, with_smlt = (pair.run(name, cases.distributed_checkpoint, str(tmp_path)) for name in ("gloo", "smlt"))
    assert_alike(with_gloo, with_smlt)


def test_synchronised_batch_norm_is_refused_by_pytorch_itself(pair: Pair) -> None:
    """It wants a GPU, whatever the backend: docs/ddp.md says so until this fails."""
    for backend in ("gloo", "smlt"):
        with pytest.raises(AssertionError, match="SyncBatchNorm layers only work with GPU modules"):
            pair.run(backend, cases.sync_batch_norm)


def test_debug_level_detail_works(pair: Pair) -> None:
    assert_alike(pair.run("gloo", cases.tutorial), pair.run("smlt", cases.debugged))


def test_sparse_gradients_are_refused_with_what_to_do(pair: Pair) -> None:
    for error in pair.run("smlt", cases.sparse_gradients):
        assert "make them dense" in error
