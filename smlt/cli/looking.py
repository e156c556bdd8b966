"""`smlt status`, `smlt runs`, `smlt bill`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from smlt.cli.common import AsJson, EndpointUrl, Profile, Region, RunsDir, app, examples, go_where
from smlt.client.progress import forecast_text, metrics_text, resume_line
from smlt.client.runs import DEFAULT_RUNS_DIR, Run, list_runs
from smlt.client.settling import settle
from smlt.client.steering import last_decision
from smlt.errors import CheckpointError, SmltError
from smlt.store.object import open_object_store
from smlt.worker.checkpoint import latest_step


@app.command(epilog=examples("smlt status", "smlt status 20260102-153000-digits --json"))
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
    decision = last_decision(found)
    if as_json:
        known = {"run": found.name, "folder": str(found.path), "config": config, **state}
        typer.echo(json.dumps({**known, "decision": decision} if decision is not None else known))
        return
    typer.echo(f"run      {found.name}")
    typer.echo(f"folder   {found.path}")
    typer.echo(f"state    {state['state']}{' (its process is gone)' if state['state'] == 'lost' else ''}")
    typer.echo(f"progress epoch {state.get('epoch', 0)} of {config['epochs']}, step {state.get('step', 0)}")
    if state.get("metrics"):
        typer.echo(f"metrics  {metrics_text(state['metrics'])}")
    end = state.get("ended") if state["state"] != "running" else time.time()
    if end is not None and "started" in state:
        typer.echo(f"time     {max(0.0, end - state['started']):.1f} s")
    if decision is not None and state["state"] == "running":
        typer.echo(f"forecast {forecast_text(decision)}")
    if state.get("cost_usd") is not None:
        typer.echo(f"cost     {state['cost_usd']:.6f} USD (items: smlt bill {found.name})")
    if state.get("error"):
        typer.echo(f"error    {state['error'].splitlines()[0]}")
    if state["state"] in ("stopped", "lost", "failed"):
        go_where(found)
        try:
            objects = open_object_store(config.get("object_store") or str(found.runs_dir))
            newest = latest_step(objects, f"{found.name}/checkpoints")
        except SmltError:  # AWS is not to be reached from here: as the run has written it down
            newest = state.get("checkpoint_step")
        typer.echo(resume_line(found, {"checkpoint_step": newest}))


@app.command(epilog=examples("smlt runs", "smlt runs --json | jq .state"))
def runs(runs_dir: RunsDir = DEFAULT_RUNS_DIR, as_json: AsJson = False) -> None:
    """List the runs, oldest first."""
    rows = [("run", "state", "workers", "epoch", "step", "metrics")]
    for run in list_runs(runs_dir):
        try:
            state, config = run.status, run.config
        except CheckpointError as error:
            state, config = {"state": "incomplete", "error": str(error)}, {}
        if as_json:
            typer.echo(json.dumps({"run": run.name, **state}))
        epoch = f"{state.get('epoch', 0)}/{config.get('epochs', '?')}"
        metrics = metrics_text(state.get("metrics") or {})
        rows.append((run.name, state["state"], str(config.get("workers", "?")), epoch, str(state.get("step", 0)), metrics))
    if as_json:
        return
    if len(rows) == 1:
        typer.echo(f"no runs in {runs_dir}")
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command(
    name="bill",
    epilog=examples(
        "smlt bill 20260102-153000-digits", "smlt bill 20260102-153000-digits --from-log --prices ours.toml --json"
    ),
)
def show_bill(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    from_log: Annotated[
        bool,
        typer.Option("--from-log", help="Look into CloudWatch for what no answer has told: repeated invocations, say."),
    ] = False,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prices of your own, TOML or JSON; SMLT_PRICES names one, too.")
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: AsJson = False,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Show what a run on Lambda has cost, item by item, by what Lambda has reported of each invocation.

    A run looks into its log when it ends, but lines come some seconds late: --from-log looks again.
    """
    found = Run.open(runs_dir, run)
    go_where(found)
    made = settle(found, from_log=from_log, prices=prices)
    typer.echo(json.dumps(made.to_dict()) if as_json else made.to_text())
