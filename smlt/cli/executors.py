"""`smlt executors`."""

from __future__ import annotations

import inspect
import json
from typing import Any

import typer

from smlt.cli.common import AsJson, app, examples
from smlt.client.executors.registry import Registered, find, installed
from smlt.errors import ConfigError


@app.command(epilog=examples("smlt executors", "smlt executors --json | jq .name"))
def executors(as_json: AsJson = False) -> None:
    """List what `smlt train --on` takes: each executor's package, whether it can be used here, and its options."""
    for registered in installed().values():
        row = _row(registered)
        if as_json:
            typer.echo(json.dumps(row))
            continue
        typer.echo(f"{row['name']:<10} {row['what']}")
        typer.echo(f"{'':<10} of {row['package']}: {'ready' if row['usable'] else row['lacks']}")
        for key, what in row["options"].items():
            typer.echo(f"{'':<10} --on-option {key}={what}")


def _row(registered: Registered) -> dict[str, Any]:
    row: dict[str, Any] = {"name": registered.name, "package": registered.package, "what": "", "options": {}}
    try:
        executor = find(registered.name)
        lacks = executor.lacks()
        first, _, _ = (inspect.getdoc(executor) or "").partition("\n")
        row |= {"what": first, "options": dict(executor.options)}
    except ConfigError as error:  # of somebody else's package: the others can be used
        lacks = str(error)
    return {**row, "usable": not lacks, "lacks": lacks}
