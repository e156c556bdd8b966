"""`smlt logs`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from smlt.cli.common import AsJson, EndpointUrl, Profile, Region, RunsDir, app, examples, go_where
from smlt.client.logs import LogLine, follow, logs, parse_since
from smlt.client.runs import DEFAULT_RUNS_DIR, Run
from smlt.worker.stamped import stamp

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta")


@app.command(
    name="logs",
    epilog=examples(
        "smlt logs 20260102-153000-digits",
        "smlt logs 20260102-153000-digits --follow",
        "smlt logs 20260102-153000-digits --worker 3 --since 10m",
        "smlt logs 20260102-153000-digits --json | jq -r .text",
    ),
)
def show_logs(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    follow_it: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes until the run ends.")] = False,
    worker: Annotated[int | None, typer.Option("--worker", metavar="RANK", min=0, help="This worker alone.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Nothing older: 90s, 10m, 2h, 1d, or 2026-01-02T15:30:00Z (UTC).")
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: AsJson = False,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Show what the workers and the store of a run have printed, in the order of time.

    Of workers on this machine from the run's folder, of functions from CloudWatch Logs, where lines come some seconds late.
    A line's worker stands before it; what a worker prints without a time counts to the line before. --json has the time too.
    """
    found = Run.open(runs_dir, run)
    go_where(found)
    after = parse_since(since) if since is not None else 0.0
    write = _json if as_json else _writer()
    for line in (follow if follow_it else logs)(found, since=after, worker=worker):
        write(line)
        if follow_it:
            sys.stdout.flush()


def _json(line: LogLine) -> None:
    row = {"time": stamp(line.time), "worker": line.worker, "text": line.text}
    print(json.dumps(row, ensure_ascii=False))


def _writer() -> Callable[[LogLine], None]:
    if not sys.stdout.isatty():
        return lambda line: print(f"{line.worker} | {line.text}")
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def write(line: LogLine) -> None:
        rank = line.worker.removeprefix("worker-")
        colour = _COLOURS[int(rank) % len(_COLOURS)] if rank.isdigit() else "white"
        console.print(Text.assemble((f"{line.worker} | ", colour), line.text), soft_wrap=True)

    return write
