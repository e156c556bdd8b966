"""The command line: train, launch, status, runs, doctor."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from smlt._version import __version__
from smlt.client.progress import make_progress, metrics_text
from smlt.client.runs import DEFAULT_RUNS_DIR, Run, list_runs
from smlt.client.scheduler import RunRequest, TaskScheduler, check_request
from smlt.errors import CheckpointError, ConfigError, SmltError

app = typer.Typer(
    name="smlt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train models on serverless workers: gradients averaged through a Redis or Valkey store.",
)

RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder that holds the run folders.")]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="SMLT_STORE",
        help="Parameter store: redis://, rediss:// or unix:// URL.",
        show_default="embedded",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON lines on stdout, nothing else.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smlt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(
    epilog="Examples:  smlt train examples/digits.py --workers 4 --epochs 25   |   smlt train --resume RUN   |   "
    "smlt train task.py --store redis://:password@10.0.0.5 --json"
)
def train(
    script: Annotated[str | None, typer.Argument(help="Script that defines a smlt.Task. Not needed with --resume.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-n", help="Number of workers.", show_default="4")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.", show_default="10")] = None,
    global_batch_size: Annotated[
        int | None, typer.Option(help="Samples a step, all workers together.", show_default="64")
    ] = None,
    target_accuracy: Annotated[float | None, typer.Option(help='End when evaluate() gives this "accuracy", 0 to 1.')] = None,
    seed: Annotated[int | None, typer.Option(help="Of the model, the sample order and the workers.", show_default="0")] = None,
    codec: Annotated[str | None, typer.Option(help="What gradients travel as: fp16 or fp32.", show_default="fp16")] = None,
    store: StoreUrl = None,
    object_store: Annotated[
        str | None, typer.Option(help="Code, data, checkpoints: a directory.", show_default="the runs folder")
    ] = None,
    memory: Annotated[int | None, typer.Option(metavar="MB", help="End the run when a worker holds more.")] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Files for the task (its data_dir).")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    name: Annotated[str | None, typer.Option(help="The run's name.", show_default="time and script")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Longest wait for a worker or the store.", show_default="300"),
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run where its last checkpoint is.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the task in SCRIPT with n workers on this machine.

    Workers average their gradients through the parameter store: the embedded one, which needs no setting up, or --store.
    Ctrl-C stops all workers behind the same step and leaves a checkpoint to go on from.
    """
    given: dict[str, Any] = {
        "workers": workers,
        "epochs": epochs,
        "global_batch_size": global_batch_size,
        "target_accuracy": target_accuracy,
        "seed": seed,
        "codec": codec,
        "object_store": object_store,
        "memory_mb": memory,
        "data": data,
        "timeout_s": timeout,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    if resume is not None:
        run = Run.open(runs_dir, resume)
        if run.status["state"] == "running":
            raise ConfigError(f"run {run.name} is still running (process {run.status['pid']})")
        if script is not None or data is not None or name is not None:
            raise ConfigError("--resume goes on with the run's own script and data: give no SCRIPT, --data or --name")
        try:
            request = replace(RunRequest(**run.config), **chosen)
        except TypeError as error:
            raise CheckpointError(
                f"run {run.name}: {run.path / 'config.json'} is not a run's configuration: {error}"
            ) from error
        for key in ("seed", "global_batch_size"):
            if getattr(request, key) != run.config[key]:
                raise ConfigError(f"--resume keeps the run's {key} ({run.config[key]}): the samples' order hangs on it")
        check_request(request)
    else:
        if script is None:
            raise ConfigError("give a SCRIPT, or --resume RUN")
        request = RunRequest(script, **{"workers": 4, **chosen})
        check_request(request)
        if not Path(script).is_file():
            from smlt.errors import TaskError

            raise TaskError(f"there is no script {script}")
        run = Run.create(runs_dir, Path(script), asdict(request), name)
    scheduler = TaskScheduler(run, request, make_progress(as_json=as_json), store_url=store, resume=resume is not None)
    scheduler.run()


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example:  smlt launch -n 4 examples/allreduce.py",
)
def launch(
    script: Annotated[str, typer.Argument(help="Any Python script that calls smlt.init() and the collectives.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of processes.")] = 4,
    store: StoreUrl = None,
) -> None:
    """Run a script in n processes that share a job.

    Each process finds SMLT_STORE, SMLT_JOB, SMLT_RANK and SMLT_WORLD_SIZE in its environment; smlt.init() reads them.
    Lines of output are prefixed by rank. The first process that fails ends all.
    """
    from smlt.client.launch import launch as launch_processes

    if workers < 1:
        raise ConfigError(f"--workers {workers} is not positive")
    code = launch_processes(script, arguments or [], workers, store)
    if code:
        raise typer.Exit(code)


@app.command(epilog="Examples:  smlt status   |   smlt status 20260102-153000-digits --json")
def status(
    run: Annotated[str | None, typer.Argument(help="A run's name or folder.", show_default="the latest")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: AsJson = False,
) -> None:
    """Show how a run stands or ended."""
    if run is None:
        runs = list_runs(runs_dir)
        if not runs:
            raise CheckpointError(f"there are no runs in {runs_dir}")
        found = Run.open(runs_dir, runs[-1].name)
    else:
        found = Run.open(runs_dir, run)
    state, config = found.status, found.config
    if as_json:
        typer.echo(json.dumps({"run": found.name, "folder": str(found.path), "config": config, **state}))
        return
    typer.echo(f"run      {found.name}")
    typer.echo(f"folder   {found.path}")
    typer.echo(f"state    {state['state']}")
    typer.echo(f"progress epoch {state.get('epoch', 0)} of {config['epochs']}, step {state.get('step', 0)}")
    if state.get("metrics"):
        typer.echo(f"metrics  {metrics_text(state['metrics'])}")
    end = state.get("ended") if state["state"] != "running" else time.time()
    if end is not None and "started" in state:
        typer.echo(f"time     {max(0.0, end - state['started']):.1f} s")
    if state.get("error"):
        typer.echo(f"error    {state['error'].splitlines()[0]}")
    if state["state"] in ("stopped", "lost", "failed"):
        typer.echo(f"resume   smlt train --resume {found.name} --runs-dir {found.runs_dir}")


@app.command(epilog="Example:  smlt runs --json | jq .state")
def runs(runs_dir: RunsDir = DEFAULT_RUNS_DIR, as_json: AsJson = False) -> None:
    """List the runs, oldest first."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "workers", "epoch", "step", "metrics"):
        table.add_column(column)
    for run in list_runs(runs_dir):
        try:
            state, config = run.status, run.config
        except CheckpointError as error:
            state, config = {"state": "incomplete", "error": str(error)}, {}
        if as_json:
            typer.echo(json.dumps({"run": run.name, **state}))
        else:
            epoch = f"{state.get('epoch', 0)}/{config.get('epochs', '?')}"
            table.add_row(
                run.name,
                state["state"],
                str(config.get("workers", "?")),
                epoch,
                str(state.get("step", 0)),
                metrics_text(state.get("metrics") or {}),
            )
    if not as_json:
        Console().print(table if table.row_count else f"no runs in {runs_dir}")


@app.command(epilog="Examples:  smlt doctor   |   smlt doctor --store rediss://:password@store.example:6380")
def doctor(store: StoreUrl = None, as_json: AsJson = False) -> None:
    """Look at this machine and the store, and say what to fix.

    Exit code 3 when something cannot work.
    """
    from smlt.client.doctor import diagnose

    findings = diagnose(store)
    if as_json:
        for finding in findings:
            typer.echo(json.dumps(asdict(finding)))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.status:4}  {finding.name:{width}}  {finding.text}")
            if finding.fix:
                typer.echo(f"      {'':{width}}  -> {finding.fix}")
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(3)


def run() -> int:
    """Run the command line; returns the exit code. An expected error is one line on stderr, a traceback means a bug."""
    try:
        app(standalone_mode=False)
        return 0
    except KeyboardInterrupt:
        return 130
    except typer.Exit as stop:
        return stop.exit_code
    except SmltError as error:
        if os.environ.get("SMLT_DEBUG"):
            raise
        print(f"smlt: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's own: a wrong option or argument
        if usage is None:
            raise
        print(f"smlt: {usage()}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
