"""Tasks of every framework: the curve does not depend on the number of workers, nor on where a run was stopped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from groups import Group
from lines import LINES, NOISY, installed
from training import Line, configure, losses, train

from smlt import Communicator
from smlt.errors import CheckpointError, TaskError
from smlt.store.object import DirectoryObjectStore
from smlt.worker import checkpoint
from smlt.worker.frameworks import make_adapter
from smlt.worker.frameworks.numpy import SGD

every_framework = pytest.mark.parametrize("framework", installed("tensorflow", "jax", "mxnet", "sklearn"))
deep_learning = pytest.mark.parametrize("framework", installed("tensorflow", "jax", "mxnet"))


class Plain(Line):
    def optimizer(self, model: Any) -> Any:
        return SGD(model, lr=0.02)


@every_framework
def test_the_curve_is_the_same_for_any_number_of_workers(framework: str, store: Any) -> None:
    with Communicator() as comm:
        _, rows = train(comm, configure(), None, LINES[framework]())
    expected = losses(rows)
    assert len(expected) == 18
    assert np.mean(expected[-6:]) < 0.75 * np.mean(expected[:6])
    for n in (2, 4):  # 4 workers share a last batch of 3 samples
        workers = Group(store.url, f"curve-{framework}-{n}", n)
        for _, rows in workers.run(lambda comm: train(comm, configure(), None, LINES[framework]())):
            np.testing.assert_allclose(losses(rows), expected, rtol=2e-4)
            assert len([row for row in rows if row.get("kind") == "epoch"]) == 3
        workers.close()


@deep_learning
def test_the_curve_is_that_of_plain_numpy(framework: str, group: Callable[..., Group]) -> None:
    with Communicator() as comm:
        expected = losses(train(comm, configure(), None, Plain())[1])
    for _, rows in group(2).run(lambda comm: train(comm, configure(), None, LINES[framework]())):
        np.testing.assert_allclose(losses(rows), expected, rtol=1e-4)


@every_framework
@pytest.mark.parametrize("stop_at", [4, 6])  # in the middle of an epoch, behind it
def test_a_stopped_and_resumed_run_ends_in_the_same_bits(framework: str, stop_at: int, tmp_path: Path) -> None:
    def bits(folder: Path) -> bytes:
        tensors, _ = checkpoint.load_latest(DirectoryObjectStore(folder), "run/checkpoints") or ({}, {})
        return b"".join(tensors[name].tobytes() for name in sorted(tensors))

    def run(folder: str, **how: Any) -> list[float]:
        with Communicator() as comm:
            return losses(
                train(comm, configure(epochs=2), DirectoryObjectStore(tmp_path / folder), NOISY[framework](), **how)[1]
            )

    whole = run("whole")
    assert run("cut", stop_at=stop_at) + run("cut", resume=True) == whole
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole") != b""


@every_framework
def test_a_step_that_is_computed_again_has_the_same_bits(framework: str) -> None:
    adapter = make_adapter(NOISY[framework](), 1, 1, 0)
    x, y = Line().data()["train"]
    batch = adapter.prepare((x[:10], y[:10]))
    from smlt.worker.frameworks import seed_generators

    def gradients() -> tuple[float, list[bytes]]:
        seed_generators(7)
        loss = adapter.compute(batch, 1.5, lambda bucket: None)
        return loss, [array.tobytes() for array in adapter.gradient.values()]

    def state() -> dict[str, bytes]:
        return {name: array.tobytes() for name, array in adapter.state()[0].items()}

    before = state()
    adapter.keep_buffers()
    first = gradients()
    adapter.restore_buffers()
    assert state() == before
    assert gradients() == first
    adapter.skip(lambda bucket: None)
    assert not any(array.any() for array in adapter.gradient.values())


@pytest.mark.parametrize("framework", installed("tensorflow", "mxnet"))
def test_running_means_become_the_mean_of_the_workers(framework: str, group: Callable[..., Group]) -> None:
    def share(comm: Communicator) -> Any:
        trainer, _ = train(comm, configure(epochs=1), None, NOISY[framework]())
        adapter = trainer.adapter
        adapter.set_buffers({name: np.full_like(array, comm.rank) for name, array in adapter.buffers().items()})
        trainer._share_buffers()
        return {name: array.tolist() for name, array in adapter.buffers().items()}

    for means in group(4).run(share):
        assert len(means) == 2  # of one layer: its mean and its variance
        assert all(values == [1.5] * 8 for values in means.values())


@every_framework
def test_the_learning_rate_can_be_scaled_and_is_kept_in_checkpoints(framework: str) -> None:
    def moved(adapter: Any) -> float:
        before = adapter.parameters()
        x, y = Line().data()["train"]
        adapter.compute(adapter.prepare((x[:10], y[:10])), 1.0, lambda bucket: None)
        adapter.apply()
        after = adapter.parameters()
        names = [name for name in after if name not in ("t",)]
        return float(sum(np.abs(after[name] - before[name]).sum() for name in names if not name.startswith("velocities")))

    class Still(LINES[framework]):  # type: ignore[misc,name-defined]
        momentum = 0.0

    plain, scaled, resumed = (make_adapter(Still(), 1, 1, 0) for _ in range(3))
    scaled.scale_learning_rate(0.25)
    resumed.load_state(*scaled.state())
    step = moved(plain)
    assert step > 0
    assert moved(scaled) == pytest.approx(step / 4, rel=1e-4)
    assert moved(resumed) == pytest.approx(step / 4, rel=1e-4)


@every_framework
def test_a_checkpoint_of_another_model_is_refused(framework: str, tmp_path: Path) -> None:
    objects = DirectoryObjectStore(tmp_path)
    with Communicator() as comm:
        train(comm, configure(epochs=1), objects, Line())
        with pytest.raises(CheckpointError, match="does not fit the model"):
            train(comm, configure(), objects, LINES[framework](), resume=True)


def _keras_unbuilt(self: Any) -> Any:
    import keras

    return keras.Sequential([keras.layers.Dense(1)])


def _keras_frozen(self: Any) -> Any:
    model = LINES["tensorflow"].model(self)
    model.trainable = False
    return model


def _jax_integers(self: Any) -> Any:
    import jax.numpy as jnp

    return {"w": jnp.zeros(4), "n": jnp.zeros(3, jnp.int32)}


def _gluon_deferred(self: Any) -> Any:
    from mxnet import gluon

    net = gluon.nn.Dense(1)
    net.initialize()
    return net


def _gluon_sparse(self: Any) -> Any:
    from mxnet import gluon

    net = gluon.nn.Embedding(3, 2, sparse_grad=True)
    net.initialize()
    return net


def _unfitted(self: Any) -> Any:
    from sklearn.linear_model import SGDRegressor

    return SGDRegressor()


def _tree(self: Any) -> Any:
    from sklearn.tree import DecisionTreeRegressor

    return DecisionTreeRegressor()


def _text(self: Any, *_: Any) -> Any:
    return "text"


BAD = [
    ("tensorflow", "model", _keras_unbuilt, "has no variables yet"),
    ("tensorflow", "model", _keras_frozen, "no variable that wants a gradient"),
    ("tensorflow", "optimizer", _text, "gave a str, not a keras.optimizers.Optimizer"),
    ("tensorflow", "loss", lambda self, model, batch: model(batch[0]), "one element, the mean loss"),
    ("jax", "model", _jax_integers, r"model\(\)\['n'\] is a int32 array"),
    ("jax", "optimizer", _text, r"has no init\(\) and update\(\)"),
    ("jax", "loss", lambda self, model, batch: batch[0] @ model["w"], "one element, the mean loss"),
    ("mxnet", "model", _gluon_deferred, "has no value yet"),
    ("mxnet", "model", _gluon_sparse, "sparse gradient"),
    ("mxnet", "optimizer", _text, "not a gluon.Trainer"),
    ("mxnet", "loss", lambda self, model, batch: model(batch[0]), "one element, the mean loss"),
    ("sklearn", "model", _unfitted, "call partial_fit first"),
    ("sklearn", "model", _tree, "has no partial_fit"),
    ("sklearn", "optimizer", _text, "return None"),
    ("sklearn", "loss", lambda self, model, batch: model.partial_fit(*batch), "returns a number"),
]


@pytest.mark.parametrize(
    ("part", "value", "message", "framework"),
    [
        pytest.param(part, value, message, *installed(framework)[0].values, marks=installed(framework)[0].marks)
        for framework, part, value, message in BAD
    ],
)
def test_parts_that_give_the_wrong_thing_are_named(framework: str, part: str, value: Any, message: str) -> None:
    with Communicator() as comm, pytest.raises(TaskError, match=message):
        train(comm, configure(), None, type("Odd", (LINES[framework],), {part: value})())


@pytest.mark.skipif(not installed("jax") or bool(installed("jax")[0].marks[0].args[0]), reason="no jax")
def test_a_learning_rate_that_cannot_be_scaled_is_told() -> None:
    optax = pytest.importorskip("optax")

    class Fixed(LINES["jax"]):  # type: ignore[misc,name-defined]
        def optimizer(self, model: Any) -> Any:
            return optax.adam(0.01)

    class Scheduled(LINES["jax"]):  # type: ignore[misc,name-defined]
        def optimizer(self, model: Any) -> Any:
            return optax.inject_hyperparams(optax.sgd)(learning_rate=lambda step: 0.1 / (1 + step))

    for task in (Fixed(), Scheduled()):
        with pytest.raises(TaskError, match="has no learning rate that a rule could change"):
            make_adapter(task, 1, 1, 0).scale_learning_rate(2)


def test_a_numpy_task_imports_no_framework() -> None:
    code = """
import sys
from training import Line
from smlt.worker.frameworks import make_adapter
make_adapter(Line(), 1, 1, 0)
print([name for name in ("torch", "tensorflow", "keras", "jax", "mxnet", "sklearn", "scipy") if name in sys.modules])
"""
    folder = Path(__file__).parents[1] / "worker"
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "[]"
