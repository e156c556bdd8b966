"""What the Performance Optimizer believed, worked out again: from what it knew before, its observations and its decisions.

Nothing but observations changes its belief, so that the landscape before each decision follows from workload.json (the cost
model, the choices) and the rows of observations.jsonl up to there. What an earlier run had taught it (--learn-from) is not in
the folder, and not in the pictures.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from smlt.client.cost import CostModel, Scales, StepModel
from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.priors import WITH_MODEL, HyperPriors
from smlt.client.optimizer.remaining import phases
from smlt.client.optimizer.space import Choice, Space
from smlt.client.report.data import Decision, Row, RunData, number
from smlt.client.report.steps import Array
from smlt.errors import SmltError
from smlt.worker.schedule import BatchSchedule

if TYPE_CHECKING:
    from smlt.client.optimizer.optimizer import Landscape

#: Of as many decisions the landscape is drawn: each has to be learnt anew.
MOMENTS_MAX = 4


@dataclass(frozen=True)
class Moment:
    """What was believed before a decision: when training was at `current`, with the first `observed` observations."""

    title: str
    observed: int
    current: Choice | None
    chosen: Choice | None
    global_batch_size: int
    landscape: Landscape


@dataclass(frozen=True)
class Story:
    """A search, to be drawn. `path`: the choices in the order in which training was at them. `moments`: at least one, in order.

    `whole`: a run from beginning to end with one choice, as believed with all observations. `predicted`: step time by the cost
    model alone with the batch it begins with, seconds, shape as the landscapes'.
    """

    goal: Goal
    on_lambda: bool
    observations: tuple[Observation, ...]
    path: tuple[Choice, ...]
    moments: tuple[Moment, ...]
    whole: Moment
    predicted: Array

    @property
    def space(self) -> Space:
        """The choices there were."""
        return self.whole.landscape.space


def story_of(data: RunData) -> tuple[Story | None, str]:
    """The search of a run, or None and why there is none. ConfigError when bayesian-optimization is not installed."""
    known = data.workload
    if known is None:
        return None, "workload.json is not there"
    try:
        scales = {**asdict(Scales()), **known.get("scales", {})}  # an older version's have fewer
        model = CostModel.from_json(json.dumps({**known, "scales": scales}))
        sizes = known["space"]
        space = Space(tuple(map(int, sizes["workers"])), tuple(map(int, sizes["memory_mb"])))
    except (SmltError, AttributeError, KeyError, TypeError, ValueError) as error:
        return None, f"workload.json is not of this version's: {error}"
    decisions = [one for one in data.decisions if one.choice is not None]
    if not decisions:
        return None, "no decision has been written down yet"
    goal = _goal(decisions[-1], data.config)
    chosen = [decisions[i] for i in _to_be_drawn(decisions)]
    moments = []
    for one in chosen:
        observed = _before(one, data)
        standing = Standing(_or_zero(one.elapsed_s), _or_zero(one.spent_usd), left_behind(one, data, model, observed))
        if not standing.left:
            continue
        title = f"round {one.number}, {one.elapsed_s:,.0f} s"
        moments.append(_moment(title, space, model, goal, eras_of(observed, decisions), one.choice, one.chosen, standing))
    if not moments:
        return None, "at no decision was anything left to be trained"
    all_of = _from_the_beginning(decisions[0], left_behind(decisions[0], data, model, data.observations[:1]))
    last = decisions[-1].chosen or decisions[-1].choice
    eras = eras_of(data.observations, decisions)
    whole = replace(_moment("the end", space, model, goal, eras, None, None, all_of), current=last)
    path = _path([*(one.choice for one in decisions), decisions[-1].chosen])
    predicted = _predicted(space, model, whole.global_batch_size)
    return Story(goal, data.on_lambda, data.observations, path, tuple(moments), whole, predicted), ""


def story_of_replay(
    space: Space,
    model: StepModel,
    goal: Goal,
    observations: Sequence[Observation],
    standing: Standing,
    *,
    chosen: Choice | None = None,
    on_lambda: bool = True,
    hyper: HyperPriors = WITH_MODEL,
) -> Story:
    """The search of a replay, evaluation by evaluation: what was believed behind each (the first, the last, some in between).

    `observations`: in the order in which they were tried; `standing`: before the first; `chosen`: what was settled for;
    `hyper`: how wrong the model may be.
    """
    counts = sorted({1 + _spread(i, len(observations)) for i in range(min(MOMENTS_MAX, len(observations)))}) or [0]
    moments = []
    for count in counts:
        seen = observations[:count]
        current = seen[-1].choice if seen else None
        after = observations[count].choice if count < len(observations) else chosen
        title = f"{count} tried" if count else "before the first"
        moments.append(_moment(title, space, model, goal, (seen,), current, after, standing, hyper))
    path = _path([*(one.choice for one in observations), chosen])
    whole = replace(
        _moment("the end", space, model, goal, (observations,), None, None, standing, hyper), current=path[-1] if path else None
    )
    predicted = _predicted(space, model, whole.global_batch_size)
    return Story(goal, on_lambda, tuple(observations), path, tuple(moments), whole, predicted)


def left_behind(decision: Decision, data: RunData, model: CostModel, observed: Sequence[Observation]) -> tuple[Phase, ...]:
    """What was left to be trained: as the row says, else by epochs, batch schedule and steps."""
    written = decision.row.get("left")
    if isinstance(written, list) and all(isinstance(one, dict) for one in written):
        pairs = [(number(one.get("steps")), number(one.get("global_batch_size"))) for one in written]
        return tuple(Phase(int(steps), int(batch)) for steps, batch in pairs if steps > 0 and batch > 0)
    config = data.config
    epochs, batch = number(config.get("epochs")), number(config.get("global_batch_size"))
    batch = float(observed[-1].global_batch_size) if observed else batch
    if not (0 < epochs < math.inf and 0 < batch < math.inf):
        return ()
    schedule = BatchSchedule.constant(int(batch))
    if config.get("batch_schedule"):
        schedule = BatchSchedule.parse(str(config["batch_schedule"]), int(number(config.get("global_batch_size"))))
    ends = [row for row in data.steps.epochs if number(row.get("step")) <= decision.step]
    epoch, at = (int(number(ends[-1].get("epoch"))) + 1, int(number(ends[-1].get("step")))) if ends else (0, 0)
    return phases(schedule, model.workload.samples, int(epochs), epoch, decision.step - at)


def _from_the_beginning(first: Decision, left: tuple[Phase, ...]) -> Standing:
    """All of the run: what the first round trained, and what was left behind it."""
    if not left or first.step < 1:
        return Standing(0.0, 0.0, left or (Phase(max(first.step, 1), 1),))
    return Standing(0.0, 0.0, (replace(left[0], steps=left[0].steps + first.step), *left[1:]))


def _before(decision: Decision, data: RunData) -> list[Observation]:
    """What had been observed when it was decided."""
    return [one for one in data.observations if one.at_step <= decision.step]


#: What the controller's reason holds when it has told the optimizer that steps take another time than they did.
_CHANGED = re.compile(r"(?:^|; )(?:computing takes|steps have become) ")


def eras_of(observed: Sequence[Observation], decisions: Sequence[Decision]) -> list[list[Observation]]:
    """Observations by eras: one begins with the round in which the controller noticed that the dynamics had changed."""
    changes = [one.step for one in decisions if one.row.get("dynamics_changed") or _CHANGED.search(one.reason)]
    eras: list[list[Observation]] = [[]]
    for position, one in enumerate(observed):
        until = observed[position + 1].at_step if position + 1 < len(observed) else math.inf
        if any(one.at_step <= step < until for step in changes):
            eras.append([])
        eras[-1].append(one)
    return eras


def _pooled(observed: Sequence[Observation]) -> list[Observation]:
    """One for each choice and batch, as the optimizer puts them together by itself: a run has hundreds, and learns at each."""
    groups: dict[tuple[Choice, int], list[Observation]] = {}
    for one in observed:
        groups.setdefault((one.choice, one.global_batch_size), []).append(one)
    pooled = []
    for group in groups.values():
        weights = np.array([max(one.noise, 1e-3) ** -2 for one in group])
        log_s = float(weights @ np.log([one.step_s for one in group]) / weights.sum())
        pooled.append(replace(group[-1], step_s=math.exp(log_s), noise=float(weights.sum() ** -0.5)))
    return pooled


def _moment(
    title: str,
    space: Space,
    model: StepModel,
    goal: Goal,
    eras: Sequence[Sequence[Observation]],
    current: Choice | None,
    chosen: Choice | None,
    standing: Standing,
    hyper: HyperPriors = WITH_MODEL,
) -> Moment:
    from smlt.client.optimizer.optimizer import PerformanceOptimizer

    optimizer = PerformanceOptimizer(space, model, goal, hyper=hyper)
    for number_of_era, observed in enumerate(eras):
        if number_of_era:
            optimizer.dynamics_changed()
        for one in _pooled(observed):
            optimizer.observe(one)
    seen = [one for observed in eras for one in observed]
    round_s = seen[-1].steps * seen[-1].step_s if seen else 0.0
    landscape = optimizer.landscape(current, standing, round_s=round_s)
    return Moment(title, len(seen), current, chosen, standing.left[0].global_batch_size, landscape)


def _predicted(space: Space, model: StepModel, global_batch_size: int) -> Array:
    rows = [
        [
            math.nan if model.why_not(Choice(workers, memory)) else model.step_s(Choice(workers, memory), global_batch_size)
            for memory in space.memory_mb
        ]
        for workers in space.workers
    ]
    return np.array(rows)


def _to_be_drawn(decisions: Sequence[Decision]) -> list[int]:
    """The first, the last, and of those in between the ones that changed something, spread evenly where they are many."""
    last = len(decisions) - 1
    changes = [i for i in range(1, last) if decisions[i].chosen not in (None, decisions[i].choice)]
    room = MOMENTS_MAX - 2
    spread = [changes[_spread(i, len(changes))] for i in range(min(room, len(changes)))]
    return sorted({0, *spread, last})


def _spread(i: int, count: int) -> int:
    return round(i * (count - 1) / (min(MOMENTS_MAX, count) - 1)) if count > 1 else 0


def _path(choices: Sequence[Choice | None]) -> tuple[Choice, ...]:
    """Without repetitions."""
    found: list[Choice] = []
    for one in choices:
        if one is not None and (not found or found[-1] != one):
            found.append(one)
    return tuple(found)


def _goal(decision: Decision, config: Row) -> Goal:
    limits = [decision.limit(name) for name in ("deadline_s", "budget_usd")]
    if all(map(math.isnan, limits)):
        limits = [number(config.get(name)) for name in ("deadline_s", "budget_usd")]
    deadline_s, budget_usd = (limit if limit > 0 else None for limit in limits)
    return Goal(deadline_s, budget_usd)


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
