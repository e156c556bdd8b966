"""What the controller decides at the end of rounds, with the real optimizer and step times that a test makes up."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlt.client.optimizer.controller import Controller, Decision, first_choice
from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.optimizer import PerformanceOptimizer
from smlt.client.optimizer.space import Choice, Space
from smlt.errors import ConfigError

SPACE = Space((1, 2, 4, 8, 16, 32), (1769,))
BATCH = 64
FOUR, EIGHT = Choice(4, 1769), Choice(8, 1769)


@dataclass(frozen=True)
class Model:
    """A step takes `work` / n + `hop` n seconds; a worker costs 0.001 USD a second."""

    work: float = 1.0
    hop: float = 0.001
    switching_s: float = 2.0

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        return self.work * global_batch_size / BATCH / choice.workers + self.hop * choice.workers

    def usd_per_s(self, choice: Choice) -> float:
        return 0.001 * choice.workers

    def switch_s(self, before: Choice | None, after: Choice) -> float:
        return 0.0 if before == after else self.switching_s

    def why_not(self, choice: Choice) -> str:
        return ""


class Run:
    """A run under a controller; `truth` gives the step time of a choice at a step."""

    def __init__(
        self,
        goal: Goal,
        *,
        steps: int = 10_000,
        start: Choice = FOUR,
        truth: Callable[[Choice, int], float] | None = None,
        model: Model | None = None,
        round_s: float = 60.0,
    ) -> None:
        self.model = model or Model()
        self.truth = truth or (lambda choice, step: self.model.step_s(choice, BATCH))
        self.optimizer = PerformanceOptimizer(SPACE, self.model, goal)
        self.controller = Controller(self.optimizer, goal, start, round_s=round_s)
        self.steps, self.done, self.elapsed_s, self.usd = steps, 0, 0.0, 0.0
        self.last_round_usd = 0.0
        self.choice = start
        self.decisions: list[Decision] = []

    def standing(self) -> Standing:
        left = self.steps - self.done
        return Standing(self.elapsed_s, self.usd, (Phase(left, BATCH),) if left else ())

    def round(self, **losses: float) -> Decision:
        """Train until the round is over, and do what is decided."""
        steps, began, before = 0, self.elapsed_s, self.usd
        while self.done < self.steps:
            seconds = self.truth(self.choice, self.done)
            self.elapsed_s, self.usd = self.elapsed_s + seconds, self.usd + seconds * self.model.usd_per_s(self.choice)
            steps, self.done = steps + 1, self.done + 1
            if self.controller.round_is_over(steps, self.elapsed_s - began, self.standing()):
                break
        self.last_round_usd = self.usd - before
        seen = Observation(self.choice, (self.elapsed_s - began) / steps, steps, BATCH, noise=0.01, at_step=self.done)
        decision = self.controller.end_round(seen, self.standing(), **losses)  # type: ignore[arg-type]
        self.decisions.append(decision)
        if decision.action == "switch":
            seconds = self.model.switch_s(self.choice, decision.choice)
            self.elapsed_s, self.usd = self.elapsed_s + seconds, self.usd + seconds * self.model.usd_per_s(decision.choice)
            self.choice = decision.choice
        return decision

    def to_its_end(self) -> None:
        while self.done < self.steps and self.round().action != "stop":
            pass


# ---- rounds ----


def test_a_round_has_steps_enough_for_a_mean_and_the_first_is_short() -> None:
    controller = Run(Goal()).controller
    standing = Standing(10, 0, (Phase(10_000, BATCH),))
    assert not controller.round_is_over(2, 1e6, standing)
    assert not controller.round_is_over(9, 20, standing)
    assert not controller.round_is_over(100, 14, standing)
    assert controller.round_is_over(10, 15, standing)
    run = Run(Goal(), start=EIGHT)
    run.round()
    assert not run.controller.round_is_over(300, 59, run.standing()) or run.choice != EIGHT


def test_rounds_are_shorter_at_the_beginning_and_near_the_deadline() -> None:
    controller = Run(Goal(deadline_s=400)).controller
    left = (Phase(10_000, BATCH),)
    assert controller.round_is_over(3, 6.1, Standing(20, 0, left))
    assert not controller.round_is_over(3, 14.0, Standing(60, 0, left))
    assert controller.round_is_over(3, 14.0, Standing(300, 0, left))


def test_a_round_ends_before_the_money_does() -> None:
    controller = Run(Goal(budget_usd=1)).controller
    left = (Phase(10_000, BATCH),)
    assert not controller.round_is_over(1, 0.3, Standing(0, 0.9, left))
    assert controller.round_is_over(1, 0.3, Standing(0, 0.999, left))
    assert not controller.round_is_over(0, 0.0, Standing(0, 1.5, ()))


@pytest.mark.parametrize("arguments", [{"round_s": 0}, {"round_steps": 0}])
def test_a_round_of_nothing_is_refused(arguments: dict[str, float]) -> None:
    optimizer = PerformanceOptimizer(SPACE, Model(), Goal())
    with pytest.raises(ConfigError, match="round"):
        Controller(optimizer, Goal(), FOUR, **arguments)  # type: ignore[arg-type]


# ---- deadlines ----


def test_a_deadline_is_met_though_steps_take_longer_than_the_model_says() -> None:
    run = Run(Goal(deadline_s=1500), truth=lambda choice, step: 1.6 * Model().step_s(choice, BATCH))
    run.to_its_end()
    assert run.done == run.steps
    assert run.elapsed_s <= 1500
    assert not any(decision.missed for decision in run.decisions)


def test_at_risk_it_takes_more_workers_long_before_it_is_late() -> None:
    run = Run(Goal(deadline_s=2700), truth=lambda choice, step: Model().step_s(choice, BATCH) * (1.5 if step > 3000 else 1.0))
    run.to_its_end()
    assert run.elapsed_s <= 2700
    rescues = [decision for decision in run.decisions if decision.kind == "rescue"]
    assert rescues
    assert "at risk" in rescues[0].reason
    assert rescues[0].choice.workers > 4


def test_what_it_forecasts_comes_true() -> None:
    run = Run(Goal(deadline_s=2600))
    run.to_its_end()
    changed = max((i for i, decision in enumerate(run.decisions) if decision.action == "switch"), default=-1)
    assert len(run.decisions) > changed + 5
    for decision in run.decisions[changed + 1 : -1]:
        assert decision.forecast.seconds_low <= run.elapsed_s * 1.01
        assert run.elapsed_s * 0.99 <= decision.forecast.seconds_high


def test_lost_workers_make_the_end_later_and_less_sure() -> None:
    run, other = Run(Goal(deadline_s=3000)), Run(Goal(deadline_s=3000))
    undisturbed, disturbed = run.round().forecast, other.round(failures=3, lost_s=300.0).forecast
    assert disturbed.seconds > undisturbed.seconds + 100
    assert disturbed.odds < undisturbed.odds


def test_a_round_that_is_not_to_be_judged_changes_no_belief() -> None:
    run = Run(Goal(deadline_s=3000))
    run.round()
    before = run.optimizer.belief(run.choice, BATCH)
    run.controller.end_round(None, run.standing(), failures=1, lost_s=20.0)
    assert run.optimizer.belief(run.choice, BATCH) == before


def test_with_a_worker_less_than_was_chosen_it_goes_on_from_there() -> None:
    run = Run(Goal(deadline_s=3000), start=EIGHT)
    seen = Observation(FOUR, 0.254, 100, BATCH, noise=0.01)
    decision = run.controller.end_round(seen, run.standing())
    assert decision.action == "switch" or decision.choice == FOUR
    assert run.controller.choice == decision.choice


def test_when_all_is_done_there_is_nothing_to_decide() -> None:
    decision = Run(Goal(deadline_s=3000)).controller.end_round(None, Standing(100, 1, ()))
    assert decision.action == "keep"
    assert (decision.forecast.seconds, decision.forecast.odds) == pytest.approx((100, 1))


# ---- deadlines that cannot be met ----

LATE = Goal(deadline_s=600)  # 10,000 steps take 640 s at best (32 workers)


@pytest.mark.parametrize(
    ("on_miss", "action"), [("ask", "ask"), ("stop", "stop"), ("continue", "keep"), ("best-effort", "keep")]
)
def test_what_cannot_be_met_is_said_once_early_with_figures(on_miss: str, action: str) -> None:
    run = Run(
        replace(LATE, on_miss=on_miss),
        model=Model(hop=0.002),
        truth=lambda choice, step: Model(hop=0.003).step_s(choice, BATCH),
    )
    said_at = 0.0
    while run.done < run.steps:
        decision = run.round()
        if decision.missed:
            said_at = run.elapsed_s
            break
    assert 0 < said_at <= 60
    assert decision.action == action or (action == "keep" and decision.action == "switch")
    assert re.match(
        r"the deadline of 10m 00s cannot be met: \d+m \d\ds \(\d+m \d\ds to \d+m \d\ds\) with \d+ workers", decision.reason
    )
    assert not any(run.round().missed for _ in range(10))


def test_best_effort_goes_where_it_is_fastest() -> None:
    run = Run(replace(LATE, on_miss="best-effort"), model=Model(hop=0.002))
    run.to_its_end()
    assert run.done == run.steps
    assert run.choice.workers in (16, 32)


def test_the_answer_stop_ends_the_run_at_the_next_round() -> None:
    run = Run(replace(LATE, on_miss="ask"), model=Model(hop=0.003))
    while run.round().action != "ask":
        pass
    run.controller.answer("stop")
    decision = run.round()
    assert decision.action == "stop"
    assert "cannot be met" in decision.reason


@pytest.mark.parametrize("asked", [True, False])
def test_to_continue_is_to_let_the_goal_go(asked: bool) -> None:
    goal = replace(LATE, on_miss="ask" if asked else "continue")
    run = Run(goal, model=Model(hop=0.003))
    while not run.round().missed:
        pass
    if asked:
        run.controller.answer("continue")
    assert run.controller.let_go
    run.to_its_end()
    assert run.done == run.steps
    assert run.choice.workers < 16  # the best trade of time and cost, not the fastest


def test_while_nobody_answers_it_does_its_best() -> None:
    run = Run(replace(LATE, on_miss="ask"), model=Model(hop=0.003))
    run.to_its_end()
    assert run.done == run.steps
    assert [decision.action for decision in run.decisions].count("ask") == 1


@pytest.mark.parametrize("answer", ["ask", "yes", ""])
def test_another_answer_is_refused(answer: str) -> None:
    with pytest.raises(ConfigError, match="stop, continue or best-effort"):
        Run(LATE).controller.answer(answer)


def test_a_goal_that_was_given_up_is_taken_up_again_when_steps_become_faster() -> None:
    run = Run(
        Goal(deadline_s=1200),
        truth=lambda choice, step: Model().step_s(choice, BATCH) * (3.0 if step < 1500 else 0.7),
    )
    run.to_its_end()
    assert any(decision.missed for decision in run.decisions)
    assert not run.controller.missed
    assert run.elapsed_s <= 1200


# ---- budgets ----


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.3, 3.0), st.floats(0.5, 30.0), st.sampled_from(["stop", "best-effort", "ask"]), st.sampled_from(SPACE.workers)
)
def test_a_budget_is_never_exceeded_by_more_than_the_last_rounds_cost(
    slower: float, budget_usd: float, on_miss: str, workers: int
) -> None:
    run = Run(
        Goal(budget_usd=budget_usd, on_miss=on_miss),
        truth=lambda choice, step: slower * Model().step_s(choice, BATCH) * (1.4 if step % 7 == 0 else 1.0),
        steps=2000,
        start=Choice(workers, 1769),
    )
    run.to_its_end()
    assert run.usd <= budget_usd + run.last_round_usd
    if run.done < run.steps:
        assert run.decisions[-1].action == "stop"


def test_at_the_end_of_the_money_it_says_what_is_left_to_do() -> None:
    run = Run(Goal(budget_usd=4))
    run.to_its_end()
    assert run.done < run.steps
    assert re.match(
        r"(3\.99|4\.00) USD of the budget of 4\.00 USD are spent with [\d,]+ steps left to do", run.decisions[-1].reason
    )
    assert any("the budget of 4.00 USD cannot be kept" in decision.reason for decision in run.decisions if decision.missed)


def test_under_a_budget_it_is_as_fast_as_the_money_allows() -> None:
    run = Run(Goal(budget_usd=13))
    run.to_its_end()
    assert run.done == run.steps
    assert run.usd <= 13
    assert run.choice.workers >= 8  # 16 workers cost 12.6 USD, one 10


def test_who_continues_without_the_goal_may_spend_more() -> None:
    run = Run(Goal(budget_usd=4, on_miss="continue"), steps=3000, truth=lambda choice, step: 3 * Model().step_s(choice, BATCH))
    run.to_its_end()
    assert run.done == run.steps


# ---- dynamics ----


def test_steps_that_become_slower_are_noticed_and_said() -> None:
    changed = []
    run = Run(Goal(), truth=lambda choice, step: Model().step_s(choice, BATCH) * (1.3 if step > 4000 else 1.0))
    plain = run.optimizer.dynamics_changed
    run.optimizer.dynamics_changed = lambda: (changed.append(run.done), plain())[1]  # type: ignore[method-assign]
    run.to_its_end()
    assert changed
    assert 4000 <= changed[0] <= 6500
    assert any("steps have become slower" in decision.reason for decision in run.decisions)


def test_another_batch_size_is_no_drift_but_other_computing_is() -> None:
    run = Run(Goal())
    for _ in range(3):
        run.controller.end_round(Observation(run.controller.choice, 0.25, 100, 64, 0.01, compute_s=0.2), run.standing())
    assert not run.controller._learn(Observation(run.controller.choice, 0.8, 100, 256, 0.01, compute_s=0.7))
    choice = run.controller.choice
    run.controller._learn(Observation(choice, 0.25, 100, 64, 0.01, compute_s=0.2))
    note = run.controller._learn(Observation(choice, 0.38, 100, 64, 0.01, compute_s=0.32))
    assert "computing takes 1.60 times as long" in note


def test_choices_that_are_nearly_alike_are_not_changed_to_and_fro() -> None:
    wave = Model(work=1.0, hop=0.0)  # without communication time times cost falls, but by little where it is rippled
    run = Run(
        Goal(deadline_s=2600),
        model=wave,
        truth=lambda choice, step: wave.step_s(choice, BATCH) * (1 + 0.03 * math.sin(step / 300 + choice.workers)),
    )
    run.to_its_end()
    assert run.elapsed_s <= 2600
    assert sum(decision.action == "switch" for decision in run.decisions) <= 10


def test_a_choice_is_tried_twice_at_most() -> None:
    run = Run(
        Goal(deadline_s=2600), truth=lambda choice, step: Model().step_s(choice, BATCH) * (1.2 if choice.workers < 4 else 1.0)
    )
    run.to_its_end()
    tried = [decision.choice for decision in run.decisions if decision.kind == "explore"]
    assert all(tried.count(choice) <= 2 for choice in tried)


# ---- the beginning ----


def test_it_begins_with_time_and_money_kept_back_for_a_failure() -> None:
    seen = list[Standing]()
    goal = Goal(deadline_s=3400, budget_usd=50)
    optimizer = PerformanceOptimizer(SPACE, Model(switching_s=300.0), goal)
    plain = optimizer.suggest
    optimizer.suggest = lambda current, standing, *, round_s: (  # type: ignore[method-assign]
        seen.append(standing),
        plain(current, standing, round_s=round_s),
    )[1]
    begun = first_choice(optimizer, goal, Standing(10.0, 1.0, (Phase(10_000, BATCH),)))
    assert begun.choice in SPACE
    assert seen[-1].elapsed_s > 310.0  # the start of another worker, and the time until it is seen to be needed
    assert seen[-1].spent_usd > 1.3


def test_what_uses_up_a_budget_before_anything_is_learnt_is_not_begun_with() -> None:
    goal = Goal(deadline_s=300, budget_usd=3)  # neither can be kept
    begun = first_choice(PerformanceOptimizer(SPACE, Model(), goal), goal, Standing(0.0, 0.0, (Phase(10_000, BATCH),)))
    assert begun.choice.workers < 32
    assert "nearest" in begun.reason


def test_a_goal_that_makes_no_sense_is_refused() -> None:
    optimizer = PerformanceOptimizer(SPACE, Model(), Goal())
    with pytest.raises(ConfigError, match="deadline"):
        Controller(optimizer, Goal(deadline_s=-1), FOUR)
