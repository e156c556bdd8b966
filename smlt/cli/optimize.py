"""`smlt optimize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smlt.cli.common import AsJson, app, examples
from smlt.client.optimizer.goals import Goal, check_goal, parse_duration, parse_usd
from smlt.errors import ConfigError

if TYPE_CHECKING:
    from smlt.client.optimizer.replay import Replay

GOALS = ("trade", "time", "cost")


@app.command(
    epilog=examples(
        "smlt optimize --replay measured.csv",
        "smlt optimize --replay measured.csv --steps 20000 --deadline 2h --evaluations 8",
        "smlt optimize --replay runs/20260102-153000-digits/observations.jsonl --goal cost --json",
        "smlt optimize --replay objective.json --seed 7 --pictures figures --format png",
    )
)
def optimize(
    replay: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Recorded results: CSV or JSON rows of workers, memory_mb and step_s; a run's "
            'observations.jsonl; or JSON {"first_workers": n, "objective": [...]}.',
        ),
    ],
    goal: Annotated[
        str, typer.Option(help="Without a deadline and a budget: least time, least cost, or the best trade of both.")
    ] = "trade",
    deadline: Annotated[str | None, typer.Option(metavar="TIME", help="Least cost within it: 2h, 90m, 45s.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="USD", help="Least time for it.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the run that the goal is for.")] = 1000,
    evaluations: Annotated[int, typer.Option(metavar="K", help="Rows that it may look up.")] = 5,
    seed: Annotated[int, typer.Option(help="Draws the first row.")] = 0,
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw there what was believed and tried, evaluation by evaluation.")
    ] = None,
    kind: Annotated[str, typer.Option("--format", metavar="svg|png", help="Of those files.")] = "svg",
    as_json: AsJson = False,
) -> None:
    """Run the optimizer on a table of recorded results, and show how near it comes to the table's best row.

    It is the optimizer of `smlt train --deadline`, which knows nothing of this job but the prices.
    """
    from smlt.client.optimizer.replay import load_table
    from smlt.client.optimizer.replay import replay as run_on

    if goal not in GOALS:
        raise ConfigError(f"--goal is one of {', '.join(GOALS)}, not {goal!r}")
    limits = Goal(deadline_s=parse_duration(deadline) if deadline else None, budget_usd=parse_usd(budget) if budget else None)
    check_goal(limits)
    if limits != Goal() and goal != "trade":
        raise ConfigError("--goal is for runs without a deadline or a budget")
    if goal != "trade":
        limits = Goal(budget_usd=float("inf")) if goal == "time" else Goal(deadline_s=float("inf"))
    made = run_on(load_table(replay), limits, seed=seed, evaluations=evaluations, steps=steps)
    written = [] if pictures is None else _draw(made, pictures, kind)
    if as_json:
        typer.echo(json.dumps({**made.to_dict(), "pictures": [*map(str, written)]}))
    else:
        for line in (made.to_text(), *map(str, written)):
            typer.echo(line)


def _draw(made: Replay, folder: Path, kind: str) -> list[Path]:
    from smlt.client.optimizer.priors import WITHOUT_MODEL
    from smlt.client.report.contents import pictures_of_search, story_of_replay
    from smlt.client.report.pictures import check_format, write

    check_format(kind)
    story = story_of_replay(
        made.table.space,
        made.model,
        made.goal,
        made.observations,
        made.standing,
        chosen=made.believed_best,
        on_lambda=not made.table.is_objective,
        hyper=WITHOUT_MODEL,
    )
    return [write(one, folder, kind) for one in pictures_of_search(story)]
