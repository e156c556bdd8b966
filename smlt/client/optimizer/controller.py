"""At the end of each round of training: what was learnt, whether the goal will be kept, and what to do next.

Pure: time and money come in as a `Standing`. docs/goals.md says what is promised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from smlt.client.optimizer.drift import DriftTest
from smlt.client.optimizer.forecast import NOTICED_S, FailureHistory, Setbacks, forecast, limit_s
from smlt.client.optimizer.goals import ON_MISS, Forecast, Goal, Standing, check_goal, duration_text, usd_text
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.optimizer import Belief, PerformanceOptimizer, Suggestion
from smlt.client.optimizer.prospects import HOPELESS, SURE, Prospect, likeliest, objective, prospects_of
from smlt.client.optimizer.rounds import ROUND_S, ROUND_STEPS, STEPS_MIN, RoundLength, longest_s
from smlt.client.optimizer.space import Choice
from smlt.errors import ConfigError

#: Below the first odds the goal is at risk, and what is sure is taken without regard to its price. Where nothing is, a choice
#: is tried whose odds, with luck, are better than the best by the second.
AT_RISK, WITH_LUCK = 0.9, 0.2
#: A goal that cannot be kept is said to be so after that many rounds; with these odds it can again.
EVIDENCE_ROUNDS, HOPEFUL = 2, 0.5
#: When a choice is made, as many failures as are expected are counted on, and one as long as it is likelier than this; and that
#: they take longer than was thought, by the second factor.
RESERVE_FROM, RESERVE_FACTOR = 0.004, 1.3
#: A choice is tried for so many rounds, as long as its step time is not known this well: then it is, or trying does not tell.
#: And it is asked for at most so often, should it not be had.
TRIES_MAX, TRY_STD_LOG, ASKED_MAX = 2, 0.02, 4
#: While the goal is at risk, so many trials in all: each costs time.
TRIES_AT_RISK_MAX = 4
#: A change for the sake of money or time saves at least this part of what is left to pay or wait for; a change back, soon
#: after, the second.
WORTH_WHILE, WORTH_GOING_BACK = 0.01, 0.04
#: And at least this part of all that the run takes or costs: at its end there is nothing to be gained.
WORTH_IN_ALL = 0.005
#: Out of reach of the goal, what comes nearer to it by this part is changed to.
STRIVE = 0.02
#: Rounds of a choice before it is left for a better one. Trying one, and coming back from it, does not wait.
ROUNDS_BETWEEN, ROUNDS_BACK = 2, 6
#: Quantile of step time by which the money of a round is reckoned.
CAREFUL = 0.95
#: What computing takes for a step is known better than the step: when it changes by this factor at the same batch, and the step
#: by the second part, it is another model that is trained.
COMPUTE_CHANGED, STEP_CHANGED = 1.2, 0.1


@dataclass(frozen=True)
class Decision:
    """What to do next. `action`: "keep", "switch" (to `choice`), "stop" (at a checkpoint), "ask" (the user, then `answer`).

    `forecast`: with `choice`, from here to the end; with what comes nearest to the goal when it is said that it cannot be kept.
    `reason`: one sentence for people. `kind`: the optimizer's "explore", "exploit" or "stay", or "rescue" when the goal was at
    risk. `missed`: this is where it is said that the goal cannot be kept.
    """

    action: str
    choice: Choice
    forecast: Forecast
    reason: str
    kind: str = "stay"
    missed: bool = False


class Controller:
    """Keeps one run's goal. `round_is_over` says when to ask it, `end_round` what to do.

    `start`: the choice that training begins with. `round_s`, `round_steps`: a round's usual length and fewest steps; near a
    deadline, at the end of the money and at the beginning rounds are shorter (rounds.py). `noticed_s`: until a lost worker is.

    Raises ConfigError for a goal, or rounds, that make no sense.
    """

    def __init__(
        self,
        optimizer: PerformanceOptimizer,
        goal: Goal,
        start: Choice,
        *,
        round_s: float = ROUND_S,
        round_steps: int = ROUND_STEPS,
        noticed_s: float = NOTICED_S,
    ) -> None:
        check_goal(goal)
        self.optimizer, self.goal, self.choice = optimizer, goal, start
        self.round_length = RoundLength(round_s, round_steps)
        self.failures = FailureHistory(noticed_s)
        self.missed = False  # it is held, and was said, that the goal cannot be kept
        self.let_go = False  # the user wants the run to go on without it
        self._on_miss = goal.on_miss
        self._drift = DriftTest()
        self._drift_of: tuple[Choice, int] | None = None
        self._seen: dict[tuple[Choice, int], Observation] = {}  # the newest of each in this era
        self._beliefs_of: dict[tuple[Choice, int], Belief] = {}  # since the last observation
        self._rounds = 0  # observed, in all
        self._rounds_here = 0  # observed since the last change
        self._rounds_of: Counter[Choice] = Counter()  # observed in this era
        self._asked_for: Counter[Choice] = Counter()  # to be tried, in this era
        self._tried_from: Choice | None = None  # where training was before this choice was tried
        self._left_at: dict[Choice, int] = {}  # the round at which a choice was left
        self._left_s = 0.0  # as was forecast last

    def round_is_over(self, steps: int, seconds: float, standing: Standing) -> bool:
        """Whether to end a round that has had so many steps in so many seconds, and now stands so."""
        first, most_s = not self._rounds_here, self._longest_s(standing)
        return self._money_ends(standing) or self.round_length.is_over(
            steps, seconds, first=first, left_s=self._left_s, most_s=most_s
        )

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
        here = self._forecast(self.choice, standing)
        self._left_s = here.seconds - standing.elapsed_s
        if not standing.left:
            return Decision("keep", self.choice, here, "all is done")
        if self._money_ends(standing):
            return Decision("stop", self.choice, here, self._money_text(standing), missed=not self.missed)
        goal = Goal() if self.let_go else self.goal
        prospects = prospects_of(self.optimizer, goal, self.choice, standing, lambda left_s: self._setbacks(standing, left_s))
        said = self._say_if_missed(prospects, standing, here)
        if said is not None and said.action != "keep":
            return said
        decision = self._next(standing, prospects, here)
        reason = "; ".join(part for part in (said.reason if said else "", note, decision.reason) if part)
        return replace(decision, reason=reason, missed=said is not None)

    def answer(self, on_miss: str) -> None:
        """What the user wants after "ask": "stop", "continue" (without the goal) or "best-effort". Else ConfigError."""
        if on_miss not in ON_MISS or on_miss == "ask":
            raise ConfigError(f"the answer is one of stop, continue or best-effort, not {on_miss!r}")
        self._on_miss = on_miss
        if on_miss == "continue":
            self._let_go()

    def _let_go(self) -> None:
        self.let_go = True
        self.optimizer.goal = Goal()  # the best trade, then

    # ---- learning ----

    def _learn(self, observation: Observation) -> str:
        """Give it to the optimizer; returns a sentence when the dynamics of training have changed."""
        key = observation.choice, observation.global_batch_size
        if key != self._drift_of:  # another batch size is a change that is known, and has a belief of its own
            self._drift, self._drift_of = DriftTest(), key
        note = self._change(key, observation)
        if note:
            self.optimizer.dynamics_changed()
            for known in (self._seen, self._rounds_of, self._asked_for):
                known.clear()
            self._drift = DriftTest()
        self.optimizer.observe(observation)
        self._beliefs_of.clear()
        self._seen[key] = observation
        self._rounds_of[observation.choice] += 1
        self._rounds += 1
        self._rounds_here += 1
        return note

    def _change(self, key: tuple[Choice, int], observation: Observation) -> str:
        """How steps differ from those of the same choice and batch before; "" when they do not."""
        before = self._seen.get(key)
        if before is None:
            return ""
        belief = self._belief(*key)
        shift = self._drift.take(observation.step_s, belief.mean_log, belief.std_log, observation.noise)
        if observation.compute_s > 0 < before.compute_s:
            ratio = observation.compute_s / before.compute_s
            off = abs(math.log(observation.step_s) - belief.mean_log)
            if max(ratio, 1 / ratio) > COMPUTE_CHANGED and off > STEP_CHANGED:
                return f"computing takes {ratio:.2f} times as long for a step as before"
        return f"steps have become {shift}: {observation.step_s:.3g} s instead of {belief.median_s:.3g} s" if shift else ""

    def _move(self, choice: Choice) -> None:
        self._left_at[self.choice] = self._rounds
        self.choice, self._rounds_here = choice, 0

    # ---- forecasts ----

    def _belief(self, choice: Choice, global_batch_size: int) -> Belief:
        key = choice, global_batch_size
        if key not in self._beliefs_of:
            self._beliefs_of[key] = self.optimizer.belief(choice, global_batch_size)
        return self._beliefs_of[key]

    def _setbacks(self, standing: Standing, left_s: float) -> Setbacks:
        start_s = self.optimizer.model.switch_s(None, self.choice)
        return self.failures.to_come(standing.elapsed_s, left_s, start_s)

    def _steps_s(self, choice: Choice, standing: Standing) -> float:
        return sum(phase.steps * self._belief(choice, phase.global_batch_size).median_s for phase in standing.left)

    def _forecast(self, choice: Choice, standing: Standing) -> Forecast:
        model = self.optimizer.model
        beliefs = [self._belief(choice, phase.global_batch_size) for phase in standing.left]
        switch_s = 0.0 if choice == self.choice else model.switch_s(self.choice, choice)
        setbacks = self._setbacks(standing, self._steps_s(choice, standing))
        return forecast(beliefs, standing, model.usd_per_s(choice), self.goal, switch_s, setbacks)

    def _longest_s(self, standing: Standing) -> float:
        if self.let_go or self.missed:
            return math.inf
        return longest_s(self.goal, standing, self.optimizer.model.usd_per_s(self.choice))

    def _money_ends(self, standing: Standing) -> bool:
        """Whether there is more to do, and a round of the fewest steps would exceed the budget."""
        if self.goal.budget_usd is None or self.let_go or self._on_miss == "continue" or not standing.left:
            return False
        steps = min(STEPS_MIN, sum(phase.steps for phase in standing.left))
        seconds = steps * self._belief(self.choice, standing.left[0].global_batch_size).quantile_s(CAREFUL)
        return standing.spent_usd + seconds * self.optimizer.model.usd_per_s(self.choice) > self.goal.budget_usd

    # ---- goals that cannot be kept ----

    def _say_if_missed(self, prospects: Sequence[Prospect], standing: Standing, here: Forecast) -> Decision | None:
        """Said once, when it is known well enough: what is done then. None when there is nothing to say."""
        if self.let_go or (self.goal.deadline_s is None and self.goal.budget_usd is None):
            return None
        best = likeliest(prospects, self.goal)
        if self.missed:
            if best.odds > HOPEFUL:
                self.missed = False
            elif self._on_miss == "stop":  # the answer came after it was said
                return Decision("stop", self.choice, here, self._missed_text(self._forecast(best.choice, standing), best))
            return None
        too_late = limit_s(standing, min(self.optimizer.usd_per_s), self.goal) <= 0
        if not too_late and (self._rounds < EVIDENCE_ROUNDS or max(one.not_excluded for one in prospects) >= HOPELESS):
            return None
        self.missed = True
        action = {"stop": "stop", "ask": "ask"}.get(self._on_miss, "keep")
        found = self._forecast(best.choice, standing)
        if self._on_miss == "continue":
            self._let_go()
        return Decision(action, self.choice, found, self._missed_text(found, best), missed=True)

    def _missed_text(self, found: Forecast, best: Prospect) -> str:
        goal, texts = self.goal, []
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
        return f"{spent} USD of the budget of {budget} USD are spent with {steps:,} steps left to do; more would exceed it"

    # ---- the next choice ----

    def _next(self, standing: Standing, prospects: Sequence[Prospect], here: Forecast) -> Decision:
        suggestion = self._suggest(standing)
        best = likeliest(prospects, self.goal)
        if not self.let_go and (self.missed or best.odds < HOPELESS):
            return self._strive(standing, prospects, best, here)
        if not self.let_go and here.odds < AT_RISK:
            return self._rescue(standing, prospects, suggestion, here)
        if suggestion.kind == "explore" and not self._is_to_be_tried(suggestion.choice, standing):
            suggestion = self._settle(prospects)
        if suggestion.choice == self.choice or not self._is_worth_it(suggestion, here, standing):
            return Decision("keep", self.choice, here, self._text(self.choice, here))
        return self._switch(suggestion.choice, standing, suggestion.reason, suggestion.kind)

    def _suggest(self, standing: Standing) -> Suggestion:
        """The optimizer's, that counts on failures to come as if their time and money were gone already."""
        reserve_s = self._setbacks(standing, self._steps_s(self.choice, standing)).reserve_s(RESERVE_FROM)
        careful = _held_back(standing, RESERVE_FACTOR * reserve_s, self.optimizer.model.usd_per_s(self.choice))
        step_s = self._belief(self.choice, standing.left[0].global_batch_size).median_s
        round_s = min(self.round_length.trial_s(step_s), self._longest_s(standing))
        return self.optimizer.suggest(self.choice, careful, round_s=round_s)

    def _is_to_be_tried(self, choice: Choice, standing: Standing) -> bool:
        """Whether a round of it can tell something: what is uncertain beside its step time, no round does."""
        std_log = self._belief(choice, standing.left[0].global_batch_size).std_log
        return std_log > TRY_STD_LOG and self._rounds_of[choice] < TRIES_MAX and self._asked_for[choice] < ASKED_MAX

    def _settle(self, prospects: Sequence[Prospect]) -> Suggestion:
        """The best choice of those that surely keep the goal, if nothing more is tried."""
        goal = Goal() if self.let_go else self.goal
        here = next((one for one in prospects if one.choice == self.choice), None)
        sure = [one for one in prospects if one.odds >= SURE]
        if here is None or not sure:
            return Suggestion(self.choice, "stay", 0.0, 0.0, "")
        to = min(sure, key=lambda one: objective(goal, one.seconds, one.usd))
        gain = objective(goal, here.seconds, here.usd) - objective(goal, to.seconds, to.usd)
        return Suggestion(to.choice, "exploit", gain, 0.0, self._text(to.choice, to))

    def _rescue(self, standing: Standing, prospects: Sequence[Prospect], suggestion: Suggestion, here: Forecast) -> Decision:
        """The goal is at risk: go where it is sure, or at least likeliest, to be kept."""
        to = likeliest(prospects, self.goal)
        suggested = next((one for one in prospects if one.choice == suggestion.choice), None)
        sure = [one for one in prospects if one.odds >= SURE]
        if suggested is not None and suggested.odds >= min(SURE, to.odds - 0.01):
            to = suggested
        elif sure:
            to = min(sure, key=lambda one: objective(self.goal, one.seconds, one.usd))
        if to.odds < AT_RISK and (luck := self._with_luck(standing, prospects, to)) is not None:
            text = (
                f"the goal is at risk with every choice (odds {to.odds:.0%} at most): {self._name(luck.choice)} may be faster"
            )
            return self._switch(luck.choice, standing, text, "explore")
        if to.choice == self.choice or to.odds < here.odds + 0.01:
            text = f"the goal is at risk, and no choice is surer: {self._text(self.choice, here)}"
            return Decision("keep", self.choice, here, text)
        text = f"the goal is at risk with {self._name(self.choice)} (odds {here.odds:.0%}): {self._name(to.choice)} keep it "
        return self._switch(to.choice, standing, f"{text}with odds of {to.odds:.0%}", "rescue")

    def _with_luck(self, standing: Standing, prospects: Sequence[Prospect], best: Prospect) -> Prospect | None:
        """What to try when no choice is sure to keep the goal, as far as is known."""
        if self._asked_for.total() >= TRIES_AT_RISK_MAX:
            return None
        able = [one for one in prospects if one.choice != self.choice and self._is_to_be_tried(one.choice, standing)]
        luck = max(able, key=lambda one: one.hoped, default=None)
        return luck if luck is not None and luck.hoped > best.odds + WITH_LUCK else None

    def _strive(self, standing: Standing, prospects: Sequence[Prospect], best: Prospect, here: Forecast) -> Decision:
        """Out of reach, by all that is known: go where the least is known, or where the goal is exceeded by the least."""
        possible = max(prospects, key=lambda one: one.not_excluded)
        if not self.missed and possible.not_excluded >= HOPELESS and possible.choice != self.choice:
            if self._is_to_be_tried(possible.choice, standing):
                text = f"{self._name(possible.choice)} may yet keep the goal"
                return self._switch(possible.choice, standing, text, "explore")
        elif best.choice != self.choice:
            at = next((one for one in prospects if one.choice == self.choice), None)
            if at is None or best.excess(self.goal) < (1 - STRIVE) * at.excess(self.goal):
                text = f"{self._name(best.choice)} come nearest to the goal"
                return self._switch(best.choice, standing, text, "exploit")
        return Decision("keep", self.choice, here, self._text(self.choice, here))

    def _switch(self, to: Choice, standing: Standing, reason: str, kind: str) -> Decision:
        if kind == "explore":
            self._asked_for[to] += 1
            self._tried_from = self._tried_from or self.choice
        else:
            self._tried_from = None
        found = self._forecast(to, standing)
        self._move(to)
        return Decision("switch", to, found, reason, kind)

    def _is_worth_it(self, suggestion: Suggestion, here: Forecast, standing: Standing) -> bool:
        """Whether to follow it: not to and fro between choices that are nearly alike."""
        if self.choice not in self.optimizer.index:
            return True
        goal = Goal() if self.let_go else self.goal
        whole = objective(goal, here.seconds, here.usd)
        if suggestion.kind == "explore":
            return suggestion.gain > WORTH_IN_ALL * whole
        if self._tried_from is not None:  # what was tried is over: back, or to what was learnt by it
            return True
        if self._rounds_here < ROUNDS_BETWEEN:
            return False
        left = whole - objective(goal, standing.elapsed_s, standing.spent_usd)
        back = self._rounds - self._left_at.get(suggestion.choice, -ROUNDS_BACK) < ROUNDS_BACK
        return suggestion.gain > max(WORTH_IN_ALL * whole, (WORTH_GOING_BACK if back else WORTH_WHILE) * left)

    # ---- in words ----

    def _name(self, choice: Choice) -> str:
        workers = f"{choice.workers} worker{'s' * (choice.workers != 1)}"
        return workers if len(self.optimizer.space.memory_mb) == 1 else f"{workers} of {choice.memory_mb:,} MB"

    def _text(self, choice: Choice, found: Forecast | Prospect) -> str:
        text = f"{self._name(choice)}: {duration_text(found.seconds)} and {self.optimizer.cost_text(found.usd)} in all"
        if self.let_go or (self.goal.deadline_s is None and self.goal.budget_usd is None):
            return text
        return f"{text}, the goal kept with odds of {found.odds:.0%}"


def first_choice(
    optimizer: PerformanceOptimizer,
    goal: Goal,
    standing: Standing,
    *,
    round_s: float = ROUND_S,
    noticed_s: float = NOTICED_S,
) -> Suggestion:
    """What to begin a run with: the optimizer's suggestion, with time and money kept back for a failure.

    ConfigError for a goal that makes no sense.
    """
    check_goal(goal)
    trial_s = RoundLength(round_s).trial_s(0.0)
    plain = optimizer.suggest(None, standing, round_s=trial_s)
    setbacks = FailureHistory(noticed_s).to_come(0.0, 1.0, optimizer.model.switch_s(None, plain.choice))
    careful = _held_back(standing, RESERVE_FACTOR * setbacks.reserve_s(RESERVE_FROM), optimizer.model.usd_per_s(plain.choice))
    prospects = prospects_of(optimizer, goal, None, standing, lambda left_s: setbacks)
    best = likeliest(prospects, goal)
    if goal.budget_usd is not None and best.odds < HOPEFUL:  # the fastest would use up the money before anything is learnt
        reason = f"{best.choice} come nearest to the goal, kept with odds of {best.odds:.0%}"
        return Suggestion(best.choice, "exploit", 0.0, 0.0, reason)
    return optimizer.suggest(None, careful, round_s=trial_s)


def _held_back(standing: Standing, reserve_s: float, usd_per_s: float) -> Standing:
    """As if so much time, and its money, were gone already."""
    return Standing(standing.elapsed_s + reserve_s, standing.spent_usd + reserve_s * usd_per_s, standing.left)
