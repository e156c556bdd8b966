"""`--metrics-port`: a run's numbers for Prometheus, over HTTP, by prometheus_client.

Names, units and types after https://prometheus.io/docs/practices/naming/. Every one has the label `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smlt.client.runs import Run
from smlt.client.watching import Unwatched
from smlt.errors import ConfigError
from smlt.store.parameter import ServerInfo

#: Upper bounds of a step's seconds: from a toy on one machine to a large model on slow links.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
STATES = ("running", "done", "stopped", "failed")


class PrometheusMetrics(Unwatched):
    """Serves /metrics at `host`:`port` (0: any free one) from now on. ConfigError when it cannot."""

    def __init__(self, host: str, port: int) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise ConfigError(f"--metrics-port needs {error.name}: pip install 'smlt[prometheus]'") from error
        registry = self.registry = prometheus_client.CollectorRegistry()
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"--metrics-port {port}: {host} port {port}: {why}; 0 takes any free port") from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._make(prometheus_client, registry)
        self._run = ""
        self._restarts = self._lost = 0
        self._ranks: set[str] = set()
        self._last_time: float | None = None

    def _make(self, client: Any, registry: Any) -> None:
        def gauge(name: str, text: str, *labels: str) -> Any:
            return client.Gauge(name, text, ("run", *labels), registry=registry)

        def counter(name: str, text: str, *labels: str) -> Any:
            return client.Counter(name, text, ("run", *labels), registry=registry)

        def histogram(name: str, text: str) -> Any:
            return client.Histogram(name, text, ("run",), registry=registry, buckets=BUCKETS_S)

        self.state = gauge("smlt_run_state", "1 for the state that the run is in.", "state")
        self.steps = counter("smlt_steps", "Global steps that are complete.")
        self.samples = counter("smlt_samples", "Samples trained on.")
        self.step_number = gauge("smlt_step", "The last global step.")
        self.epochs = gauge("smlt_epochs_completed", "Epochs that are complete.")
        self.epochs_wanted = gauge("smlt_epochs", "Epochs that were asked for.")
        self.loss = gauge("smlt_loss", "Loss of the last step.")
        self.metric = gauge("smlt_metric", "What evaluate() gave after the last epoch.", "name")
        self.rate = gauge("smlt_samples_per_second", "Of the last step, all workers together.")
        self.batch = gauge("smlt_global_batch_samples", "Samples a step, all workers together.")
        self.workers = gauge("smlt_workers", "Workers that took part in the last step.")
        self.generation = gauge("smlt_generation", "Version of the membership.")
        self.restarts = counter("smlt_worker_restarts", "Workers that took a lost one's place.")
        self.lost = counter("smlt_workers_lost", "Workers that were lost.")
        self.recovery = counter("smlt_recovery_seconds", "Seconds in which training stood still for changes of the membership.")
        self.step_s = histogram("smlt_step_seconds", "From one global step's end to the next one's.")
        self.compute_s = histogram("smlt_compute_seconds", "Forward, backward and the optimizer's step, slowest worker.")
        self.exposed_s = histogram("smlt_communication_seconds", "A step's wait for communication, slowest worker.")
        self.worker_s = counter("smlt_worker_seconds", "What the workers' seconds went to, all of them together.", "part")
        self.memory = gauge("smlt_worker_memory_bytes", "Resident memory.", "rank")
        self.cost = gauge("smlt_cost_usd", "Cost so far; of a local run that tunes itself, what functions would have cost.")
        self.forecast_s = gauge("smlt_forecast_seconds", "Time that the run is expected to take in all.")
        self.forecast_usd = gauge("smlt_forecast_usd", "What the run is expected to cost in all.")
        self.warnings = counter("smlt_warnings", "Warnings that the run's user was given.")

    def cost_by(self, spent_usd: Callable[[], float]) -> None:
        """Ask this at every scrape for the cost so far."""
        self.cost.labels(self._run).set_function(spent_usd)

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        """See Progress."""
        from smlt.client.spent import spent_so_far

        self._run = run.name
        self._in_state("running")
        self.epochs_wanted.labels(self._run).set(config["epochs"])
        self.cost_by(spent_so_far(run))
        # Those that nothing has happened to yet are there with 0, for rates to have a beginning.
        for one in (self.steps, self.samples, self.restarts, self.lost, self.recovery, self.warnings):
            one.labels(self._run)

    def step(self, row: dict[str, Any]) -> None:
        """See Progress."""
        run = self._run
        self.steps.labels(run).inc()
        self.samples.labels(run).inc(row["samples"])
        self.step_number.labels(run).set(row["step"])
        self.loss.labels(run).set(row["loss"])
        self.rate.labels(run).set(row["samples_per_s"])
        self.workers.labels(run).set(len(row["ranks"]))
        if row.get("global_batch_size"):
            self.batch.labels(run).set(row["global_batch_size"])
        if self._last_time is not None:
            self.step_s.labels(run).observe(max(0.0, row["time"] - self._last_time))
        self._last_time = row["time"]
        self.compute_s.labels(run).observe(max(row["compute_s"]))
        self.exposed_s.labels(run).observe(max(row["communication_s"]))
        hidden = sum(row["communication_total_s"]) - sum(row["communication_s"])
        parts = {"compute": sum(row["compute_s"]), "communication_exposed": sum(row["communication_s"])}
        for part, seconds in {**parts, "communication_hidden": hidden, "data": sum(row["data_s"])}.items():
            self.worker_s.labels(run, part).inc(max(0.0, seconds))
        self._remember(row)

    def _remember(self, row: dict[str, Any]) -> None:
        """Memory by rank; of ranks that are there no more nothing is told."""
        ranks = [str(rank) for rank in row["ranks"]]
        for rank in self._ranks - set(ranks):
            self.memory.remove(self._run, rank)
        self._ranks = set(ranks)
        for rank, mb in zip(ranks, row["rss_mb"], strict=True):
            self.memory.labels(self._run, rank).set(mb * 1e6)

    def epoch(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self.epochs.labels(self._run).set(row["epoch"] + 1)
        for name, value in row["metrics"].items():
            self.metric.labels(self._run, name).set(value)

    def membership(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self.generation.labels(self._run).set(row["generation"])
        self.lost.labels(self._run).inc(len(row["lost_ranks"]))
        self.recovery.labels(self._run).inc(max(0.0, row["recovery_s"]))
        self._restarted(int(row["restarts"]))

    def decision(self, row: dict[str, Any]) -> None:
        """See Progress."""
        self.forecast_s.labels(self._run).set(row["forecast"]["seconds"])
        self.forecast_usd.labels(self._run).set(row["forecast"]["usd"])

    def warning(self, text: str) -> None:
        """See Progress."""
        self.warnings.labels(self._run).inc()

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """Stop to serve: whoever asks later finds nobody, as with any process that has ended."""
        self._in_state(str(status["state"]))
        self._restarted(int(status.get("restarts") or 0))
        self._server.shutdown()
        self._server.server_close()

    def _restarted(self, restarts: int) -> None:
        self.restarts.labels(self._run).inc(max(0, restarts - self._restarts))
        self._restarts = max(self._restarts, restarts)

    def _in_state(self, state: str) -> None:
        for one in STATES:
            self.state.labels(self._run, one).set(one == state)
