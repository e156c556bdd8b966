"""What the commands share: the application, and options that several of them take."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from smlt._version import __version__
from smlt.client.runs import Run
from smlt.store.secrets import resolve_store_url


def examples(*commands: str) -> str:
    """The end of a command's --help; the \\b keeps the lines as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


app = typer.Typer(
    name="smlt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train models on serverless workers: gradients averaged through a Redis or Valkey store.",
)


def resolved(store: str | None) -> str | None:
    """The store's URL with its password, or that of SMLT_STORE_FILE: the one place where the command line looks it up."""
    return resolve_store_url(store)


RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder that holds the run folders.")]
_STORE: dict[str, Any] = {
    "envvar": "SMLT_STORE",
    "help": "Parameter store: redis://, rediss:// or unix:// URL, several with commas between them, redis+cluster:// or "
    "rediss+cluster://, or a secret URL that leads to it. Its password: see `smlt doctor --help`.",
    "show_default": "embedded",
}
StoreUrl = Annotated[str | None, typer.Option("--store", callback=resolved, **_STORE)]
StoreReference = Annotated[str | None, typer.Option("--store", **_STORE)]  # as it was given: to say where all comes from
AsJson = Annotated[bool, typer.Option("--json", help="JSON lines on stdout, nothing else.")]


def _into_environment(*variables: str) -> Callable[[str | None], str | None]:
    """Every client of AWS in this process and its children reads it there."""

    def take(value: str | None) -> str | None:
        if value:
            os.environ.update(dict.fromkeys(variables, value))
        return value

    return take


EndpointUrl = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url",
        envvar="AWS_ENDPOINT_URL",
        callback=_into_environment("AWS_ENDPOINT_URL"),
        help="Ask this instead of AWS: what `smlt lambda-local` prints.",
        show_default="AWS",
    ),
]
Region = Annotated[
    str | None,
    typer.Option(
        "--region", envvar="AWS_REGION", callback=_into_environment("AWS_REGION", "AWS_DEFAULT_REGION"), help="AWS region."
    ),
]
Profile = Annotated[
    str | None,
    typer.Option("--profile", envvar="AWS_PROFILE", callback=_into_environment("AWS_PROFILE"), help="AWS profile."),
]


#: What leads to the AWS that a run is on.
_WHERE = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_PROFILE")


def where_aws_is() -> dict[str, str]:
    """For a run to remember; credentials are not among it."""
    return {name: os.environ[name] for name in _WHERE if os.environ.get(name)}


def go_where(run: Run) -> None:
    """Ask the AWS that a run is on, where nothing else is said now."""
    for name, value in dict(run.status.get("aws") or {}).items():
        if name in _WHERE:
            os.environ.setdefault(name, str(value))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smlt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass
