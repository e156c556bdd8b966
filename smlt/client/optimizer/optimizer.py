"""The Performance Optimizer: how many workers with how much memory, learnt while training runs.

Bayesian optimization (the package bayesian-optimization) with the cost model as its prior mean. docs/optimizer.md says what is
learnt, what trying is worth and when it ends.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from smlt.client.cost import StepModel
from smlt.client.optimizer.goals import Goal, Phase, Standing, duration_text, usd_text
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.priors import WITH_MODEL, HyperPriors
from smlt.client.optimizer.space import Choice, Space
from smlt.errors import ConfigError

if TYPE_CHECKING:
    from smlt.client.optimizer.appraisal import Appraisal

Array = NDArray[np.float64]

#: What the mean of a round is off by beyond its own scatter: slow minutes of a machine or of a store.
NOISE_FLOOR = 0.01
#: The scatter of a round's mean before there was any.
NOISE_USUAL = 0.03
#: By how much more an observation is off, in log step time, for each era that has ended since.
NOISE_PER_ERA = 0.1


@dataclass(frozen=True)
class Belief:
    """Of the logarithm of a step's time in seconds: normal, with this mean and standard deviation."""

    mean_log: float
    std_log: float

    @property
    def median_s(self) -> float:
        """As likely to be exceeded as not."""
        return math.exp(self.mean_log)

    def quantile_s(self, q: float) -> float:
        """What a step's time is below with probability q, 0 < q < 1."""
        return math.exp(self.mean_log + self.std_log * NormalDist().inv_cdf(q))


@dataclass(frozen=True)
class Suggestion:
    """What to do next: `kind` "explore" (try it), "exploit" (it is better than where training is), or "stay".

    `gain`: the improvement of the goal's objective that is expected of it, over what is left; `price`: what trying costs. Both
    in USD under a deadline, in seconds under a budget, in seconds times USD else. `reason`: one sentence for people.
    """

    choice: Choice
    kind: str
    gain: float
    price: float
    reason: str


@dataclass(frozen=True)
class Landscape:
    """What is believed of the grid: arrays of shape (len(space.workers), len(space.memory_mb)), nan where a choice cannot work.

    `step_s`: median step time with the next global batch; `std_log`: how sure; `seconds`, `usd`: of the whole run; `objective`:
    what the goal wants least of; `acquisition`: gain less price of trying; `odds`: that the goal is kept.
    """

    space: Space
    step_s: Array
    std_log: Array
    seconds: Array
    usd: Array
    objective: Array
    acquisition: Array
    odds: Array


class PerformanceOptimizer:
    """Learns step times over `space` around what `model` predicts, and says what is best for `goal`.

    The same observations and seed give the same suggestions. `hyper`: how wrong the model may be. `is_paid`: whether the
    model's USD are money; on one machine they only weigh workers against time, and reasons speak of the workers' time.

        optimizer = PerformanceOptimizer(space, model, Goal(deadline_s=7200))
        suggestion = optimizer.suggest(None, standing, round_s=60)
        optimizer.observe(Observation(suggestion.choice, step_s=0.21, steps=300, global_batch_size=512))

    Raises ConfigError when no choice can work, or bayesian-optimization is not installed.
    """

    def __init__(
        self,
        space: Space,
        model: StepModel,
        goal: Goal,
        *,
        seed: int = 0,
        hyper: HyperPriors = WITH_MODEL,
        is_paid: bool = True,
    ) -> None:
        from smlt.client.optimizer.search import GridSearch  # scikit-learn takes a second to import

        self.space, self.model, self.goal, self.is_paid = space, model, goal, is_paid
        self.observations: list[Observation] = []
        self._eras: list[int] = []  # of each observation; 0: an earlier run's
        self._era = 1
        self._log_speeds: dict[bytes, Array] = {}
        self.choices = [choice for choice in space if not model.why_not(choice)]
        if not self.choices:
            raise ConfigError(f"no number of workers with any memory can work: {model.why_not(next(iter(space)))}")
        self._number_choices()
        self._search = GridSearch(self._log_speed, hyper, seed)

    def cost_text(self, usd: float) -> str:
        """An amount for people, with its unit."""
        if self.is_paid:
            return f"{usd_text(usd)} USD"
        one = self.model.usd_per_s(Choice(1, self.space.memory_mb[0]))
        return f"{duration_text(usd / one)} of workers' time"

    def limit_workers(self, most: int) -> None:
        """Choose no more than `most` workers from now on: more could not be had. Where none would be left nothing changes."""
        self.choices = [choice for choice in self.choices if choice.workers <= most] or self.choices
        self._number_choices()

    def _number_choices(self) -> None:
        self.index = {choice: i for i, choice in enumerate(self.choices)}
        self.usd_per_s = np.array([self.model.usd_per_s(choice) for choice in self.choices])

    def observe(self, observation: Observation, *, carried: bool = False) -> None:
        """Learn from a round. `carried`: of an earlier run, which is trusted less."""
        if not (observation.step_s > 0 and math.isfinite(observation.step_s)):
            raise ConfigError(f"a step cannot have taken {observation.step_s} s")
        self.observations.append(observation)
        self._eras.append(0 if carried else self._era)
        self._learn()

    def dynamics_changed(self) -> None:
        """Trust what was observed so far less, for steps take another time now: exploration may begin again."""
        self._era += 1
        self._learn()

    def belief(self, choice: Choice, global_batch_size: int) -> Belief:
        """What a step's time is believed to be."""
        mean, std = self._search.predict(self._points([choice], global_batch_size))
        return Belief(-float(mean[0]), float(std[0]))

    def suggest(self, current: Choice | None, standing: Standing, *, round_s: float) -> Suggestion:
        """What to do for the next `round_s` seconds, when training is at `current` (None: not begun)."""
        from smlt.client.optimizer.appraisal import appraise, in_words

        made: list[Appraisal] = []

        def scores(mean: Array, std: Array) -> Array:
            made.append(appraise(self, current, standing, round_s, (-mean, std)))
            return made[-1].scores

        found = self._search.best(self._points(self.choices, _next_batch(standing)), scores)
        return in_words(self, made[-1], found, current)

    def settle(self, standing: Standing) -> Choice:
        """The choice that is best by what is believed now, if nothing more were tried."""
        from smlt.client.optimizer.appraisal import appraise

        mean, std = self._search.predict(self._points(self.choices, _next_batch(standing)))
        return self.choices[appraise(self, None, standing, 0.0, (-mean, std)).best]

    def landscape(self, current: Choice | None, standing: Standing, *, round_s: float = 0.0) -> Landscape:
        """What is believed of all choices, for pictures."""
        from smlt.client.optimizer.appraisal import appraise

        mean, std = self._search.predict(self._points(self.choices, _next_batch(standing)))
        made = appraise(self, current, standing, round_s, (-mean, std))
        seconds = standing.elapsed_s + made.outlook.switch_s + made.outlook.expected_s
        usd = standing.spent_usd + self.usd_per_s * (made.outlook.switch_s + made.outlook.expected_s)
        grids = (np.exp(-mean), std, seconds, usd, made.outlook.expected(), made.gain - made.price, made.odds)
        return Landscape(self.space, *(self._on_grid(values) for values in grids))

    def believed(self, choices: Sequence[Choice], global_batch_size: int) -> tuple[Array, Array]:
        """Means and standard deviations of log step time for each of the choices."""
        mean, std = self._search.predict(self._points(choices, global_batch_size))
        return -mean, std

    def covariance(self, choice: Choice, global_batch_size: int) -> Array:
        """Of log step time, of all choices with this one: shape (len(choices),)."""
        points = self._points(self.choices, global_batch_size)
        return self._search.process.covariance(points, points[self.index[choice]])

    @property
    def noise(self) -> float:
        """What a round's mean is likely to be off by, in log step time: as so far."""
        if not self.observations:
            return NOISE_USUAL
        usual = float(np.median([observation.noise for observation in self.observations]))
        return math.hypot(usual, NOISE_FLOOR) if usual else 0.0

    def _learn(self) -> None:
        """Tell the search. Observations of one choice, batch and era become one, weighted by their precision."""
        groups: dict[tuple[Choice, int, int], list[Observation]] = defaultdict(list)
        for observation, era in zip(self.observations, self._eras, strict=True):
            groups[observation.choice, observation.global_batch_size, era].append(observation)
        points, targets, variances = [], [], []
        for (choice, batch, era), group in groups.items():
            weights = np.array([max(observation.noise, 1e-3) ** -2 for observation in group])
            logs = np.log([observation.step_s for observation in group])
            points.append((choice.workers, choice.memory_mb, batch, era))
            targets.append(-float(weights @ logs / weights.sum()))
            floor = NOISE_FLOOR if any(observation.noise for observation in group) else 0.0  # 0: recorded, to be taken as it is
            variances.append(1 / weights.sum() + floor**2 + (self._era - era) * NOISE_PER_ERA**2)
        self._search.learn(np.array(points, dtype=float).reshape(-1, 4), np.array(targets), np.array(variances))

    def _points(self, choices: Sequence[Choice], global_batch_size: int) -> Array:
        return np.array([(it.workers, it.memory_mb, global_batch_size, self._era) for it in choices], dtype=float)

    def _log_speed(self, points: Array) -> Array:
        """The model's opinion, which the process starts from: log steps a second."""
        key = points.tobytes()  # the grid is asked for again and again
        if key not in self._log_speeds:
            rows = [(Choice(int(row[0]), int(row[1])), int(row[2])) for row in points]
            self._log_speeds[key] = np.array([-math.log(self.model.step_s(choice, batch)) for choice, batch in rows])
        return self._log_speeds[key]

    def _on_grid(self, values: Array) -> Array:
        grid = np.full((len(self.space.workers), len(self.space.memory_mb)), np.nan)
        for choice, value in zip(self.choices, values, strict=True):
            grid[self.space.workers.index(choice.workers), self.space.memory_mb.index(choice.memory_mb)] = value
        return grid


def _next_batch(standing: Standing) -> int:
    left: Sequence[Phase] = standing.left
    if not left:
        raise ConfigError("nothing is left to do, so there is nothing to suggest")
    return left[0].global_batch_size
