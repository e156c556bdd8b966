"""`smlt report`."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from smlt.cli.common import AsJson, RunsDir, app, examples
from smlt.client.runs import DEFAULT_RUNS_DIR, Run, latest_run


@app.command(
    epilog=examples(
        "smlt report",
        "smlt report 20260102-153000-digits --output report.html --open",
        "smlt report 20260102-153000-digits --pictures figures --format png",
    )
)
def report(
    run: Annotated[str | None, typer.Argument(help="A run's name or folder.", show_default="the latest")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page.", show_default="report.html in the run's folder")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", metavar="DIR", help="Write each picture as a file there, too.")
    ] = None,
    kind: Annotated[str, typer.Option("--format", metavar="svg|png", help="Of those files.")] = "svg",
    open_it: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a page of a run: curves, throughput, forecasts, the search for workers and memory, cost.

    One HTML file that fetches nothing. A run that is under way is shown as far as it has come; what is missing is said.
    """
    from smlt.client.report.contents import contents_of
    from smlt.client.report.data import gather
    from smlt.client.report.page import page, write_page
    from smlt.client.report.pictures import check_format, write

    check_format(kind)
    found = latest_run(runs_dir) if run is None else Run.open(runs_dir, run)
    data = gather(found)
    sections = contents_of(data)
    path = output if output is not None else found.path / "report.html"
    write_page(path, page(f"Run {found.name}", sections))
    written = [] if pictures is None else [write(one, pictures, kind) for part in sections for one in part.pictures]
    if as_json:
        typer.echo(json.dumps({"report": str(path), "pictures": [*map(str, written)], "missing": [*data.missing]}))
    else:
        for one in (path, *written):
            typer.echo(str(one))
    if open_it:
        webbrowser.open(path.absolute().as_uri())
