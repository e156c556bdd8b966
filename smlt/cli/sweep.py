"""`smlt sweep`: hyper-parameters by a grid or random draws, with early stopping, on one store."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from smlt.cli.common import AsJson, EndpointUrl, Profile, Region, RunsDir, StoreReference, app, examples, resolved
from smlt.client.deployment.lookup import find_deployment
from smlt.client.executors.local import threads_per_worker
from smlt.client.optimizer.goals import parse_duration, parse_usd
from smlt.client.request import FUNCTION
from smlt.client.runs import DEFAULT_RUNS_DIR
from smlt.client.sweep.display import make_display
from smlt.client.sweep.folder import SweepFolder
from smlt.client.sweep.request import SweepRequest, check_sweep
from smlt.client.sweep.space import parse_space
from smlt.client.sweep.sweep import Sweep, resumed
from smlt.errors import ConfigError
from smlt.store.parameter import ParameterStore

#: Options of `smlt train` that a sweep sets itself, or that make no sense for one trial of many.
_OURS = ("--name", "--runs-dir", "--epochs", "--workers", "-n", "--set", "--json", "--resume", "--store")
_REFUSED = ("--tune", "--on-miss", "--max-workers", "--learn-from", "--metrics-port", "--metrics-host")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples(
        "smlt sweep examples/sweep_digits.py --grid lr=0.5,0.1,0.02 --grid width=32,128 --epochs 8",
        "smlt sweep task.py --random lr=log:1e-4..1e-1 --random layers=int:1..4 --random act=relu,tanh --trials 20 --seed 1",
        "smlt sweep task.py --random lr=log:1e-3..1 --trials 27 --halving 3 --min-epochs 2 --epochs 54 --workers-total 8",
        "smlt sweep task.py --space space.toml --trials 40 --metric loss --deadline 30m --codec fp32 --data ./images",
        "smlt sweep task.py --grid global_batch_size=64,256 --grid lr=0.1,0.4 --lr-rule none",
        "smlt sweep task.py --random lr=log:1e-3..1 --trials 9 --halving 3 --on lambda -n 4 --workers-total 16 --budget 5",
        "smlt sweep --resume smlt-runs/20260102-153000-digits",
    ),
)
def sweep(
    context: typer.Context,
    script: Annotated[str | None, typer.Argument(help="Script that defines a smlt.Task. Not needed with --resume.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="NAME=A,B,...", help="Try each of these values; of several --grid all combinations."),
    ] = None,
    drawn: Annotated[
        list[str] | None,
        typer.Option(
            "--random",
            metavar="NAME=...",
            help="Draw it: 0..1 (uniform), log:1e-4..1e-1, int:1..4, logint:8..512, or one of A,B,C.",
        ),
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A .toml or .json file with tables grid and random."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="K", help="How many draws; with a grid each at all its points.", show_default="none")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws and of every trial.", show_default="0")] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One of evaluate()'s, or loss: the training loss.", show_default="accuracy"),
    ] = None,
    goal: Annotated[
        str | None, typer.Option(help="Whether more of the metric is better (max) or less (min).", show_default="min for loss")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set, at most.", show_default="10")] = None,
    halving: Annotated[
        int | None,
        typer.Option(
            metavar="ETA",
            help="Successive halving: of each rung the best 1 in ETA goes on, for ETA times as many epochs.",
            show_default="all train to the end",
        ),
    ] = None,
    min_epochs: Annotated[
        int | None, typer.Option(metavar="K", help="With --halving: epochs of the first rung.", show_default="1")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-n", help="Workers of each trial.", show_default="1")] = None,
    workers_total: Annotated[
        int | None,
        typer.Option(metavar="K", help="Workers of all trials that run at once.", show_default="the cores of this machine"),
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="TIME", help="End within 90m, 2h: no trial begins a rung that would not end by then.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="USD", help="With --on lambda: all trials together cost no more than that.")
    ] = None,
    store: StoreReference = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    name: Annotated[str | None, typer.Option(help="The sweep's name.", show_default="time and script")] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    profile: Profile = None,
    resume: Annotated[str | None, typer.Option(metavar="FOLDER", help="Go on with a sweep, by its folder or name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look for good hyper-parameters: train the task in SCRIPT with many, several at once, on one store.

    Hyper-parameters are class attributes of the task (`lr = 0.1`, read as self.lr); global_batch_size, batch_schedule,
    lr_rule, codec and seed are the run's own. Behind SCRIPT any other option of `smlt train` may stand, which then holds for
    every trial: --data, --codec, --on, --memory, --object-store, ...

    With --halving most trials end early: after each rung the best go on from their checkpoints. Each trial is a run in the
    sweep's folder, which `smlt status`, `watch`, `report`, `logs` and `resume` take. Ctrl-C stops all of them at checkpoints.
    """
    limits = {
        "deadline_s": None if deadline is None else parse_duration(deadline),
        "budget_usd": None if budget is None else parse_usd(budget),
        "workers_total": workers_total,
    }
    if resume is not None:
        fixed = (script, grid, drawn, space, trials, seed, metric, goal, epochs, halving, min_epochs, workers, name)
        if context.args or any(value is not None for value in fixed):
            more = "--deadline, --budget, --workers-total and --store"
            raise ConfigError(f"--resume goes on with what the sweep was asked for: beside it there may be {more}")
        folder = SweepFolder.open(runs_dir, resume)
        request = resumed(folder, limits)
        check_sweep(request)
        Sweep(folder, request, make_display(as_json=as_json), store=_store(store, request.on)).run()
        return
    if script is None or script.startswith("-"):
        raise ConfigError("give the SCRIPT first, then options of smlt train; or --resume FOLDER")
    settings, options = _train_options(script, context.args)
    on = settings["on"] or "local"
    total = _workers_total(workers_total, workers or 1, on)
    if on == "local" and settings["threads"] is None:  # they share the cores with the other trials' workers
        options += ["--threads", str(threads_per_worker(total))]
    asked: dict[str, Any] = {
        "trials": trials,
        "seed": seed,
        "metric": metric,
        "goal": goal,
        "epochs": epochs,
        "halving": halving,
        "min_epochs": min_epochs,
        "workers": workers,
        **limits,
        "workers_total": total,
    }
    request = SweepRequest(
        script,
        space=parse_space(grid or (), drawn or (), space).as_json(),
        on=on,
        data=settings["data"],
        object_store=settings["object_store"],
        options=options,
        **{name: value for name, value in asked.items() if value is not None},
    )
    check_sweep(request)
    shared = _store(store, on)
    folder = SweepFolder.create(runs_dir, Path(script), name)
    folder.write(request, state="begun")
    folder.write_trials(request.make_trials())
    Sweep(folder, request, make_display(as_json=as_json), store=shared).run()


def _train_options(script: str, given: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What the options of `smlt train` say, and those for every trial: without --data and --object-store, which all share.

    Raises typer's error for what `smlt train` does not know.
    """
    for option in given:
        named = option.partition("=")[0]
        if named in _REFUSED or named in _OURS:
            raise ConfigError(f"{named} cannot be an option of each trial: see smlt sweep --help")
    train: Any = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    found = train.make_context("sweep", [script, *given]).params
    if found["on"] == "lambda" and found["object_store"] is None:  # as each trial would find it
        found["object_store"] = find_deployment(found["function"] or FUNCTION).object_store
    options = _without(given, "--data", "--object-store")
    if found["keep_checkpoints"] is None:
        options += ["--keep-checkpoints", "1"]  # of many trials most are not looked at again
    return found, options


def _without(given: list[str], *names: str) -> list[str]:
    """The options that are not of these names, each of which has a value."""
    kept, rest = list[str](), iter(given)
    for text in rest:
        if text in names:
            next(rest)
        elif text.partition("=")[0] not in names:
            kept.append(text)
    return kept


def _workers_total(given: int | None, each: int, on: str) -> int:
    if given is not None:
        return given
    if on != "local":
        raise ConfigError(f"--on {on}: say with --workers-total how many workers all trials may have at once")
    return max(each, threads_per_worker(1))


def _store(reference: str | None, on: str) -> str | None:
    """What trials are given as their store; "embedded": the sweep's own."""
    url = resolved(reference)
    if url is None:
        return "embedded" if on == "local" else None
    if on == "local":
        with contextlib.closing(ParameterStore(url, job="check")) as parameters:
            parameters.check()
    return reference
