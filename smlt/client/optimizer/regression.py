"""What is learnt: how far the step time is from what the cost model says, over workers and memory.

A Gaussian process over (log workers, log memory, log global batch) of the logarithm of observed over predicted speed. The cost
model is its prior mean, so that before the first observation it believes the model, near observations the observations, and
far from all of them the model scaled by what the observations have in common. Rasmussen and Williams, Gaussian Processes for
Machine Learning (2006), chapter 2.

Imports scikit-learn, so whoever does not optimize does not import this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smlt.client.optimizer.priors import WITH_MODEL, HyperPriors
from smlt.errors import ConfigError

try:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Kernel
except ImportError as error:
    raise ConfigError("optimizing workers and memory needs bayesian-optimization: pip install 'smlt[optimize]'") from error

Array = NDArray[np.float64]

#: The columns of a point; for eras see `HyperPriors`.
COLUMNS = ("workers", "memory_mb", "global_batch_size", "era")
FAR = 1e6  # a length scale along which nothing varies


class ResidualRegressor(GaussianProcessRegressor):  # type: ignore[misc]  # scikit-learn has no types
    """Regression of y on points X, shape (n, 4) in the order of COLUMNS, around a prior mean, with known noise.

    `prior`: X to prior means of y, shape (n,). `variances`: the noise variance of each row of the next `fit`, shape (n,).
    Takes the place of bayesian-optimization's own process. Its kernel is not fitted: one to five observations do not say how
    long and how large ripples are, and the likeliest guess is sure of itself where it should not be.
    """

    def __init__(self, prior: Callable[[Array], Array], hyper: HyperPriors = WITH_MODEL) -> None:
        self.prior = prior
        self.hyper = hyper
        self.variances: Array = np.empty(0)
        super().__init__(kernel=_kernel(hyper), optimizer=None, alpha=1e-6, copy_X_train=False)

    def fit(self, X: Array, y: Array) -> ResidualRegressor:  # noqa: N803
        """Learn from y at X, shapes (n, 4) and (n,), with `variances` as the noise."""
        features, residual = _features(X), np.asarray(y) - self.prior(X)
        self.alpha = self.variances + 1e-8
        super().fit(features, residual)
        return self

    def predict(self, X: Array, return_std: bool = False, return_cov: bool = False) -> Any:  # noqa: N803
        """Means of y at X, shape (n,), with their standard deviations (n,) or their covariance (n, n) where asked for."""
        found = super().predict(_features(X), return_std=return_std, return_cov=return_cov)
        if return_std or return_cov:
            return found[0] + self.prior(X), found[1]
        return found + self.prior(X)

    def covariance(self, X: Array, at: Array) -> Array:  # noqa: N803
        """Posterior covariances of y at X, shape (n, 4), with y at one point, shape (4,). Shape (n,)."""
        features, point = _features(X), _features(at[None, :])
        if not hasattr(self, "X_train_"):
            return np.asarray(self.kernel(features, point)[:, 0])
        known = self.kernel_(self.X_train_, np.vstack([point, features]))
        reached = np.linalg.solve(self.L_, known)
        return np.asarray(self.kernel_(features, point)[:, 0] - reached[:, 1:].T @ reached[:, 0])


def _features(points: Array) -> Array:
    features = np.array(points, dtype=float)
    features[:, :3] = np.log(features[:, :3])
    return features


def _kernel(hyper: HyperPriors) -> Kernel:
    return (
        ConstantKernel(hyper.offset**2)
        + ConstantKernel(hyper.era**2) * RBF([FAR, FAR, FAR, 0.1])  # eras are whole numbers: 1 within one, 0 between two
        + ConstantKernel(hyper.shape**2) * RBF([hyper.workers_length, hyper.memory_length, hyper.batch_length, FAR])
        + ConstantKernel(hyper.ripple**2) * RBF([hyper.ripple_length] * 3 + [FAR])
    )
