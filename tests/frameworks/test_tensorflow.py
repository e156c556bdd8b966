"""The drop-in for TensorFlow: steps of one's own, an optimizer's wrapper, a callback; the workers are threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import environment
from groups import Group

from smlt import Communicator
from smlt.errors import ConfigError, MismatchError

tf = pytest.importorskip("tensorflow")
import keras  # noqa: E402

import smlt.tensorflow as drop_in  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


def gradients(rank: int) -> list[Any]:
    rng = np.random.default_rng(rank)
    return [
        tf.constant(rng.normal(size=(30, 7)).astype("f4")),
        None,
        tf.constant(float(rank)),
        tf.constant(rng.normal(size=90)),
    ]


def check_means(results: list[list[Any]]) -> None:
    n = len(results)
    for at in (0, 2, 3):
        expected = sum(gradients(rank)[at].numpy().astype("f8") for rank in range(n)) / n
        for result in results:
            assert result[at].dtype == gradients(0)[at].dtype
            np.testing.assert_allclose(result[at].numpy(), expected, rtol=1e-6, atol=1e-7)
    assert all(result[1] is None for result in results)


def test_gradients_are_averaged_eagerly(group: Callable[..., Group]) -> None:
    check_means(group(3).run(lambda comm: drop_in.allreduce(gradients(comm.rank), codec="fp32", comm=comm)))


def test_gradients_are_averaged_inside_a_compiled_function(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> list[Any]:
        @tf.function
        def step(grads: list[Any]) -> tuple[list[Any], Any]:
            means = drop_in.allreduce(grads, codec="fp32", comm=comm)
            assert means[0].shape == (30, 7)
            return means, drop_in.allreduce(tf.constant(comm.rank), "max", comm=comm)  # a second one, in order

        for _ in range(3):
            means, most = step(gradients(comm.rank))
        assert int(most) == comm.world_size - 1
        return list(means)

    check_means(group(2).run(run))


def test_one_tensor_is_neither_copied_in_nor_out(group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    allreduce = Communicator.allreduce

    def watch(self: Communicator, x: Any, *rest: Any, out: Any = None) -> Any:
        seen.append((x.ctypes.data, out.ctypes.data))
        return allreduce(self, x, *rest, out=out)

    monkeypatch.setattr(Communicator, "allreduce", watch)
    tensors = [tf.random.normal([5000]) for _ in range(2)]
    results = group(2).run(lambda comm: drop_in.allreduce(tensors[comm.rank], comm=comm))
    where = [(np.asarray(a).ctypes.data, np.asarray(b).ctypes.data) for a, b in zip(tensors, results, strict=True)]
    assert sorted(seen) == sorted(where)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32", "bool"])
def test_other_dtypes_come_back_as_they_were(group: Callable[..., Group], dtype: str) -> None:
    def run(comm: Communicator) -> Any:
        values = [tf.cast(tf.constant([comm.rank, 1, 0] * 30), dtype), tf.cast(tf.constant(comm.rank), dtype)]
        return drop_in.allreduce(values, "max", codec="fp32", comm=comm)

    for many, one in group(2).run(run):
        assert many.dtype.name == one.dtype.name == dtype
        assert tf.cast(many, "int32").numpy().tolist() == [1, 1, 0] * 30
        assert int(tf.cast(one, "int32")) == 1


def test_the_gradient_of_an_embedding_is_made_dense(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> Any:
        slices = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([comm.rank]), tf.constant([3, 2]))
        return drop_in.allreduce([slices], comm=comm)[0].numpy().tolist()

    assert group(2).run(run) == [[[0.5, 0.5], [0.5, 0.5], [0, 0]]] * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_an_optimizer_applies_the_mean(group: Callable[..., Group], compiled: bool) -> None:
    variables = [[keras.Variable([1.0, 2.0, 3.0]), keras.Variable(4.0)] for _ in range(3)]
    optimizers = [drop_in.DistributedOptimizer(keras.optimizers.SGD(0.5), codec="fp32", comm=None) for _ in range(2)]
    assert type(optimizers[0]).__name__ == "SGD"

    def run(comm: Communicator) -> list[Any]:
        mine, optimizer = variables[comm.rank], optimizers[comm.rank]
        optimizer._smlt_reduce = lambda grads: drop_in.allreduce(grads, codec="fp32", comm=comm)

        def step() -> None:
            optimizer.apply_gradients(zip([tf.constant([1.0, 0, 2]) * comm.rank, tf.constant(2.0)], mine, strict=True))

        (tf.function(step) if compiled else step)()
        return [variable.numpy().tolist() for variable in mine]

    assert group(2).run(run) == [[[0.75, 2.0, 2.5], 3.0]] * 2


def test_a_saved_model_loads_without_the_wrapper(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with Communicator() as comm:
        model.compile(drop_in.DistributedOptimizer(keras.optimizers.Adam(0.25), comm=comm), "mse")
        model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is keras.optimizers.Adam
    assert float(loaded.optimizer.learning_rate) == 0.25


def test_variables_take_the_values_of_rank_0(group: Callable[..., Group]) -> None:
    variables = [[tf.Variable([1.0 * rank, 2]), keras.Variable(3 + rank)] for rank in range(2)]
    group(2).run(lambda comm: drop_in.broadcast(variables[comm.rank], comm=comm))
    assert [[v.numpy().tolist() for v in mine] for mine in variables] == [[[0, 2], 3]] * 2


def test_shards_are_equally_long_and_apart(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> Any:
        x, names = drop_in.shard((np.arange(11), np.arange(11) * 2), comm)
        dataset = [int(element) for element in drop_in.shard(tf.data.Dataset.range(11), comm)]
        assert (x * 2 == names).all()
        assert dataset == x.tolist()
        return dataset

    assert sorted(number for part in group(3).run(run) for number in part) == list(range(9))


def test_fit_ends_alike_on_all_workers(tmp_path: Path) -> None:
    """With XLA, which Keras turns on by itself, turned off."""
    answer = subprocess.run(
        [sys.executable, "-m", "smlt", "launch", "-n", "2", str(EXAMPLES / "keras_fit.py")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    )
    lines = sorted(line for line in answer.stdout.splitlines() if "] rank" in line)
    assert len(lines) == 2
    assert {line.partition(": ")[2] for line in lines} == {lines[0].partition(": ")[2]}
    assert float(lines[0].rpartition(" ")[2]) > 0.9


def test_what_cannot_be_reduced_is_told() -> None:
    with Communicator() as comm:
        for value, message in (
            (["text"], "tensor of string"),
            (tf.constant([1j]), "complex128"),
            ([object()], "cannot reduce a builtins.object"),
            (tf.ragged.constant([[1.0], [2.0, 3.0]]), "RaggedTensor"),
        ):
            with pytest.raises(ConfigError, match=message):
                drop_in.allreduce(value, comm=comm)
        for value, message in (
            ("adam", "not a str"),
            (drop_in.DistributedOptimizer(keras.optimizers.SGD()), "already"),
        ):
            with pytest.raises(ConfigError, match=message):
                drop_in.DistributedOptimizer(value)
        with pytest.raises(ConfigError, match="cannot be assigned to"):
            drop_in.broadcast([1.0], comm=comm)
        with pytest.raises(ConfigError, match=r"size of the tf\.data\.Dataset is not known"):
            drop_in.shard(tf.data.Dataset.range(9).filter(lambda x: x > 2), comm)
    used = keras.optimizers.SGD()
    used.build([keras.Variable(1.0)])
    with pytest.raises(ConfigError, match="already been used"):
        drop_in.DistributedOptimizer(used)


def test_workers_with_other_shapes_are_told(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> None:
        drop_in.allreduce([tf.zeros([3 + comm.rank]), tf.zeros(100)], comm=comm)

    assert all(isinstance(outcome.error, MismatchError) for outcome in group(2).attempt(run))
