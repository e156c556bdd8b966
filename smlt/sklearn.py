"""scikit-learn: estimators with `partial_fit`, whose parameters are averaged (local SGD).

>>> smlt.init()  # doctest: +SKIP
>>> for x, y in batches:  # doctest: +SKIP
...     model.partial_fit(x, y, classes=classes)
...     smlt.sklearn.average(model)

`partial_fit` hands out no gradients, so what is averaged is where it has led: each worker fits its own batch, and the
mean of the results is where all go on. That is McMahan et al.'s federated averaging (AISTATS 2017) with a round for each
batch. It is a good approximation where the steps are small, and for some models exact:

MLPClassifier, MLPRegressor with solver="sgd", alpha=0 and a batch of at most `batch_size` rows
    take one step along the batch's mean gradient. The velocities are averaged as well, so this is SGD with momentum on
    the batches of all workers together.
MiniBatchKMeans with reassignment_ratio=0
    keeps sums and counts; those are averaged, and the centers are as if one worker had assigned all batches.
SGDClassifier, SGDRegressor, Perceptron, PassiveAggressiveClassifier, PassiveAggressiveRegressor
    step at each row: the mean of the workers' walks, not one walk along all rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from smlt.collective.api import current
from smlt.collective.structure import Array
from smlt.errors import ConfigError

if TYPE_CHECKING:
    from smlt.collective.two_level import AnyCommunicator

__all__ = ["average"]

#: An MLP optimizer's lists of arrays (SGD's, Adam's).
_MOMENTS = ("velocities", "ms", "vs")


def average(model: Any, codec: str = "fp32", comm: AnyCommunicator | None = None) -> Any:
    """Give `model` the mean of all workers' parameters, in place; returns it.

    Call it on every worker after each `partial_fit`. Begin with the same parameters everywhere (a fixed random_state, and for
    MiniBatchKMeans `init=` an array).

    Raises ConfigError when the estimator is not one of those named above or was not fitted yet, and as
    `smlt.Communicator.allreduce` does.
    """
    values = parameters_of(model)
    (comm or current()).allreduce(values, codec=codec, out=values)
    set_parameters(model, values)
    return model


def parameters_of(model: Any) -> dict[str, Array]:
    """Copies of what is averaged of an estimator: float arrays by name. ConfigError when there is none."""
    kind = type(model).__name__
    if not callable(getattr(model, "partial_fit", None)):
        raise ConfigError(f"a {kind} has no partial_fit: it is fitted at once, on one worker")
    if hasattr(model, "cluster_centers_") and hasattr(model, "_counts"):
        counts = np.array(model._counts, np.float64)
        return {"sums": model.cluster_centers_ * counts[:, None], "counts": counts}
    if hasattr(model, "coefs_"):
        lists = {"coefs": model.coefs_, "intercepts": model.intercepts_}
        lists |= {name: getattr(model._optimizer, name) for name in _MOMENTS if hasattr(model._optimizer, name)}
        values = {f"{name}.{index}": np.array(array) for name, arrays in lists.items() for index, array in enumerate(arrays)}
        return values | {"t": np.array([float(model.t_), float(getattr(model._optimizer, "t", 0))])}
    if hasattr(model, "coef_") and hasattr(model, "intercept_") and hasattr(model, "t_"):
        if not isinstance(model.coef_, np.ndarray):
            raise ConfigError(f"the {kind}'s coef_ is sparse: call densify()")
        if getattr(model, "average", False):
            raise ConfigError(f"the {kind} keeps a mean of its own steps: use average=False")
        return {"coef": np.array(model.coef_), "intercept": np.array(model.intercept_), "t": np.array([float(model.t_)])}
    if any(name.endswith("_") and not name.startswith("_") for name in vars(model)):
        raise ConfigError(f"it is not known how to average a {kind}: see help(smlt.sklearn) for the estimators that can be")
    raise ConfigError(f"the {kind} has no parameters yet, or none that can be averaged: call partial_fit first")


def set_parameters(model: Any, values: dict[str, Array]) -> None:
    """Put what `parameters_of` gave into the estimator, in place."""
    if "counts" in values:
        counts = values["counts"]
        known = counts > 0
        model._counts[:] = counts
        model.cluster_centers_[known] = values["sums"][known] / counts[known, None]
        return
    if "t" in values:
        model.t_ = float(values["t"][0])
    if "coef" in values:
        model.coef_[...], model.intercept_[...] = values["coef"], values["intercept"]
        return
    for name, array in values.items():
        if name != "t":
            kind, _, index = name.partition(".")
            arrays = getattr(model, f"{kind}_") if kind in ("coefs", "intercepts") else getattr(model._optimizer, kind)
            arrays[int(index)][...] = array
    if hasattr(model._optimizer, "t"):
        model._optimizer.t = float(values["t"][1])
