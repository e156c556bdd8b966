"""The drop-in for JAX: pytrees, eagerly by threads and under jit by processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from commandline import environment
from groups import Group

from smlt import Communicator
from smlt.errors import ConfigError, MismatchError

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import smlt.jax as drop_in  # noqa: E402


class Layer(NamedTuple):
    w: Any
    b: Any


def tree(rank: int) -> Any:
    rng = np.random.default_rng(rank)
    return {"layer": Layer(jnp.asarray(rng.normal(size=(30, 7)), jnp.float32), jnp.full(3, rank)), "list": [None, rank * 1.0]}


def test_a_pytree_is_averaged(group: Callable[..., Group]) -> None:
    for mean in group(3).run(lambda comm: drop_in.allreduce(tree(comm.rank), codec="fp32", comm=comm)):
        assert jax.tree_util.tree_structure(mean) == jax.tree_util.tree_structure(tree(0))
        expected = sum(np.asarray(tree(rank)["layer"].w) for rank in range(3)) / 3
        np.testing.assert_allclose(mean["layer"].w, expected, rtol=1e-5, atol=1e-6)
        assert mean["layer"].b.tolist() == [1, 1, 1]
        assert float(mean["list"][1]) == 1.0
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree_util.tree_leaves(mean))


def test_one_array_is_neither_copied_in_nor_out(group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    allreduce = Communicator.allreduce

    def watch(self: Communicator, x: Any, *rest: Any, out: Any = None) -> Any:
        seen.append((x.ctypes.data, out.ctypes.data))
        return allreduce(self, x, *rest, out=out)

    monkeypatch.setattr(Communicator, "allreduce", watch)
    arrays = [jnp.arange(5000.0) + rank for rank in range(2)]
    results = group(2).run(lambda comm: drop_in.allreduce(arrays[comm.rank], comm=comm))
    where = [(a.unsafe_buffer_pointer(), b.unsafe_buffer_pointer()) for a, b in zip(arrays, results, strict=True)]
    assert sorted(seen) == sorted(where)


def test_bfloat16_comes_back_as_it_was(group: Callable[..., Group]) -> None:
    values = [jnp.full(100, rank, jnp.bfloat16) for rank in range(2)]
    for result in group(2).run(lambda comm: drop_in.allreduce([values[comm.rank], 1], comm=comm)):
        assert result[0].dtype == jnp.bfloat16
        assert (result[0] == 0.5).all()


def test_a_pytree_of_rank_1_reaches_all(group: Callable[..., Group]) -> None:
    for got in group(2).run(lambda comm: drop_in.broadcast(tree(comm.rank), root=1, comm=comm)):
        assert all(map(np.array_equal, jax.tree_util.tree_leaves(got), jax.tree_util.tree_leaves(tree(1))))


SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
import smlt, smlt.jax

smlt.init()
rank, n = smlt.rank(), smlt.world_size()
x = jnp.arange(60.0).reshape(20, 3)
y = x @ jnp.array([1.0, -2.0, 0.5])

def loss(w, x, y):
    return ((x @ w - y) ** 2).mean()

@jax.jit
def step(w, x, y):
    value, gradient = jax.value_and_grad(loss)(w, x, y)
    value, gradient = smlt.jax.allreduce((value, gradient), codec="fp32")
    smlt.jax.allreduce(jnp.ones(()), "sum")  # nothing depends on it, and it keeps its place all the same
    return smlt.jax.broadcast(w - 1e-4 * gradient), value

w = alone = jnp.zeros(3)
for _ in range(20):
    w, value = step(w, x[rank::n], y[rank::n])
    alone = alone - 1e-4 * jax.grad(loss)(alone, x, y)
np.testing.assert_allclose(w, alone, rtol=1e-5)
big = jax.jit(smlt.jax.allreduce)(jnp.full(3_000_000, rank, jnp.float32))
assert (big == (n - 1) / 2).all()
print("equal", smlt.rank())
"""


def test_collectives_under_jit_keep_their_order(tmp_path: Path) -> None:
    script = tmp_path / "steps.py"
    script.write_text(SCRIPT)
    answer = subprocess.run(
        [sys.executable, "-m", "smlt", "launch", "-n", "2", str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr + answer.stdout
    assert answer.stdout.count("equal") == 2


def test_vmap_and_grad_through_a_collective_are_refused() -> None:
    with Communicator() as comm:
        with pytest.raises(ValueError, match="vmap"):
            jax.vmap(lambda x: drop_in.allreduce(x, comm=comm))(jnp.ones(3))
        with pytest.raises(ValueError, match="JVP"):
            jax.grad(lambda x: drop_in.allreduce(x, comm=comm))(1.0)


def test_what_cannot_be_reduced_is_told() -> None:
    with Communicator() as comm:
        for value, message in (
            (["text"], "cannot reduce a builtins.str"),
            (jnp.zeros(2, jnp.complex64), "complex64"),
            ({"key": jax.random.key(0)}, "cannot reduce dtype key"),
            (np.array(["a"]), "cannot reduce dtype"),
        ):
            with pytest.raises(ConfigError, match=message):
                drop_in.allreduce(value, comm=comm)
        with pytest.raises(ConfigError, match="unknown op"):
            drop_in.allreduce(1.0, "median", comm=comm)


def test_workers_with_other_shapes_are_told(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> None:
        drop_in.allreduce([jnp.zeros(3 + comm.rank), jnp.zeros(100)], comm=comm)

    assert all(isinstance(outcome.error, MismatchError) for outcome in group(2).attempt(run))
