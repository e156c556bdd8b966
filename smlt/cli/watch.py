"""`smlt watch`."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from smlt.cli.common import RunsDir, app, examples
from smlt.client.runs import DEFAULT_RUNS_DIR, Run, latest_run
from smlt.errors import ConfigError

#: What a watched run's state makes of the exit code; those of errors are below 10.
EXIT_CODES = {"done": 0, "running": 0, "stopped": 10, "failed": 11, "lost": 12}


@app.command(
    epilog=examples(
        "smlt watch",
        "smlt watch 20260102-153000-digits",
        "smlt watch --once",
        "smlt watch --json | jq -c 'select(.event == \"membership\")'",
        "smlt watch digits && notify-send 'digits is trained'",
    )
)
def watch(
    run: Annotated[str | None, typer.Argument(help="A run's name or folder.", show_default="the latest")] = None,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands, and end.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="Look again after so long.")] = 0.5,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines on stdout: every event from now on; with --once, how it stands.")
    ] = False,
) -> None:
    """Watch a run that another terminal has started, on this machine or on Lambda, until it ends.

    Progress and the time that is left, loss and accuracy, throughput, the workers by rank, cost, the last events: all from the
    run's folder, so that a run under way is not disturbed by it. Ctrl-C ends the watching, not the run. In a pipe it writes a
    plain line for each epoch and event. The exit code is 0 when the run is done, 10 when it was stopped, 11 when it has
    failed, 12 when its process is gone.
    """
    if not 0.05 <= every <= 3600:
        raise ConfigError(f"--every {every:g} is not between 0.05 and 3600")
    found = latest_run(runs_dir) if run is None else Run.open(runs_dir, run)
    raise typer.Exit(EXIT_CODES.get(_watch(found, every, once=once, as_json=as_json), 1))


def _watch(run: Run, every_s: float, *, once: bool, as_json: bool) -> str:
    from smlt.client.records import json_line
    from smlt.client.watchers import watch_in_lines, watch_live, write_events, write_frame

    if once:
        return write_frame(run, sys.stdout, as_json=as_json, now=time.time())
    if as_json:
        return write_events(run, lambda event, row: typer.echo(json_line({"event": event, **row})), every_s)
    if sys.stdout.isatty():
        return watch_live(run, sys.stdout, every_s)
    return watch_in_lines(run, sys.stdout, every_s)
