"""Where a run's numbers go beside its folder: TensorBoard, MLflow, Prometheus. docs/watching.md.

Each module has one listener, and imports what it needs when it is made. What goes wrong in one of them later is told once
(`guarded`), and never ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from smlt.client.request import RunRequest
from smlt.client.watching import Listener
from smlt.errors import ConfigError

#: What `--log` knows.
KINDS = ("tensorboard", "mlflow")


def check_log(values: Sequence[str]) -> tuple[str, ...]:
    """The `--log` options of a run, checked: each KIND or KIND=WHERE; "none" alone is no logger. ConfigError otherwise.

    Folders become absolute: a run that is resumed elsewhere goes on in the same ones.
    """
    if list(values) == ["none"]:
        return ()
    for value in values:
        kind, mark, where = value.partition("=")
        if kind not in KINDS or (mark and not where):
            raise ConfigError(f"--log {value}: give tensorboard[=DIR], mlflow[=URI] or none")
        if kind == "mlflow":
            check_uri(where)
    found = tuple(_with_absolute_folder(value) for value in values)
    if len(set(found)) < len(found):
        raise ConfigError(f"--log: the same one is given twice: {', '.join(values)}")
    return found


def check_uri(uri: str) -> None:
    """ConfigError for an MLflow URI that has a user or a password in it: it comes into the run's folder, and into warnings."""
    if "@" in uri.partition("://")[2].partition("/")[0]:
        raise ConfigError(
            "--log mlflow: no user or password in the URI, it is written into the run's folder: "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD take them"
        )


def _with_absolute_folder(value: str) -> str:
    kind, _, where = value.partition("=")
    return value if not where or "://" in where or where.startswith("file:") else f"{kind}={Path(where).absolute()}"


def make_listeners(request: RunRequest, say: Callable[[str], None]) -> list[Listener]:
    """Those that the request asks for, ready to be told of the run. `say` is told where the metrics are.

    ConfigError when a package is missing or the port for the metrics is in use.
    """
    from smlt.client.loggers.guarded import Guarded, InBackground

    made: list[Listener] = []
    for value in check_log(request.log):
        kind, _, where = value.partition("=")
        if kind == "tensorboard":
            from smlt.client.loggers.tensorboard import TensorBoardLogger

            made.append(InBackground(TensorBoardLogger(where or None), f"--log {value}"))
        else:
            from smlt.client.loggers.mlflow import MlflowLogger

            made.append(InBackground(MlflowLogger(where or None), f"--log {value}"))
    if request.metrics_port is not None:
        from smlt.client.loggers.prometheus import PrometheusMetrics

        metrics = PrometheusMetrics(request.metrics_host, request.metrics_port)
        say(f"metrics at {metrics.url}")
        made.append(Guarded(metrics, "--metrics-port"))
    return made
