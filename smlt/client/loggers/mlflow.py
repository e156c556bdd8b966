"""`--log mlflow[=URI]`: a run in an MLflow experiment, by mlflow-skinny's client: a server, or a folder of files.

https://mlflow.org/docs/latest/tracking.html. The experiment is that of MLFLOW_EXPERIMENT_NAME, "smlt" when it is not set.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from smlt.client.loggers import check_uri
from smlt.client.loggers.curves import CurveLogger
from smlt.client.runs import Run
from smlt.errors import ConfigError
from smlt.store.parameter import ServerInfo

#: In the run's folder: which of MLflow's runs it is, for a resumed one to go on in it.
FILE = "mlflow.json"
#: MLflow's limits of one request. https://mlflow.org/docs/latest/rest-api.html#log-batch
METRICS_MAX, PARAMETERS_MAX, VALUE_CHARACTERS_MAX = 1000, 100, 6000
#: Rows are sent together: at least so often, in seconds.
SEND_EVERY_S = 1.0
#: A server that is away is told soon: MLflow's own five tries with pauses take minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
_ENDS = {"done": "FINISHED", "stopped": "KILLED"}


class MlflowLogger(CurveLogger):
    """Logs to `uri`; without it to MLFLOW_TRACKING_URI, or to the folder mlruns/."""

    def __init__(self, uri: str | None) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param, RunTag
        except ImportError as error:
            raise ConfigError(f"--log mlflow needs {error.name}: pip install 'smlt[mlflow]'") from error
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns"
        check_uri(self.uri)
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        if "://" not in self.uri:
            self.uri = Path(self.uri.removeprefix("file:")).absolute().as_uri()
        if self.uri.startswith("file:"):  # since MLflow 3.12 files have to be asked for; whoever names a folder has
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client_of, self._metric, self._param, self._tag = MlflowClient, Metric, Param, RunTag
        self._client: Any = None
        self._run_id = ""
        self._metrics: list[Any] = []
        self._step, self._sent = 0, 0.0

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        """Begin a run of MLflow's, or go on in the one that this run has had before."""
        self._client = self._client_of(tracking_uri=self.uri)
        known = run.path / FILE
        before = json.loads(known.read_text()) if known.exists() else {}
        if before.get("uri") == self.uri:
            self._run_id = str(before["run_id"])
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "smlt")
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found is not None else self._client.create_experiment(experiment)
            self._run_id = str(self._client.create_run(number, run_name=run.name).info.run_id)
            known.write_text(json.dumps({"uri": self.uri, "run_id": self._run_id}) + "\n")
            parameters = [
                self._param(name, str(value)[:VALUE_CHARACTERS_MAX]) for name, value in config.items() if value is not None
            ]
            for at in range(0, len(parameters), PARAMETERS_MAX):
                self._client.log_batch(self._run_id, params=parameters[at : at + PARAMETERS_MAX])
        self._client.log_batch(self._run_id, tags=[self._tag("smlt.folder", str(run.path))])

    def step(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self._step = row["step"]
        super().step(row)

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """See Progress."""
        if status.get("cost_usd") is not None:
            self._add(self._step, time.time(), {"cost_usd": float(status["cost_usd"])})
        self._send()
        if self._client is not None:
            self._client.set_terminated(self._run_id, _ENDS.get(str(status["state"]), "FAILED"))

    def flush(self) -> None:
        """Nothing more waits at the moment."""
        if time.monotonic() - self._sent > SEND_EVERY_S:
            self._send()

    def _add(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        self._metrics += [self._metric(name, value, int(wall_time * 1000), step) for name, value in values.items()]
        if len(self._metrics) >= METRICS_MAX:
            self._send()

    def _send(self) -> None:
        while self._metrics and self._client is not None:
            self._client.log_batch(self._run_id, metrics=self._metrics[:METRICS_MAX], synchronous=True)
            del self._metrics[:METRICS_MAX]
        self._sent = time.monotonic()
