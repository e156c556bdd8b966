"""The drop-in for scikit-learn: estimators whose parameters are averaged; the workers are threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from groups import Group

from smlt import Communicator
from smlt.errors import ConfigError

pytest.importorskip("sklearn")
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import IncrementalPCA
from sklearn.linear_model import Perceptron, SGDClassifier, SGDRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.tree import DecisionTreeClassifier

import smlt.sklearn as drop_in

X, Y = load_digits(return_X_y=True)
X = X / 16
CLASSES = np.arange(10)


@pytest.mark.parametrize("kind", [SGDClassifier, Perceptron, SGDRegressor])
def test_linear_models_become_the_mean_and_learn(group: Callable[..., Group], kind: type) -> None:
    def run(comm: Communicator) -> Any:
        model, extra = kind(random_state=1), {} if kind is SGDRegressor else {"classes": CLASSES}
        for at in range(0, 1400, 100):
            part = slice(at + 50 * comm.rank, at + 50 * comm.rank + 50)
            model.partial_fit(X[part], Y[part], **extra)
            alone = np.array(model.coef_)
            drop_in.average(model, comm=comm)
        return alone, model.coef_, model.score(X[1400:], Y[1400:])

    (one, mean, score), (other, same, _) = group(2).run(run)
    np.testing.assert_allclose(mean, (one + other) / 2, rtol=1e-12)
    np.testing.assert_array_equal(mean, same)
    assert score > (0.15 if kind is SGDRegressor else 0.8)


def test_a_perceptron_of_layers_is_as_if_one_worker_had_all_rows(group: Callable[..., Group]) -> None:
    def model() -> Any:
        settings = {"hidden_layer_sizes": (16,), "solver": "sgd", "alpha": 0, "learning_rate_init": 0.1, "random_state": 1}
        return MLPClassifier(**settings).partial_fit(X[:1], Y[:1], classes=CLASSES)

    def run(comm: Communicator) -> Any:
        mine = model()
        for at in range(0, 1000, 100):
            part = slice(at + 50 * comm.rank, at + 50 * comm.rank + 50)
            drop_in.average(mine.partial_fit(X[part], Y[part]), comm=comm)
        return mine.coefs_

    alone = model()
    for at in range(0, 1000, 100):
        alone.partial_fit(X[at : at + 100], Y[at : at + 100])
    for coefs in group(2).run(run):
        for got, expected in zip(coefs, alone.coefs_, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_k_means_is_as_if_one_worker_had_assigned_all_rows(group: Callable[..., Group]) -> None:
    def model() -> Any:
        return MiniBatchKMeans(10, init=X[:10], n_init=1, reassignment_ratio=0, random_state=1)

    def run(comm: Communicator) -> Any:
        mine = model()
        for at in range(0, 1000, 100):
            part = slice(at + 50 * comm.rank, at + 50 * comm.rank + 50)
            drop_in.average(mine.partial_fit(X[part]), comm=comm)
        return mine.cluster_centers_

    alone = model()
    for at in range(0, 1000, 100):
        alone.partial_fit(X[at : at + 100])
    for centers in group(2).run(run):
        np.testing.assert_allclose(centers, alone.cluster_centers_, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (SGDClassifier(), "call partial_fit first"),
        (DecisionTreeClassifier(), "has no partial_fit"),
        (GaussianNB().partial_fit(X, Y, classes=CLASSES), "not known how to average a GaussianNB"),
        (IncrementalPCA(2).partial_fit(X), "not known how to average a IncrementalPCA"),
        (SGDClassifier(average=True).partial_fit(X, Y, classes=CLASSES), "use average=False"),
        (SGDClassifier().partial_fit(X, Y, classes=CLASSES).sparsify(), r"call densify\(\)"),
    ],
)
def test_what_cannot_be_averaged_is_told(model: Any, message: str) -> None:
    with Communicator() as comm, pytest.raises(ConfigError, match=message):
        drop_in.average(model, comm=comm)
