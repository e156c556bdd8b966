"""Options of `smlt train` that say who listens to a run beside the person at the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from smlt.client.loggers import make_listeners
from smlt.client.progress import make_progress
from smlt.client.request import RunRequest
from smlt.client.watching import Progress, heard_by

Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="KIND[=WHERE]",
        help="Log there as well; may be given several times: tensorboard[=DIR] (its files; in the run's folder), mlflow[=URI] "
        "(a server or a folder; MLFLOW_TRACKING_URI, else mlruns/). With --resume, none: no more.",
        show_default="none",
    ),
]
MetricsPort = Annotated[
    int | None,
    typer.Option(metavar="PORT", help="Serve metrics for Prometheus there while the run goes on; 0: any free port."),
]
MetricsHost = Annotated[
    str | None, typer.Option(metavar="HOST", help="The address to serve them at.", show_default="127.0.0.1: this machine only")
]


def listened_to(request: RunRequest, *, as_json: bool) -> Progress:
    """The view of a run, and whoever is to listen beside it. ConfigError when one of them cannot."""
    view = make_progress(as_json=as_json)
    return heard_by(view, *make_listeners(request, view.preparing))
