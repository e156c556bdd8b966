"""Workers as calls of Lithops, https://lithops-cloud.github.io: functions and containers of many clouds, by one interface.

One call is one worker, `smlt.worker.called.work`; its backend, storage and runtime are those of the user's configuration of
Lithops. Code and data come from the run's object store, not by Lithops: the runtime needs smlt and what the task imports.
"""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from smlt._version import __version__
from smlt.client.executors import RunContext, Traits, elsewhere
from smlt.client.executors.calls import LOOK_S, CallingExecutor, CallWorker, Ending
from smlt.client.executors.local import threads_per_worker
from smlt.worker.called import work

if TYPE_CHECKING:
    from smlt.client.request import RunRequest

#: Of a call's time, for what comes before its worker.
MARGIN_S = 10.0
#: On this machine, where it is not configured: how often Lithops looks which calls have ended, and how many run at once.
LOOK_HERE_S, AT_ONCE_HERE = 0.2, 64
#: A container may have to be fetched before a worker can give a sign of life.
START_S = 300.0
KILLED = -9


class LithopsExecutor(CallingExecutor):
    """Calls of Lithops: Google Cloud Run, Azure, Kubernetes, Code Engine, ..., by Lithops' own configuration."""

    options: ClassVar = {
        "config": "FILE, Lithops' configuration; else the one that Lithops finds",
        "backend": "NAME, instead of the configuration's",
        "storage": "NAME, for Lithops' own files, instead of the configuration's",
        "runtime": "NAME, instead of the configuration's: it has smlt and what the task imports",
        "threads": "K, that each worker computes with",
        "start_s": f"SECONDS within which a worker must give a sign of life ({START_S:g})",
    }

    def __init__(self, context: RunContext, config: dict[str, Any], stack: ExitStack) -> None:
        import lithops

        super().__init__()
        options, here, backend = context.request.on_options, runs_here(config), config["lithops"]["backend"]
        section, self._here, self.where = config[backend], here, f"Lithops on {backend}"
        self._stack, self._lock = stack, threading.Lock()
        self._store_url = stack.enter_context(elsewhere.private_url(context.store_url)) if here else context.store_url
        self._threads = int(elsewhere.number(options, "threads", 0 if here else max(1, round(section.get("runtime_cpu") or 1))))
        limits_s = [float(s) for s in (section.get("runtime_timeout"), config["lithops"]["execution_timeout"]) if s]
        self.traits = Traits(
            kills=here,
            keeps_memory=not here,
            time_limit_s=max(1.0, min(limits_s) - MARGIN_S),
            start_s=elsewhere.number(options, "start_s", 0 if here else START_S),
        )
        self.concurrency = section["worker_processes"] if here else section.get("max_workers")
        stack.enter_context(elsewhere.logged_to(context.run.log_path("lithops"), "lithops"))
        self._engine = stack.enter_context(lithops.FunctionExecutor(config=config, log_level=None))

    @classmethod
    def lacks(cls) -> str:
        return "" if elsewhere.is_installed("lithops") else "Lithops is not installed: pip install 'smlt[lithops]'"

    @classmethod
    def place(cls, request: RunRequest, store: str | None) -> tuple[RunRequest, str | None]:
        config = configuration(request)
        if runs_here(config):
            return super().place(request, store)
        return elsewhere.place_elsewhere(request, store, f"Lithops on {config['lithops']['backend']}")

    @classmethod
    def open(cls, context: RunContext) -> Self:
        config = configuration(context.request)
        with elsewhere.engine_errors("Lithops cannot be used"), ExitStack() as stack:
            made = cls(context, config, stack)
            if not made._here:
                elsewhere.check_reach(lambda *call: made._result(made._call(*call)), made.where, context)
            made._stack = stack.pop_all()
        return made

    def threads(self, world_size: int) -> int:
        return self._threads or threads_per_worker(world_size)

    def call(self, worker: CallWorker) -> Ending:
        future = self._call(work, replace(worker.config, store_url=self._store_url).to_json(), __version__)
        while not (future.ready or future.success or future.done):
            if worker.given_up.wait(LOOK_S):
                return self._end(future)
        try:
            found = self._result(future)
        except Exception as error:  # out of time, out of memory, or the runtime lacks something
            return Ending(1, f"failed in {self.where}: {type(error).__name__}: {error}")
        return Ending(found["exit_code"], log=found["log"])

    def _call(self, function: Any, *arguments: Any) -> Any:
        with self._lock:  # Lithops numbers its jobs without one
            return self._engine.call_async(function, arguments, include_modules=None)

    def _result(self, future: Any) -> Any:
        hook = sys.excepthook
        try:
            return future.result()
        finally:
            sys.excepthook = hook  # Lithops puts its own in the place

    def _end(self, future: Any) -> Ending:
        """Where a backend can end a call it does. On standalone machines it would end all calls."""
        if self._engine.mode != "standalone":
            with self._lock:
                self._engine.compute_handler.clear([future.job_key], exception=KeyboardInterrupt())
        return Ending(KILLED) if self._here else Ending()

    def close(self) -> None:
        self._stack.close()


def configuration(request: RunRequest) -> dict[str, Any]:
    """Lithops' configuration with what --on-option and --memory say, complete. ConfigError when Lithops refuses it."""
    from lithops.config import default_config, load_config

    options = request.on_options
    backend = {"runtime": options.get("runtime"), "runtime_memory": request.memory_mb}
    chosen = {
        "lithops": {key: options[key] for key in ("backend", "storage") if key in options},
        "backend": {key: value for key, value in backend.items() if value is not None},
    }
    # Else it would take any `python` that is on PATH, and run as many calls at once as there are cores.
    here = {"runtime": sys.executable, "worker_processes": max(AT_ONCE_HERE, 2 * (request.workers + request.spares))}
    with elsewhere.engine_errors("Lithops' configuration"):
        config: dict[str, Any] = load_config(options.get("config"))
        config["localhost"] = here | (config.get("localhost") or {})
        looks = {"monitoring_interval": LOOK_HERE_S} if "monitoring_interval" not in (config.get("lithops") or {}) else {}
        found: dict[str, Any] = default_config(config_data=config, config_overwrite=chosen)
        found["lithops"] |= looks if runs_here(found) else {}
    return found


def runs_here(config: dict[str, Any]) -> bool:
    """Whether calls are processes of this machine, which reach its embedded store and its folders."""
    return bool(config["lithops"]["backend"] == "localhost" and str(config["localhost"]["runtime"]).startswith("/"))
