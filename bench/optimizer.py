"""How good the Performance Optimizer's choices are, and what finding them costs.

    python -m bench.optimizer curves [FILE ...] [--seeds 100]      # published curves, and the authors' recipe beside it
    python -m bench.optimizer jobs [--cases 200] [--only NAME ...]   # simulated jobs, from first step to last
    python -m bench.optimizer speed                                   # a decision's time

`--json FILE` writes what is printed, and each row. The curves in bench/data/ are the objective (training speed for its cost)
that the authors of SMLT published for 10, 11, 12, ... workers (arXiv:2205.01853); their optimizer spends 2 random and 3 guided
evaluations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.optimizer_cases import Case, Flat, Run, World, draw
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.optimizer import PerformanceOptimizer
from smlt.client.optimizer.priors import WITH_MODEL, WITHOUT_MODEL, HyperPriors
from smlt.client.optimizer.replay import Table, load_table, replay
from smlt.client.optimizer.space import Choice

DATA = Path(__file__).parent / "data"
EVALUATIONS, WITHIN = 5, 0.01
#: A round's length, and that of the first round of a choice; with much left to do it is this part of it. As the controller's.
ROUND_S, FIRST_S, ROUND_PART = 60.0, 15.0, 0.02
RANDOM_TRIALS = 5


# ---- published curves ----


def authors_recipe(table: Table, seed: int) -> list[Choice]:
    """2 random evaluations and 3 by upper confidence bound with kappa = 5, bayesian-optimization as it comes."""
    from bayes_opt import BayesianOptimization
    from bayes_opt.acquisition import UpperConfidenceBound

    workers, memory_mb = table.space.workers, table.space.memory_mb[0]
    tried: list[Choice] = []

    def objective(n: float) -> float:
        tried.append(Choice(round(n), memory_mb))
        return 1 / table.step_s[tried[-1]]

    search = BayesianOptimization(
        objective, {"n": (workers[0], workers[-1])}, UpperConfidenceBound(kappa=5), random_state=seed, verbose=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search.maximize(init_points=2, n_iter=EVALUATIONS - 2)
    return tried


def ours(table: Table, seed: int) -> list[Choice]:
    return [row.choice for row in replay(table, seed=seed, evaluations=EVALUATIONS).evaluations]


def curves(paths: Sequence[Path], seeds: int, first: int) -> list[dict[str, Any]]:
    """A row for each curve and optimizer: how often the best row evaluated is within 1 % of the table's best."""
    rows = []
    for table in map(load_table, paths):
        best = min(table.step_s.values())
        for name, optimize in (("smlt", ours), ("2 random + 3 UCB, kappa 5", authors_recipe)):
            tried = [optimize(table, seed) for seed in range(first, first + seeds)]
            found = [best / min(table.step_s[choice] for choice in each) for each in tried]
            rows.append({
                "curve": table.name,
                "best_workers": min(table.step_s, key=lambda choice: table.step_s[choice]).workers,
                "optimizer": name,
                "seeds": seeds,
                "within_1_percent": sum(value >= 1 - WITHIN for value in found),
                "evaluations_mean": statistics.mean(map(len, tried)),
                "evaluations_max": max(map(len, tried)),
                "worst": min(found),
            })  # fmt: skip
    return rows


# ---- simulated jobs ----


def guided(model: Callable[[Case], World], hyper: HyperPriors) -> Callable[[Case], Run]:
    """Train a case to its end as the optimizer says, round by round."""

    def train(case: Case) -> Run:
        run, batch = Run(case), case.phase.global_batch_size
        optimizer = PerformanceOptimizer(case.space, model(case), case.goal, seed=case.seed, hyper=hyper)
        seen: set[Choice] = set()
        while run.left:
            choice = optimizer.suggest(run.current, run.standing, round_s=FIRST_S).choice
            left_s = run.left * optimizer.belief(choice, batch).median_s
            mean_s, steps, error = run.train(choice, max(ROUND_S, ROUND_PART * left_s) if choice in seen else FIRST_S)
            seen.add(choice)
            optimizer.observe(Observation(choice, mean_s, steps, batch, noise=error))
        return run

    return train


def random_search(case: Case) -> Run:
    """A first round of each of five choices drawn at random, then the best of them to the end."""
    run, rng = Run(case), np.random.default_rng(case.seed)
    possible = [choice for choice in case.space if not case.world.why_not(choice)]
    found: list[tuple[bool, float, Choice]] = []
    for index in rng.choice(len(possible), RANDOM_TRIALS, replace=False):
        choice = possible[index]
        step_s, _, _ = run.train(choice, FIRST_S)
        seconds = run.left * step_s
        usd = seconds * case.world.usd_per_s(choice)
        found.append((not case.kept(run.seconds + seconds, run.usd + usd), case.value(seconds, usd), choice))
        if not run.left:
            return run
    run.train(min(found)[2], float("inf"))
    return run


def fixed(case: Case) -> Run:
    """16 workers with two vCPUs, whatever the job."""
    run = Run(case)
    run.train(Choice(16, 3538), float("inf"))
    return run


def as_told(case: Case) -> Run:
    """What the cost model says is best, and never another look."""
    run = Run(case)
    optimizer = PerformanceOptimizer(case.space, case.told, case.goal, seed=case.seed)
    run.train(optimizer.suggest(None, run.standing, round_s=FIRST_S).choice, float("inf"))
    return run


WAYS: dict[str, Callable[[Case], Run]] = {
    "smlt": guided(lambda case: case.told, WITH_MODEL),
    "without prior": guided(lambda case: Flat(case.told.physics), WITHOUT_MODEL),
    "cost model only": as_told,
    "random search": random_search,
    "fixed choice": fixed,
}


def jobs(cases: int, only: Sequence[str], first: int) -> list[dict[str, Any]]:
    """A row for each case and way: cost in all over that of the exhaustive best, both from the first start to the end."""
    rows = []
    for seed in range(first, first + cases):
        case = draw(seed)
        for name, way in WAYS.items():
            if only and name not in only:
                continue
            run = way(case)
            rows.append({
                "case": seed,
                "goal": case.kind,
                "way": name,
                "ratio": case.value(run.seconds, run.usd) / case.best_value,
                "kept": case.kept(run.seconds, run.usd),
                "switches": run.switches,
                "seconds": run.seconds,
                "usd": run.usd,
                "best": str(case.best),
                "last": str(run.current),
            })  # fmt: skip
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians and 95th percentiles. A ratio of a job that has missed its goal is cheaply had: see the share kept."""
    found = []
    for way in dict.fromkeys(row["way"] for row in rows):
        for goal in ("all", "deadline", "budget", "trade"):
            these = [row for row in rows if row["way"] == way and goal in ("all", row["goal"])]
            if these:
                ratios = [row["ratio"] for row in these]
                found.append({
                    "way": way,
                    "goal": goal,
                    "cases": len(these),
                    "median": float(np.median(ratios)),
                    "p95": float(np.quantile(ratios, 0.95)),
                    "worst": max(ratios),
                    "kept": sum(row["kept"] for row in these) / len(these),
                    "switches_median": float(np.median([row["switches"] for row in these])),
                })  # fmt: skip
    return found


# ---- a decision's time ----


def speed(repeats: int = 30) -> list[dict[str, Any]]:
    """Observing and suggesting on grids of several sizes, with so many choices observed, in ms."""
    rows = []
    case = draw(1)
    for workers, sizes in ((25, 20), (100, 20), (200, 20)):
        space = type(case.space)(tuple(range(1, workers + 1)), tuple(1769 + 400 * i for i in range(sizes)))
        optimizer = PerformanceOptimizer(space, case.told, case.goal)
        choices = list(space)[:: len(space) // 15]
        times = []
        for i in range(repeats):
            choice = choices[i % len(choices)]
            began = time.perf_counter()
            optimizer.observe(Observation(choice, case.world.step_s(choice, 512), 100, 512))
            optimizer.suggest(choice, Run(case).standing, round_s=FIRST_S)
            times.append(1e3 * (time.perf_counter() - began))
        rows.append({"choices": len(space), "median_ms": statistics.median(times), "max_ms": max(times[1:])})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns for people."""

    def text(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [list(rows[0])] + [[text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("curves", "jobs", "speed"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed or case")
    parser.add_argument("--only", nargs="*", default=[], choices=list(WAYS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.what == "curves":
        rows = curves(given.files or sorted(DATA.glob("published_*.json")), given.seeds, given.first)
        shown = rows
    elif given.what == "jobs":
        rows = jobs(given.cases, given.only, given.first)
        shown = summary(rows)
    else:
        rows = shown = speed()
    print(table(shown))
    if given.json:
        given.json.write_text(json.dumps({"what": given.what, "summary": shown, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
