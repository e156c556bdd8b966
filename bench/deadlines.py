"""Whether deadlines and budgets are kept: the controller and the optimizer at the wheel of simulated jobs.

    python -m bench.deadlines [--cases 400] [--jobs 2] [--seed 0]

A job's truth is an analytic model of its own whose parts are not those of the model that the optimizer begins with: compute,
communication and fixed costs are off by factors of exp(N(0, 0.3)), memory scales otherwise, and a smooth ripple of 8 % lies
over the grid of workers x memory. Steps scatter by 10 %; starts are cold; epochs end with an evaluation and a checkpoint; one
worker is lost at a random moment of the run and costs the time to notice it and a cold start. In every third case steps also
become slower or faster by up to a fifth behind a random step, and every round is a little off (AR(1), 2 %).

Feasible: one choice, started at once and kept, ends within 90 % of the deadline by the truth, without noise and failure, both
with the drift and without it (nobody can count on becoming faster). Infeasible: every one ends later than 110 % of it, with
the drift and without it (nobody can know of becoming slower). What lies between is not counted. A budget: likewise with money.

Bars: deadline met in at least 98 % of the feasible cases; of the infeasible ones at least 98 % said to be so within 10 % of the
deadline's time; a budget exceeded by more than the last round's cost in none.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.deadline_world import Job, World, draw_job
from smlt.client.optimizer.controller import Controller, first_choice
from smlt.client.optimizer.goals import Goal
from smlt.client.optimizer.optimizer import PerformanceOptimizer

#: Slack that makes a case feasible, or infeasible.
SLACK = 0.1
#: Of the cases, so many have a deadline, a budget, both.
KINDS = ("deadline", "deadline", "deadline", "budget", "both")


@dataclass(frozen=True)
class Outcome:
    """How a case ended. `tightness`: what the best takes (or costs) over what is allowed. `said_at`: part of the deadline (of
    the budget, without one) that was gone when it was said that the goal cannot be kept; None: never.
    """

    number: int
    kind: str
    feasible: bool
    drift: bool
    tightness: float
    done: bool
    kept: bool
    said_at: float | None
    excess_rounds: float  # by how many of the last round's cost the budget was exceeded
    seconds: float
    usd: float
    best_seconds: float
    best_usd: float
    rounds: int
    switches: int
    reasons: list[str] = field(default_factory=list)


def draw_goal(rng: np.random.Generator, kind: str, job: Job) -> tuple[Goal, bool, float]:
    """A goal for a job, whether it is feasible, and how tight it is. A third of the cases are at the edge."""
    feasible = bool(rng.random() < 0.65)
    edge = rng.random() < 1 / 3
    stretch = math.exp(rng.uniform(0, 0.08 if edge else math.log(4)))
    seconds, usd = job.totals(better=not feasible)
    # what the best takes over what is allowed: up to 0.9 when feasible, from 1.1 on when not
    tightness = (1 - SLACK) / stretch if feasible else (1 + SLACK) * min(stretch, 3.0)
    if kind == "deadline":
        return Goal(deadline_s=float(seconds.min() / tightness)), feasible, tightness
    if kind == "budget":
        return Goal(budget_usd=float(usd.min() / tightness)), feasible, tightness
    at = int(rng.choice(np.flatnonzero(job.efficient(seconds, usd))))  # a choice that no other one beats in both
    deadline_s, budget_usd = float(seconds[at] / tightness), float(usd[at] / tightness)
    goal = Goal(deadline_s=deadline_s, budget_usd=budget_usd)
    return goal, feasible, float(np.maximum(seconds / deadline_s, usd / budget_usd).min())


def run_case(number: int, seed: int, *, tell: bool = False) -> Outcome | None:
    """One case, from start to end; None when it is neither feasible nor infeasible."""
    rng = np.random.default_rng((seed, number))
    kind = KINDS[number % len(KINDS)]
    job = draw_job(rng, drift=(number // len(KINDS)) % 3 == 2)
    goal, feasible, tightness = draw_goal(rng, kind, job)
    if (tightness > 1 - SLACK + 1e-9) if feasible else (tightness < 1 + SLACK - 1e-9):
        return None
    optimizer = PerformanceOptimizer(job.space, job.model, goal, seed=number)
    world = World(job, rng)
    begun = first_choice(optimizer, goal, world.standing())
    if goal.budget_usd is None and not feasible:
        goal = replace(goal, on_miss="stop")  # what it would do then is of no interest here
    controller = Controller(optimizer, goal, begun.choice)
    world.switch(begun.choice)
    said_at, rounds, switches, reasons, done = None, 0, 0, list[str](), True
    if tell:
        print(goal, f"tightness {tightness:.3f}", begun.reason)
    while world.standing().left:
        before = world.spent_usd
        observation, failures, lost_s = world.round(controller.round_is_over)
        last_round_usd = world.spent_usd - before
        rounds += 1
        standing = world.standing()
        if not standing.left:
            break
        decision = controller.end_round(observation, standing, failures=failures, lost_s=lost_s)
        if decision.missed and said_at is None:
            gone = standing.spent_usd / goal.budget_usd if goal.budget_usd is not None else 0.0
            said_at = standing.elapsed_s / goal.deadline_s if goal.deadline_s is not None else gone
            reasons.append(decision.reason)
        if tell:
            print(
                f"{standing.elapsed_s:8.0f} s {standing.spent_usd:8.4f} USD",
                f"{decision.action:6} {decision.choice} {decision.reason}",
            )
        if decision.action == "stop":
            done = False
            break
        if decision.action == "switch":
            switches += 1
            world.switch(decision.choice)
    in_time = goal.deadline_s is None or world.elapsed_s <= goal.deadline_s
    over = world.spent_usd - goal.budget_usd if goal.budget_usd is not None else 0.0
    best_seconds, best_usd = job.best(goal)
    return Outcome(
        number,
        kind,
        feasible,
        job.drift != 1.0,
        tightness,
        done,
        done and in_time and over <= 0,
        said_at,
        max(0.0, over) / last_round_usd,
        world.elapsed_s,
        world.spent_usd,
        best_seconds,
        best_usd,
        rounds,
        switches,
        reasons,
    )


def part(hits: list[bool]) -> str:
    return f"{sum(hits):4d} of {len(hits):4d} ({sum(hits) / len(hits):6.1%})" if hits else "   none"


def show(outcomes: list[Outcome]) -> None:
    """Print the tables."""
    feasible = [one for one in outcomes if one.feasible]
    late = [one for one in outcomes if not one.feasible]
    print("feasible goals kept")
    for name, some in groups(feasible):
        print(f"  {name:34} {part([one.kept for one in some])}")
    print("infeasible ones said to be so within 10 % of the deadline's time (or of the budget)")
    for name, some in groups(late):
        print(f"  {name:34} {part([one.said_at is not None and one.said_at <= 0.1 for one in some])}", end="")
        said = [one.said_at for one in some if one.said_at is not None]
        print(f"   said at {np.median(said):.1%} (median), {max(said):.1%} (latest)" if said else "")
    false = [one.said_at is not None for one in feasible]
    print(f"false alarms, of the feasible ones     {part(false)}")
    print(f"  and the goal was kept after all      {part([one.kept for one in feasible if one.said_at is not None])}")
    with_budget = [one for one in outcomes if one.kind != "deadline"]
    excess = [one.excess_rounds for one in with_budget]
    print(f"budget not exceeded by more than the last round's cost  {part([one <= 1 for one in excess])}")
    print(f"  not exceeded at all                                   {part([one <= 0 for one in excess])}")
    for kind, name in (("deadline", "cost"), ("budget", "time")):
        kept = [one for one in feasible if one.kind == kind and one.kept]
        ratios = [one.usd / one.best_usd if name == "cost" else one.seconds / one.best_seconds for one in kept]
        if ratios:
            quantiles = ", ".join(f"{np.quantile(ratios, q):.2f}" for q in (0.5, 0.9, 0.95))
            print(f"{name} of kept {kind}s over the exhaustive best's: {quantiles} (median, 90 %, 95 %)")
    print(
        f"rounds {np.mean([one.rounds for one in outcomes]):.0f}, changes {np.mean([one.switches for one in outcomes]):.1f} "
        f"a case (mean); most changes {max(one.switches for one in outcomes)}"
    )


def groups(outcomes: list[Outcome]) -> list[tuple[str, list[Outcome]]]:
    made = [("deadline", [one for one in outcomes if one.kind == "deadline"])]
    made += [
        (f"  {name}", [one for one in made[0][1] if one.drift == drift]) for name, drift in (("steady", 0), ("drifting", 1))
    ]
    tight = [one for one in made[0][1] if 0.83 < one.tightness < 1.2]
    return [*made, ("  at the edge", tight)] + [(k, [one for one in outcomes if one.kind == k]) for k in ("budget", "both")]


def _case(arguments: tuple[int, int]) -> Outcome | None:
    return run_case(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="show the decisions of this one")
    parser.add_argument("--json", type=Path, help="write every outcome there")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(run_case(arguments.case, arguments.seed, tell=True))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the children: their matrices are small
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with mp.get_context("spawn").Pool(arguments.jobs) as pool:
        found = pool.map(_case, [(number, arguments.seed) for number in range(arguments.cases)], chunksize=4)
    outcomes = [one for one in found if one is not None]
    print(f"{arguments.cases} cases, seed {arguments.seed}; {len(found) - len(outcomes)} neither feasible nor infeasible")
    show(outcomes)
    bad = Counter(one.kind for one in outcomes if one.feasible and not one.kept)
    print("not kept:", dict(bad), [one.number for one in outcomes if one.feasible and not one.kept])
    print(
        "said late:",
        [one.number for one in outcomes if not one.feasible and not (one.said_at is not None and one.said_at <= 0.1)],
    )
    if arguments.json:
        rows: list[dict[str, Any]] = [asdict(one) for one in outcomes]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
