"""bayesian-optimization, set to a finite grid: its record of what was tried, our process in it, and an exact argmax.

Its own acquisition functions look for the maximum with random samples and gradients, over a box. A grid of workers and memory
has some hundreds or thousands of points, so all are evaluated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from smlt.client.optimizer.priors import HyperPriors
from smlt.client.optimizer.regression import COLUMNS, Array, ResidualRegressor
from smlt.errors import ConfigError

try:
    from bayes_opt import BayesianOptimization
    from bayes_opt.acquisition import AcquisitionFunction
except ImportError as error:
    raise ConfigError("optimizing workers and memory needs bayesian-optimization: pip install 'smlt[optimize]'") from error


class OverGrid(AcquisitionFunction):
    """The best of `points`, shape (n, 4), by `scores`: a function of the process's means and standard deviations there.

    Those whose scores are equal are equally good: one is drawn with the search's seed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.points: Array = np.empty((0, len(COLUMNS)))
        self.scores: Callable[[Array, Array], Array] = lambda mean, std: mean

    def base_acq(self, mean: Array, std: Array) -> Array:
        """The scores of all points."""
        return self.scores(mean, std)

    def suggest(self, gp: Any, target_space: Any, *_: Any, fit_gp: bool = True, random_state: Any = None, **__: Any) -> Array:
        """The point with the highest score, shape (4,)."""
        if fit_gp and len(target_space):
            self._fit_gp(gp, target_space)
        scores = self.base_acq(*gp.predict(self.points, return_std=True))
        highest = scores.max()
        equal = np.flatnonzero(scores >= highest - 1e-12 * max(1.0, abs(highest)))
        return np.asarray(self.points[equal[0] if len(equal) == 1 else np.random.RandomState(random_state).choice(equal)])


class GridSearch:
    """What was observed, in bayesian-optimization's keeping, and what follows for other points.

    A target is the logarithm of steps a second. `prior`: points, shape (n, 4), to what the model says of it, shape (n,).
    """

    def __init__(self, prior: Callable[[Array], Array], hyper: HyperPriors, seed: int) -> None:
        self._seed = seed
        self.acquisition = OverGrid()
        self.process = ResidualRegressor(prior, hyper)
        self.learn(np.empty((0, len(COLUMNS))), np.empty(0), np.empty(0))

    def learn(self, points: Array, targets: Array, variances: Array) -> None:
        """Replace what is known: points of shape (n, 4), all different, targets and their variances of shape (n,)."""
        bounds = {name: (0.0, float(np.max(points[:, i], initial=1e9))) for i, name in enumerate(COLUMNS)}
        self._search = BayesianOptimization(
            None, bounds, acquisition_function=self.acquisition, random_state=self._seed, verbose=0
        )
        self._search._gp = self.process
        for point, target in zip(points, targets, strict=True):
            self._search.register(point, float(target))
        self.process.variances = np.asarray(variances, dtype=float)
        self._is_fitted = not len(points)

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Means and standard deviations of log steps a second: two of shape (n,)."""
        if not self._is_fitted:
            self.process.fit(np.asarray(self._search.space.params), np.asarray(self._search.space.target))
            self._is_fitted = True
        with warnings.catch_warnings():  # scikit-learn warns of variances that rounding has made negative
            warnings.simplefilter("ignore")
            mean, std = self.process.predict(points, return_std=True)
        return mean, std

    def best(self, points: Array, scores: Callable[[Array, Array], Array]) -> int:
        """The index of the point with the highest score."""
        self.acquisition.points, self.acquisition.scores = points, scores
        if len(self._search.space):
            found = self._search.suggest()  # fits the process first
            self._is_fitted = True
            point = np.array([found[name] for name in COLUMNS])
        else:  # bayesian-optimization would draw one from the box
            point = self.acquisition.suggest(self.process, self._search.space, random_state=self._seed)
        return int(np.flatnonzero((points == point).all(axis=1))[0])
