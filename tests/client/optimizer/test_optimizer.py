"""The Performance Optimizer over a small analytic world."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from smlt.client.optimizer.acquisition import Outlook, improvement
from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.optimizer import Belief, PerformanceOptimizer
from smlt.client.optimizer.priors import WITHOUT_MODEL
from smlt.client.optimizer.space import Choice, Space
from smlt.errors import ConfigError

SPACE = Space((1, 2, 4, 8, 16, 32, 64), (1024, 1769, 3538))
BATCH = 256


class World:
    """Compute that is shared, communication that grows, `factor` to make it slower. Too little memory below 1024 MB."""

    def __init__(self, factor: float = 1.0, switch_s: float = 5.0) -> None:
        self.factor, self.pause_s = factor, switch_s

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        compute = global_batch_size * 0.01 / choice.workers / min(choice.memory_mb / 1769, 1.5)
        return self.factor * (compute + 0.05 + 0.002 * choice.workers)

    def usd_per_s(self, choice: Choice) -> float:
        return choice.workers * choice.memory_mb / 1024 * 0.0000166667

    def switch_s(self, before: Choice | None, after: Choice) -> float:
        return 0.0 if before == after else self.pause_s

    def why_not(self, choice: Choice, global_batch_size: int | None = None) -> str:
        return "too little memory" if choice.memory_mb < 1769 else ""


def standing(steps: int = 10_000, elapsed_s: float = 0.0, spent_usd: float = 0.0) -> Standing:
    return Standing(elapsed_s, spent_usd, (Phase(steps, BATCH),))


def seen(world: World, choice: Choice, noise: float = 0.02) -> Observation:
    return Observation(choice, world.step_s(choice, BATCH), 100, BATCH, noise=noise)


def totals(world: World, choice: Choice, steps: int) -> tuple[float, float]:
    seconds = steps * world.step_s(choice, BATCH)
    return seconds, seconds * world.usd_per_s(choice)


POSSIBLE = [choice for choice in SPACE if not World().why_not(choice)]


def taught(world: World, goal: Goal, choices: list[Choice] = POSSIBLE, **more: object) -> PerformanceOptimizer:
    optimizer = PerformanceOptimizer(SPACE, World(), goal, **more)  # type: ignore[arg-type]
    for choice in choices:
        optimizer.observe(seen(world, choice))
    return optimizer


def test_without_observations_it_believes_the_model() -> None:
    optimizer = PerformanceOptimizer(SPACE, World(), Goal())
    for choice in POSSIBLE:
        belief = optimizer.belief(choice, BATCH)
        assert belief.median_s == pytest.approx(World().step_s(choice, BATCH))
        assert belief.std_log > 0.3


def test_what_all_choices_have_in_common_is_learnt_from_one() -> None:
    optimizer = taught(World(1.5), Goal(), [Choice(8, 1769)])
    belief = optimizer.belief(Choice(8, 1769), BATCH)
    assert belief.median_s == pytest.approx(World(1.5).step_s(Choice(8, 1769), BATCH), rel=0.02)
    assert belief.std_log < 0.03
    far = optimizer.belief(Choice(64, 3538), BATCH)
    assert far.median_s > 1.15 * World().step_s(Choice(64, 3538), BATCH)
    assert belief.std_log < far.std_log < PerformanceOptimizer(SPACE, World(), Goal()).belief(Choice(64, 3538), BATCH).std_log


def test_a_noisy_round_teaches_less_than_a_quiet_one_and_many_teach_more_than_one() -> None:
    choice = Choice(8, 1769)

    def std(*noises: float) -> float:
        optimizer = PerformanceOptimizer(SPACE, World(), Goal())
        for noise in noises:
            optimizer.observe(seen(World(), choice, noise))
        return optimizer.belief(choice, BATCH).std_log

    assert std(0.02) < std(0.1) < std(0.3)
    assert std(0.1, 0.1, 0.1, 0.1) < std(0.1)


def test_what_an_earlier_run_saw_is_trusted_less() -> None:
    own, carried = (PerformanceOptimizer(SPACE, World(), Goal()) for _ in range(2))
    own.observe(seen(World(1.5), Choice(8, 1769)))
    carried.observe(seen(World(1.5), Choice(8, 1769)), carried=True)
    one, other = own.belief(Choice(8, 1769), BATCH), carried.belief(Choice(8, 1769), BATCH)
    assert one.std_log < 0.5 * other.std_log
    assert World().step_s(Choice(8, 1769), BATCH) < other.median_s < one.median_s


def test_after_the_dynamics_have_changed_new_rounds_outweigh_old_ones() -> None:
    choice = Choice(8, 1769)
    optimizer = PerformanceOptimizer(SPACE, World(), Goal())
    for _ in range(20):
        optimizer.observe(seen(World(), choice))
    before = optimizer.belief(choice, BATCH).std_log
    optimizer.dynamics_changed()
    assert optimizer.belief(choice, BATCH).std_log > 3 * before
    optimizer.observe(seen(World(2.0), choice))
    assert optimizer.belief(choice, BATCH).median_s == pytest.approx(World(2.0).step_s(choice, BATCH), rel=0.05)
    other = Choice(32, 1769)  # not seen since: it is taken to have become slower, too
    assert optimizer.belief(other, BATCH).median_s > 1.2 * World().step_s(other, BATCH)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
def test_with_everything_seen_it_settles_for_the_best_that_keeps_the_goal(factor: float) -> None:
    world, steps = World(factor), 10_000
    fastest = min(totals(world, choice, steps)[0] for choice in POSSIBLE)
    cheapest = min(totals(world, choice, steps)[1] for choice in POSSIBLE)

    def best(allowed: float, limited: int, wanted: int) -> float:
        return min(found[wanted] for choice in POSSIBLE if (found := totals(world, choice, steps))[limited] <= allowed)

    for slack in (1.5, 3.0):
        made = taught(world, Goal(deadline_s=slack * fastest)).settle(standing())
        seconds, usd = totals(world, made, steps)
        assert seconds <= slack * fastest
        assert usd <= 1.1 * best(0.9 * slack * fastest, 0, 1)
        made = taught(world, Goal(budget_usd=slack * cheapest)).settle(standing())
        seconds, usd = totals(world, made, steps)
        assert usd <= slack * cheapest
        assert seconds <= 1.1 * best(0.9 * slack * cheapest, 1, 0)
    made = taught(world, Goal()).settle(standing())
    least = min(math.prod(totals(world, choice, steps)) for choice in POSSIBLE)
    assert math.prod(totals(world, made, steps)) <= 1.1 * least


def test_the_same_observations_give_the_same_suggestion() -> None:
    made = [taught(World(1.3), Goal(deadline_s=4000), POSSIBLE[:3], seed=4) for _ in range(2)]
    assert made[0].suggest(POSSIBLE[2], standing(), round_s=30) == made[1].suggest(POSSIBLE[2], standing(), round_s=30)
    assert made[0].suggest(POSSIBLE[2], standing(), round_s=30) == made[0].suggest(POSSIBLE[2], standing(), round_s=30)


def test_where_nothing_is_known_the_seed_draws_the_first_choice() -> None:
    class Flat(World):
        def step_s(self, choice: Choice, global_batch_size: int) -> float:
            return 1.0

        def usd_per_s(self, choice: Choice) -> float:
            return 1.0

    def first(seed: int) -> Choice:
        optimizer = PerformanceOptimizer(SPACE, Flat(), Goal(), seed=seed, hyper=WITHOUT_MODEL)
        return optimizer.suggest(None, standing(), round_s=0).choice

    drawn = [first(seed) for seed in range(30)]
    assert len(set(drawn)) > 8
    assert drawn == [first(seed) for seed in range(30)]


def test_it_stays_when_changing_over_costs_more_than_what_is_left_to_gain() -> None:
    goal, poor = Goal(deadline_s=1e6), Choice(64, 3538)
    patient = taught(World(), goal).suggest(poor, standing(100_000), round_s=30)
    assert patient.kind == "exploit"
    assert patient.choice.workers < poor.workers
    assert patient.gain > patient.price >= 0
    optimizer = PerformanceOptimizer(SPACE, World(switch_s=3000.0), goal)
    for choice in POSSIBLE:
        optimizer.observe(seen(World(), choice))
    assert optimizer.suggest(poor, standing(100), round_s=30).kind == "stay"


def test_it_explores_while_there_is_much_left_and_not_when_there_is_little() -> None:
    start = Choice(8, 1769)
    optimizer = taught(World(), Goal(), [start])
    much = optimizer.suggest(start, standing(1_000_000), round_s=30)
    assert much.kind == "explore"
    assert much.gain > much.price > 0
    assert much.choice in POSSIBLE
    assert "may gain" in much.reason
    assert optimizer.suggest(start, standing(60), round_s=30).kind == "stay"


def test_it_ends_exploring_by_itself() -> None:
    world, optimizer = World(1.4), PerformanceOptimizer(SPACE, World(), Goal())
    rng, current, kinds = np.random.default_rng(3), None, []
    for _ in range(40):
        made = optimizer.suggest(current, standing(100_000), round_s=30)
        kinds.append(made.kind)
        current = made.choice
        observed = seen(world, current)
        optimizer.observe(replace(observed, step_s=observed.step_s * math.exp(rng.normal(0, 0.02))))
    assert kinds[-10:] == ["stay"] * 10


def test_nothing_is_tried_that_would_endanger_a_deadline() -> None:
    """The same state, with time for a detour and without."""
    here, steps = Choice(16, 1769), 200_000
    optimizer = taught(World(), Goal(), [here])
    needed_s = steps * optimizer.belief(here, BATCH).quantile_s(0.95)
    optimizer.goal = Goal(deadline_s=1.05 * needed_s)
    free = optimizer.suggest(here, standing(steps), round_s=30)
    bound = optimizer.suggest(here, standing(steps), round_s=needed_s)
    assert free.kind == "explore"
    assert bound.kind != "explore"


def test_a_goal_out_of_reach_gets_what_comes_nearest_and_says_so() -> None:
    world = World()
    steps = 10_000
    fastest = min(POSSIBLE, key=lambda choice: totals(world, choice, steps)[0])
    cheapest = min(POSSIBLE, key=lambda choice: totals(world, choice, steps)[1])
    late = taught(world, Goal(deadline_s=totals(world, fastest, steps)[0] / 3))
    assert totals(world, late.settle(standing()), steps)[0] <= 1.03 * totals(world, fastest, steps)[0]
    assert "deadline can hardly be kept" in late.suggest(fastest, standing(), round_s=30).reason
    dear = taught(world, Goal(budget_usd=totals(world, cheapest, steps)[1] / 3))
    assert totals(world, dear.settle(standing()), steps)[1] <= 1.03 * totals(world, cheapest, steps)[1]
    assert "budget can hardly be kept" in dear.suggest(cheapest, standing(), round_s=30).reason


def test_a_deadline_and_a_budget_are_both_kept() -> None:
    world, steps = World(), 10_000
    goal = Goal(deadline_s=3000, budget_usd=1.5)
    kept = [c for c in POSSIBLE if totals(world, c, steps)[0] < 2700 and totals(world, c, steps)[1] < 1.35]
    assert kept, "the case is to have a solution"
    seconds, usd = totals(world, taught(world, goal).settle(standing()), steps)
    assert seconds <= 3000
    assert usd <= 1.5


def test_what_cannot_work_is_never_suggested() -> None:
    optimizer = PerformanceOptimizer(SPACE, World(), Goal())
    assert all(choice.memory_mb >= 1769 for choice in optimizer.choices)
    with pytest.raises(ConfigError, match="too little memory"):
        PerformanceOptimizer(Space((1, 2), (512,)), World(), Goal())


def test_phases_of_other_batch_sizes_count_with_their_own_step_times() -> None:
    left = Standing(0.0, 0.0, (Phase(100, 64), Phase(10_000, 2048)))
    big = PerformanceOptimizer(SPACE, World(), Goal()).settle(left)
    small = PerformanceOptimizer(SPACE, World(), Goal()).settle(Standing(0.0, 0.0, (Phase(10_100, 64),)))
    assert big.workers > small.workers


def test_a_step_without_a_time_and_a_run_without_steps_are_refused() -> None:
    optimizer = PerformanceOptimizer(SPACE, World(), Goal())
    with pytest.raises(ConfigError):
        optimizer.observe(Observation(Choice(1, 1769), float("nan"), 10, BATCH))
    with pytest.raises(ConfigError):
        optimizer.suggest(None, Standing(0, 0, ()), round_s=10)


def test_the_landscape_covers_the_grid_with_nan_where_nothing_can_work() -> None:
    made = taught(World(), Goal(deadline_s=3000), POSSIBLE[:4]).landscape(POSSIBLE[0], standing())
    for name in ("step_s", "std_log", "seconds", "usd", "objective", "acquisition", "odds"):
        grid = getattr(made, name)
        assert grid.shape == (7, 3)
        assert np.isnan(grid[:, 0]).all()
        assert np.isfinite(grid[:, 1:]).all(), name
    assert ((made.odds[:, 1:] >= 0) & (made.odds[:, 1:] <= 1)).all()


@pytest.mark.parametrize("goal", [Goal(deadline_s=1e5), Goal(budget_usd=1e5), Goal()])
def test_expected_improvement_is_what_drawing_many_says(goal: Goal) -> None:
    outlook = Outlook(
        goal, 200.0, 0.3, np.log([1000.0, 900.0, 1500.0]), np.array([0.1, 0.3, 0.5]), np.array([1e-3, 2e-3, 5e-4]),
        np.array([0.0, 5.0, 10.0]),
    )  # fmt: skip
    best = float(outlook.expected()[0])
    gain, better = improvement(outlook, best, outlook.std_log)
    c0, c1, c2 = outlook.coefficients()
    drawn = np.exp(outlook.mean_log + outlook.std_log * np.random.default_rng(0).standard_normal((400_000, 3)))
    gained = np.maximum(best - (c0 + c1 * drawn + c2 * drawn**2), 0.0)
    assert gain == pytest.approx(gained.mean(axis=0), rel=0.02)
    assert better == pytest.approx((gained > 0).mean(axis=0), abs=0.005)


def test_a_belief_has_the_quantiles_of_a_log_normal() -> None:
    belief = Belief(math.log(0.5), 0.2)
    assert belief.median_s == pytest.approx(0.5)
    assert belief.quantile_s(0.5) == pytest.approx(0.5)
    assert belief.quantile_s(0.975) == pytest.approx(0.5 * math.exp(0.392), rel=1e-3)


def test_importing_the_optimizer_imports_no_scikit_learn() -> None:
    code = (
        "import sys, smlt.client.optimizer.optimizer; print([m for m in ('sklearn', 'bayes_opt', 'scipy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
