"""At the end of each round of training: what was learnt, whether the goal will be kept, and what to do next.

Pure: time and money come in as a `Standing`. docs/goals.md says what is promised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from smlt.client.optimizer.drift import DriftTest
from smlt.client.optimizer.forecast import UNFORESEEN, FailureHistory, Setbacks, TimeLeft, forecast, limit_s
from smlt.client.optimizer.goals import ON_MISS, Forecast, Goal, Standing, check_goal, duration_text, usd_text
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.optimizer import Belief, PerformanceOptimizer, Suggestion
from smlt.client.optimizer.space import Choice
from smlt.errors import ConfigError

#: A round is usually as long, and has at least so many steps; with much left to do it is this part of it.
ROUND_S, ROUND_STEPS, ROUND_PART_USUAL = 60.0, 20, 0.02
#: The first round of a choice that was not observed yet is shorter by this factor: it teaches the most.
FIRST_PART = 0.25
#: However long steps take, a mean of fewer tells nothing.
STEPS_MIN = 3
#: A round is no longer than this part of what is left of the time and the money, so that there is always time to act; parts of
#: the whole deadline or budget below the second are not worth asking for.
ROUND_PART, ROUND_PART_LEAST = 0.1, 0.005
#: Until so much of the deadline has passed rounds are shorter still: what cannot be kept is said within it.
EARLY_PART, EARLY_ROUND_PART = 0.1, 0.015
#: Below the first odds the goal is at risk, and what is sure (the second) is taken without regard to its price.
AT_RISK, SURE = 0.9, 0.95
#: Below these odds with the best of all choices the goal cannot be kept; above the second it can again.
HOPELESS, HOPEFUL = 0.02, 0.5
#: Before that is said: so many rounds, and so much certainty of the best choice's step time.
EVIDENCE_ROUNDS, EVIDENCE_STD_LOG = 2, 0.12
#: When a choice is made, as many failures as are expected are counted on, and one as long as it is likelier than this.
RESERVE_FROM = 0.02
#: A choice is tried so often, as long as its step time is not known this well: then it is, or trying does not tell.
TRIES_MAX, TRY_STD_LOG = 2, 0.02
#: A change for the sake of money or time saves at least this part of what is left to pay or wait for; a change back, soon
#: after, the second.
WORTH_WHILE, WORTH_GOING_BACK = 0.01, 0.04
#: And at least this part of all that the run takes or costs: at its end there is nothing to be gained.
WORTH_IN_ALL = 0.002
#: Rounds of a choice before it is left for a better one. Trying one, and coming back from it, does not wait.
ROUNDS_BETWEEN, ROUNDS_BACK = 2, 6
#: Quantile of step time by which the money of a round is reckoned.
CAREFUL = 0.95
#: The mean time that computing takes for a step is known better than the step's: when it changes by this factor at the same
#: batch, it is another model that is trained.
COMPUTE_CHANGED = 1.2


@dataclass(frozen=True)
class Decision:
    """What to do next. `action`: "keep", "switch" (to `choice`), "stop" (at a checkpoint), "ask" (the user, then `answer`).

    `forecast`: with `choice`, from here to the end. `reason`: one sentence for people. `kind`: the optimizer's "explore",
    "exploit" or "stay", or "rescue" when the goal was at risk. `missed`: this is where it is said that the goal cannot be kept.
    """

    action: str
    choice: Choice
    forecast: Forecast
    reason: str
    kind: str = "stay"
    missed: bool = False


@dataclass(frozen=True)
class _Prospect:
    """A choice, the odds that the goal is kept by going there and staying, and what is expected of it in all."""

    choice: Choice
    odds: float
    seconds: float
    usd: float
    std_log: float


class Controller:
    """Keeps one run's goal. `round_is_over` says when to ask it, `end_round` what to do.

    `start`: the choice that training begins with. `round_s`, `round_steps`: a round's usual length and fewest steps; near a
    deadline, at the end of the money and at the beginning rounds are shorter.

    Raises ConfigError for a goal that makes no sense.
    """

    def __init__(
        self,
        optimizer: PerformanceOptimizer,
        goal: Goal,
        start: Choice,
        *,
        round_s: float = ROUND_S,
        round_steps: int = ROUND_STEPS,
    ) -> None:
        check_goal(goal)
        if not round_s > 0 or round_steps < 1:
            raise ConfigError(f"a round of {round_s} s and {round_steps} steps is none")
        self.optimizer, self.goal, self.choice = optimizer, goal, start
        self.round_s, self.round_steps = round_s, round_steps
        self.failures = FailureHistory()
        self.missed = False  # it is held, and was said, that the goal cannot be kept
        self.let_go = False  # the user wants the run to go on without it
        self._on_miss = goal.on_miss
        self._drift = DriftTest()
        self._drift_of: tuple[Choice, int] | None = None
        self._seen: dict[tuple[Choice, int], Observation] = {}  # the newest of each in this era
        self._rounds = 0  # observed, in all
        self._rounds_here = 0  # observed since the last change
        self._tried_from: Choice | None = None  # where training was before this choice was tried
        self._left_s = 0.0  # as was forecast last
        self._beliefs_of: dict[tuple[Choice, int], Belief] = {}  # since the last observation
        self._tries: Counter[Choice] = Counter()  # in this era
        self._left_at: dict[Choice, int] = {}  # the round at which a choice was left

    # ---- rounds ----

    def round_is_over(self, steps: int, seconds: float, standing: Standing) -> bool:
        """Whether to end a round that has had so many steps in so many seconds, and now stands so."""
        if self._money_ends(standing):
            return True
        if steps < STEPS_MIN:
            return False
        new = not self._rounds_here
        usual_s = FIRST_PART * self.round_s if new else max(self.round_s, ROUND_PART_USUAL * self._left_s)
        if steps >= max(STEPS_MIN, self.round_steps * (0.5 if new else 1.0)) and seconds >= usual_s:
            return True
        return seconds >= self._most_s(standing)

    def _most_s(self, standing: Standing) -> float:
        """No round is longer, though its mean be less sure."""
        if self.let_go or self.missed:
            return math.inf
        goal, most = self.goal, math.inf
        if goal.deadline_s is not None:
            most = goal.deadline_s * _round_part(standing.elapsed_s / goal.deadline_s)
        if goal.budget_usd is not None:
            rate = max(self.optimizer.model.usd_per_s(self.choice), 1e-12)
            most = min(most, goal.budget_usd * _round_part(standing.spent_usd / goal.budget_usd) / rate)
        return most

    def _money_ends(self, standing: Standing) -> bool:
        """Whether what is left to do is more than the money allows, and one more round of the fewest steps would exceed it."""
        budget = self.goal.budget_usd
        if budget is None or self.let_go or not standing.left:
            return False
        belief = self._belief(self.choice, standing.left[0].global_batch_size)
        steps = min(STEPS_MIN, sum(phase.steps for phase in standing.left))
        seconds = steps * belief.quantile_s(CAREFUL)
        return standing.spent_usd + seconds * self.optimizer.model.usd_per_s(self.choice) > budget

    # ---- decisions ----

    def end_round(
        self, observation: Observation | None, standing: Standing, *, failures: int = 0, lost_s: float = 0.0
    ) -> Decision:
        """Learn from a round and decide. `observation`: None when it had too few steps that tell something.

        `failures`: workers lost since the last call, for which training stood still `lost_s` in all.
        """
        self.failures.add(failures, lost_s)
        if observation is not None and observation.choice != self.choice:  # a worker less, or another one by hand
            self._move(observation.choice)
        note = self._learn(observation) if observation is not None else ""
        if not standing.left:
            return Decision("keep", self.choice, self._forecast(self.choice, standing), "all is done")
        if self._money_ends(standing):
            reason = f"{self._money_text(standing)}, and the next round would exceed it"
            return Decision("stop", self.choice, self._forecast(self.choice, standing), reason, missed=not self.missed)
        prospects = self._prospects(standing)
        best = self._best(prospects)
        said = self._say_if_missed(best, prospects, standing)
        if said is not None and said.action != "keep":
            return said
        decision = self._next(standing, prospects, best)
        reason = "; ".join(part for part in (said.reason if said else "", note, decision.reason) if part)
        return Decision(decision.action, decision.choice, decision.forecast, reason, decision.kind, missed=said is not None)

    def answer(self, on_miss: str) -> None:
        """What the user wants after "ask": "stop", "continue" (without the goal) or "best-effort". Else ConfigError."""
        if on_miss not in ON_MISS or on_miss == "ask":
            raise ConfigError(f"the answer is one of stop, continue or best-effort, not {on_miss!r}")
        self._on_miss = on_miss
        if on_miss == "continue":
            self._let_go()

    def _goal(self) -> Goal:
        return Goal() if self.let_go else self.goal

    def _let_go(self) -> None:
        self.let_go = True
        self.optimizer.goal = Goal()  # the best trade, then

    # ---- learning ----

    def _learn(self, observation: Observation) -> str:
        """Give it to the optimizer; returns a sentence when the dynamics of training have changed."""
        key = observation.choice, observation.global_batch_size
        note = ""
        if key != self._drift_of:  # another batch size is a change that is known, and has a belief of its own
            self._drift, self._drift_of = DriftTest(), key
        before = self._seen.get(key)
        if before is not None:
            belief = self._belief(*key)
            shift = self._drift.take(observation.step_s, belief.mean_log, belief.std_log, observation.noise)
            ratio = observation.compute_s / before.compute_s if observation.compute_s > 0 < before.compute_s else 1.0
            if max(ratio, 1 / ratio) > COMPUTE_CHANGED and abs(math.log(observation.step_s / belief.median_s)) > 0.1:
                note = f"computing takes {ratio:.2f} times as long for a step as before"
            elif shift:
                note = f"steps have become {shift}: {observation.step_s:.3g} s instead of {belief.median_s:.3g} s"
        if note:
            self.optimizer.dynamics_changed()
            self._seen.clear()
            self._tries.clear()
            self._drift = DriftTest()
        self.optimizer.observe(observation)
        self._beliefs_of.clear()
        self._seen[key] = observation
        self._rounds += 1
        self._rounds_here += 1
        return note

    def _move(self, choice: Choice) -> None:
        self._left_at[self.choice] = self._rounds
        self.choice, self._rounds_here = choice, 0

    # ---- forecasts ----

    def _setbacks(self, standing: Standing, left_s: float) -> Setbacks:
        start_s = self.optimizer.model.switch_s(None, self.choice)
        return self.failures.to_come(standing.elapsed_s, left_s, start_s)

    def _beliefs(self, choice: Choice, standing: Standing) -> list[Belief]:
        return [self._belief(choice, phase.global_batch_size) for phase in standing.left]

    def _belief(self, choice: Choice, global_batch_size: int) -> Belief:
        key = choice, global_batch_size
        if key not in self._beliefs_of:
            self._beliefs_of[key] = self.optimizer.belief(choice, global_batch_size)
        return self._beliefs_of[key]

    def _forecast(self, choice: Choice, standing: Standing) -> Forecast:
        beliefs = self._beliefs(choice, standing)
        model = self.optimizer.model
        expected_s = sum(phase.steps * belief.median_s for phase, belief in zip(standing.left, beliefs, strict=True))
        switch_s = 0.0 if choice == self.choice else model.switch_s(self.choice, choice)
        setbacks = self._setbacks(standing, expected_s)
        return forecast(beliefs, standing, model.usd_per_s(choice), self.goal, switch_s, setbacks)

    def _prospects(self, standing: Standing) -> list[_Prospect]:
        """Of every choice that can work. Not on behalf of phases' quantiles: odds and medians are enough to compare."""
        optimizer, model = self.optimizer, self.optimizer.model
        batches = list({phase.global_batch_size for phase in standing.left})
        believed = {batch: optimizer.believed(optimizer.choices, batch) for batch in batches}
        found = []
        for i, choice in enumerate(optimizer.choices):
            beliefs = [
                Belief(float(believed[phase.global_batch_size][0][i]), float(believed[phase.global_batch_size][1][i]))
                for phase in standing.left
            ]
            seconds = sum(phase.steps * belief.median_s for phase, belief in zip(standing.left, beliefs, strict=True))
            switch_s = 0.0 if choice == self.choice else model.switch_s(self.choice, choice)
            setbacks = self._setbacks(standing, seconds)
            rate = model.usd_per_s(choice)
            left = TimeLeft(standing.left, beliefs, switch_s=switch_s, setbacks=setbacks, unforeseen=UNFORESEEN)
            seconds += switch_s + setbacks.expected * setbacks.each_s
            odds = left.below(limit_s(standing, rate, self._goal()))
            std_log = max(belief.std_log for belief in beliefs)
            found.append(_Prospect(choice, odds, standing.elapsed_s + seconds, standing.spent_usd + rate * seconds, std_log))
        return found

    def _best(self, prospects: Sequence[_Prospect]) -> _Prospect:
        """The one with which the goal is likeliest kept; of those that are as good as hopeless, what comes nearest to it."""
        best = max(prospects, key=lambda one: (one.odds, -self._excess(one)))
        return best if best.odds >= HOPELESS else min(prospects, key=self._excess)

    def _excess(self, one: _Prospect) -> float:
        """By which factor the goal is exceeded, the worse of time and money."""
        late = one.seconds / self.goal.deadline_s if self.goal.deadline_s is not None else 0.0
        return max(late, one.usd / self.goal.budget_usd if self.goal.budget_usd is not None else 0.0)

    # ---- goals that cannot be kept ----

    def _say_if_missed(self, best: _Prospect, prospects: Sequence[_Prospect], standing: Standing) -> Decision | None:
        """Said once, when it is known well enough: what is done then. None when there is nothing to say."""
        if self.let_go or (self.goal.deadline_s is None and self.goal.budget_usd is None):
            return None
        if self.missed:
            if best.odds > HOPEFUL:
                self.missed = False
            elif self._on_miss == "stop":  # the answer came after it was said
                return Decision("stop", self.choice, self._forecast(self.choice, standing), self._missed_text(best, standing))
            return None
        if max(one.odds for one in prospects) >= HOPELESS or not self._evidence(best, standing):
            return None
        self.missed = True
        action = {"stop": "stop", "ask": "ask"}.get(self._on_miss, "keep")
        if self._on_miss == "continue":
            self._let_go()
        found = self._forecast(best.choice, standing)
        return Decision(action, self.choice, found, self._missed_text(best, standing), missed=True)

    def _evidence(self, best: _Prospect, standing: Standing) -> bool:
        if limit_s(standing, self.optimizer.model.usd_per_s(best.choice), self.goal) <= 0:
            return True
        return self._rounds >= EVIDENCE_ROUNDS and best.std_log <= EVIDENCE_STD_LOG

    def _missed_text(self, best: _Prospect, standing: Standing) -> str:
        found, goal, texts = self._forecast(best.choice, standing), self.goal, []
        if goal.deadline_s is not None and found.seconds > goal.deadline_s:
            low, middle, high = (duration_text(s) for s in (found.seconds_low, found.seconds, found.seconds_high))
            texts.append(f"the deadline of {duration_text(goal.deadline_s)} cannot be met: {middle} ({low} to {high})")
        if goal.budget_usd is not None and found.usd > goal.budget_usd:
            low, middle, high = (usd_text(usd) for usd in (found.usd_low, found.usd, found.usd_high))
            texts.append(f"the budget of {usd_text(goal.budget_usd)} USD cannot be kept: {middle} USD ({low} to {high})")
        return f"{' and '.join(texts) or 'the goal cannot be kept'} with {self._name(best.choice)}"

    def _money_text(self, standing: Standing) -> str:
        assert self.goal.budget_usd is not None
        steps = sum(phase.steps for phase in standing.left)
        spent, budget = usd_text(standing.spent_usd), usd_text(self.goal.budget_usd)
        return f"{spent} USD of the budget of {budget} USD are spent with {steps:,} steps left to do"

    def _name(self, choice: Choice) -> str:
        workers = f"{choice.workers} worker{'s' * (choice.workers != 1)}"
        return workers if len(self.optimizer.space.memory_mb) == 1 else f"{workers} of {choice.memory_mb:,} MB"

    # ---- the next choice ----

    def _next(self, standing: Standing, prospects: Sequence[_Prospect], best: _Prospect) -> Decision:
        by_choice = {one.choice: one for one in prospects}
        here = self._forecast(self.choice, standing)
        self._left_s = here.seconds - standing.elapsed_s
        suggestion = self._suggest(standing)
        if not self.let_go and not self.missed and here.odds < AT_RISK:
            return self._rescue(standing, suggestion, by_choice, best, here)
        if suggestion.kind == "explore" and not self._is_to_be_tried(suggestion.choice, standing):
            suggestion = self._settle(prospects, standing)
        if suggestion.choice == self.choice or not self._is_worth_it(suggestion, here, standing):
            return Decision("keep", self.choice, here, self._keep_text(here))
        if suggestion.kind == "explore":
            self._tries[suggestion.choice] += 1
            self._tried_from = self._tried_from or self.choice
        else:
            self._tried_from = None
        return self._switch(suggestion.choice, standing, suggestion.reason, suggestion.kind)

    def _is_to_be_tried(self, choice: Choice, standing: Standing) -> bool:
        """Whether a round of it can tell something: what is uncertain beside its step time, no round does."""
        std_log = self._belief(choice, standing.left[0].global_batch_size).std_log
        return self._tries[choice] < TRIES_MAX and std_log > TRY_STD_LOG

    def _settle(self, prospects: Sequence[_Prospect], standing: Standing) -> Suggestion:
        """The best choice of those that surely keep the goal, if nothing more is tried."""
        goal = self._goal()

        def objective(one: _Prospect) -> float:
            if goal.deadline_s is not None:
                return one.usd
            return one.seconds if goal.budget_usd is not None else one.seconds * one.usd

        here = next((one for one in prospects if one.choice == self.choice), None)
        sure = [one for one in prospects if one.odds >= SURE]
        if here is None or not sure:
            return Suggestion(self.choice, "stay", 0.0, 0.0, "")
        to = min(sure, key=objective)
        reason = f"{self._name(to.choice)}: {duration_text(to.seconds)} and {usd_text(to.usd)} USD in all"
        return Suggestion(to.choice, "exploit", objective(here) - objective(to), 0.0, reason)

    def _rescue(
        self, standing: Standing, suggestion: Suggestion, by_choice: dict[Choice, _Prospect], best: _Prospect, here: Forecast
    ) -> Decision:
        """The goal is at risk: go where it is sure, or at least likeliest, to be kept."""
        suggested = by_choice.get(suggestion.choice)
        to = best
        if suggested is not None and suggested.odds >= min(SURE, best.odds - 0.01):
            to = suggested
        else:
            sure = [one for one in by_choice.values() if one.odds >= SURE]
            if sure:
                to = min(sure, key=lambda one: one.usd if self.goal.deadline_s is not None else one.seconds)
        if to.choice == self.choice or to.odds < here.odds + 0.01:
            return Decision("keep", self.choice, here, f"the goal is at risk, and no choice is surer: {self._keep_text(here)}")
        self._tried_from = None
        reason = f"the goal is at risk with {self._name(self.choice)} (odds {here.odds:.0%}): {self._name(to.choice)} keep it "
        return self._switch(to.choice, standing, reason + f"with odds of {to.odds:.0%}", "rescue")

    def _switch(self, to: Choice, standing: Standing, reason: str, kind: str) -> Decision:
        found = self._forecast(to, standing)
        self._move(to)
        return Decision("switch", to, found, reason, kind)

    def _suggest(self, standing: Standing) -> Suggestion:
        """The optimizer's, that counts on failures to come as if their time and money were gone already."""
        beliefs = self._beliefs(self.choice, standing)
        left_s = sum(phase.steps * belief.median_s for phase, belief in zip(standing.left, beliefs, strict=True))
        reserve_s = self._setbacks(standing, left_s).reserve_s(RESERVE_FROM)
        rate = self.optimizer.model.usd_per_s(self.choice)
        careful = Standing(standing.elapsed_s + reserve_s, standing.spent_usd + rate * reserve_s, standing.left)
        round_s = min(max(FIRST_PART * self.round_s, self.round_steps * 0.5 * beliefs[0].median_s), self._most_s(standing))
        return self.optimizer.suggest(self.choice, careful, round_s=round_s)

    def _is_worth_it(self, suggestion: Suggestion, here: Forecast, standing: Standing) -> bool:
        """Whether to follow it: not to and fro between choices that are nearly alike."""
        if suggestion.kind == "explore" or self.choice not in self.optimizer.index:
            return True
        if self._tried_from is not None:  # what was tried is over: back, or to what was learnt by it
            return True
        if self._rounds_here < ROUNDS_BETWEEN:
            return False
        whole = self._objective(here)
        left = whole - self._objective_so_far(standing, here)
        back = self._rounds - self._left_at.get(suggestion.choice, -ROUNDS_BACK) < ROUNDS_BACK
        return suggestion.gain > max(WORTH_IN_ALL * whole, (WORTH_GOING_BACK if back else WORTH_WHILE) * left)

    def _objective(self, found: Forecast) -> float:
        goal = self._goal()
        if goal.deadline_s is not None:
            return found.usd
        return found.seconds if goal.budget_usd is not None else found.seconds * found.usd

    def _objective_so_far(self, standing: Standing, here: Forecast) -> float:
        goal = self._goal()
        if goal.deadline_s is not None:
            return standing.spent_usd
        return standing.elapsed_s if goal.budget_usd is not None else standing.elapsed_s * standing.spent_usd

    def _keep_text(self, here: Forecast) -> str:
        goal = self._goal()
        text = f"{self._name(self.choice)}: {duration_text(here.seconds)} and {usd_text(here.usd)} USD in all"
        if goal.deadline_s is None and goal.budget_usd is None:
            return text
        return f"{text}, the goal kept with odds of {here.odds:.0%}"


def _round_part(gone: float) -> float:
    """The part of a deadline or a budget that a round may take when so much of it is gone."""
    if gone < EARLY_PART:
        return EARLY_ROUND_PART
    return max(ROUND_PART * (1 - gone), ROUND_PART_LEAST)


def first_choice(optimizer: PerformanceOptimizer, goal: Goal, standing: Standing, *, round_s: float = ROUND_S) -> Suggestion:
    """What to begin a run with: the optimizer's suggestion, with time and money kept back for a failure."""
    plain = optimizer.suggest(None, standing, round_s=FIRST_PART * round_s)
    start_s = optimizer.model.switch_s(None, plain.choice)
    setbacks = FailureHistory().to_come(0.0, 1.0, start_s)
    reserve_s = setbacks.reserve_s(RESERVE_FROM)
    usd = optimizer.model.usd_per_s(plain.choice) * reserve_s
    careful = Standing(standing.elapsed_s + reserve_s, standing.spent_usd + usd, standing.left)
    return optimizer.suggest(None, careful, round_s=FIRST_PART * round_s)
