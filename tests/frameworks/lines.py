"""One task, least squares on 53 samples, in each framework; and one with dropout and Adam, to be resumed."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from training import Line

from smlt import Task

NEEDS = {"tensorflow": "tensorflow", "jax": "jax", "mxnet": "mxnet", "sklearn": "sklearn"}


def installed(*names: str) -> list[Any]:
    """`names` as parameters of a test, those skipped that are not installed."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(NEEDS[name]) is None, reason=f"no {NEEDS[name]}"))
        for name in names
    ]


class TensorflowLine(Line):
    def model(self) -> Any:
        import keras

        layer = keras.layers.Dense(1, kernel_initializer="zeros")
        return keras.Sequential([keras.Input((4,)), layer, keras.layers.Reshape(())])

    def loss(self, model: Any, batch: Any) -> Any:
        import tensorflow as tf

        return tf.reduce_mean((model(batch[0], training=True) - batch[1]) ** 2)

    def optimizer(self, model: Any) -> Any:
        import keras

        return keras.optimizers.SGD(0.02)

    def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
        return {"mse": float(np.mean((np.asarray(model(batch[0])) - np.asarray(batch[1])) ** 2))}


class TensorflowNoisy(TensorflowLine):
    """With dropout, running means, an embedding (a sparse gradient) and Adam."""

    def model(self) -> Any:
        import keras
        from keras import layers

        inputs = keras.Input((4,))
        embedded = layers.Flatten()(layers.Embedding(3, 2)(keras.ops.cast(keras.ops.abs(inputs) > 1, "int32")))
        hidden = layers.BatchNormalization()(layers.Dense(8)(layers.Concatenate()([inputs, embedded])))
        outputs = layers.Dense(1)(layers.Dropout(0.3)(keras.ops.tanh(hidden)))
        return keras.Model(inputs, layers.Reshape(())(outputs))

    def optimizer(self, model: Any) -> Any:
        import keras

        return keras.optimizers.Adam(0.01)


class JaxLine(Line):
    def model(self) -> Any:
        import jax.numpy as jnp

        return {"w": jnp.zeros(4), "b": (jnp.zeros(()),)}

    def loss(self, model: Any, batch: Any) -> Any:
        return ((batch[0] @ model["w"] + model["b"][0] - batch[1]) ** 2).mean()

    def optimizer(self, model: Any) -> Any:
        from smlt.worker.frameworks.jax import SGD

        return SGD(0.02)

    def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
        return {"mse": float(JaxLine.loss(self, model, batch))}


class JaxNoisy(JaxLine):
    def loss(self, model: Any, batch: Any, key: Any) -> Any:
        import jax

        return super().loss(model, (batch[0] * jax.random.bernoulli(key, 0.7, batch[0].shape), batch[1]))

    def optimizer(self, model: Any) -> Any:
        import optax

        return optax.inject_hyperparams(optax.adam)(learning_rate=0.02)


class MxnetLine(Line):
    def model(self) -> Any:
        from mxnet import gluon, init

        net = gluon.nn.Dense(1, in_units=4)
        net.initialize(init.Zero())
        return net

    def loss(self, model: Any, batch: Any) -> Any:
        return ((model(batch[0]).reshape(-1) - batch[1]) ** 2).mean()

    def optimizer(self, model: Any) -> Any:
        from mxnet import gluon

        return gluon.Trainer(model.collect_params(), "sgd", {"learning_rate": 0.02})

    def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
        return {"mse": float(MxnetLine.loss(self, model, batch).asscalar())}


class MxnetNoisy(MxnetLine):
    def model(self) -> Any:
        from mxnet import gluon

        net = gluon.nn.HybridSequential()
        net.add(gluon.nn.Dense(8, in_units=4), gluon.nn.BatchNorm(in_channels=8), gluon.nn.Dropout(0.3))
        net.add(gluon.nn.Dense(1, in_units=8))
        net.initialize()
        net.hybridize()
        return net

    def optimizer(self, model: Any) -> Any:
        from mxnet import gluon

        return gluon.Trainer(model.collect_params(), "adam", {"learning_rate": 0.01}, kvstore=None)


class SklearnLine(Line):
    """The nearest that scikit-learn has to it: an MLP without a hidden non-linearity."""

    solver, momentum = "sgd", 0.5

    def model(self) -> Any:
        from sklearn.neural_network import MLPRegressor

        model = MLPRegressor(
            hidden_layer_sizes=(3,),
            random_state=3,  # ranks are threads here, which share NumPy's own generator
            activation="identity",
            solver=self.solver,
            alpha=0,
            learning_rate_init=0.02,
            momentum=self.momentum,
        )
        return model.partial_fit(np.zeros((1, 4), np.float32), np.zeros(1, np.float32))

    def loss(self, model: Any, batch: Any) -> Any:
        loss = self.evaluate(model, batch)["mse"]
        model.partial_fit(*batch)
        return loss

    def optimizer(self, model: Any) -> Any:
        return None

    def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
        return {"mse": float(((model.predict(batch[0]) - batch[1]) ** 2).mean())}


class SklearnNoisy(SklearnLine):
    """partial_fit shuffles; Adam."""

    solver = "adam"


LINES: dict[str, type[Task]] = {"tensorflow": TensorflowLine, "jax": JaxLine, "mxnet": MxnetLine, "sklearn": SklearnLine}
NOISY: dict[str, type[Task]] = {"tensorflow": TensorflowNoisy, "jax": JaxNoisy, "mxnet": MxnetNoisy, "sklearn": SklearnNoisy}
