"""Lightning's DDP strategy with the backend "smlt"."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

import example_cases as cases
from ddp_pair import Pair
from test_ddp import assert_alike

from smlt.store.embedded import EmbeddedStore

DEADLINE_S = 100


def test_a_script_that_lightning_starts_trains_with_smlt(store: EmbeddedStore) -> None:
    """One command; Lightning itself starts the second process."""
    command = [sys.executable, str(cases.EXAMPLES / "lightning_digits.py"), "--epochs", "2", "--fp16"]
    environment = {**os.environ, "SMLT_STORE": store.url, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "distributed_backend=smlt" in done.stderr + done.stdout
    for rank in (0, 1):
        assert f"rank {rank} of 2: accuracy 0.9" in done.stdout


def test_the_trained_model_is_gloos(pair: Pair) -> None:
    with_gloo, with_smlt = pair.run("gloo", cases.lightning), pair.run("smlt", cases.lightning)
    assert_alike(with_gloo, with_smlt)


def test_workers_may_be_nodes_and_gradients_fp16(pair: Pair) -> None:
    """As on functions: the group is formed first, without Lightning, and each worker is a node with one device."""
    exact, found = pair.run("smlt", cases.lightning), pair.run("smlt", cases.lightning_nodes)
    assert_alike(found[0], found[1], tolerance=0.0)
    assert_alike(exact, found, tolerance=2e-2)
    assert any((exact[0][name] != found[0][name]).any() for name in exact[0])
