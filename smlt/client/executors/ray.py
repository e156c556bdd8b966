"""Workers as tasks of Ray, https://docs.ray.io: on a cluster that there is, or on this machine.

One task is one worker, `smlt.worker.called.work`. Ray moves neither gradients nor data: workers meet in the parameter store,
code and data come from the run's object store. The cluster's nodes need smlt and what the task imports.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from smlt._version import __version__
from smlt.client.executors import RunContext, Traits, elsewhere
from smlt.client.executors.calls import LOOK_S, CallingExecutor, CallWorker, Ending
from smlt.client.executors.local import threads_per_worker
from smlt.errors import ConfigError
from smlt.worker.called import work

if TYPE_CHECKING:
    from smlt.client.request import RunRequest

#: A cluster may have to grow, or to make an environment, before a worker can give a sign of life.
START_S = 300.0
#: Of the object store of a Ray on this machine: nothing lies in it. The least that Ray takes is 75 MiB.
OBJECTS_BYTES = 80 << 20
KILLED = -9


class RayExecutor(CallingExecutor):
    """Tasks of Ray, on a cluster or, without an address, on this machine."""

    options: ClassVar = {
        "address": 'HOST:PORT, "auto" or ray://HOST:PORT of a cluster; else $RAY_ADDRESS, else this machine',
        "num_cpus": "K, processors that each worker asks Ray for, and computes with (1 on a cluster)",
        "runtime_env": "FILE, a runtime environment of Ray's as JSON",
        "start_s": f"SECONDS within which a worker must give a sign of life ({START_S:g})",
    }

    def __init__(self, context: RunContext, stack: ExitStack) -> None:
        import ray

        super().__init__()
        options, address = context.request.on_options, _address(context.request)
        self._stack, self._here, self.where = stack, address is None, f"Ray at {address or 'this machine'}"
        self._num_cpus = elsewhere.number(options, "num_cpus", 0 if self._here else 1)  # here all begin, as local ones do
        self._store_url = stack.enter_context(elsewhere.private_url(context.store_url)) if self._here else context.store_url
        self.traits = Traits(start_s=elsewhere.number(options, "start_s", 0 if self._here else START_S))
        # Not "ray": init takes the handlers of that away.
        stack.enter_context(elsewhere.logged_to(context.run.log_path("ray"), "ray._private"))
        # What a node says of a task that has died is printed to stdout, whatever was asked for.
        private, logger = ray._private.worker, logging.getLogger("ray._private")
        stack.callback(setattr, private, "print_to_stdstream", private.print_to_stdstream)
        private.print_to_stdstream = lambda data, **_: logger.warning("%s", " ".join(data["lines"]))
        stack.callback(ray.shutdown)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here has nothing to report
        alone = {"object_store_memory": OBJECTS_BYTES, "include_dashboard": False}
        with _signals_kept():
            ray.init(
                address or "local",
                **(alone if self._here else {}),
                runtime_env=_runtime_env(options["runtime_env"]) if "runtime_env" in options else None,
                log_to_driver=False,
                configure_logging=False,
                namespace="smlt",
            )
        self._task = ray.remote(num_cpus=self._num_cpus, max_retries=0, max_calls=1)

    @classmethod
    def lacks(cls) -> str:
        return "" if elsewhere.is_installed("ray") else "Ray is not installed: pip install 'smlt[ray]'"

    @classmethod
    def place(cls, request: RunRequest, store: str | None) -> tuple[RunRequest, str | None]:
        if (address := _address(request)) is None:
            return super().place(request, store)
        return elsewhere.place_elsewhere(request, store, f"Ray at {address}")

    @classmethod
    def open(cls, context: RunContext) -> Self:
        import ray

        with elsewhere.engine_errors("Ray cannot be used"), ExitStack() as stack:
            made = cls(context, stack)
            if not made._here:
                wait_s = made.traits.start_s
                elsewhere.check_reach(lambda run, it: ray.get(made._task(run).remote(it), timeout=wait_s), made.where, context)
            made._stack = stack.pop_all()
        return made

    def threads(self, world_size: int) -> int:
        return int(self._num_cpus) or (threads_per_worker(world_size) if self._here else 1)

    def call(self, worker: CallWorker) -> Ending:
        import ray

        config = replace(worker.config, store_url=self._store_url)
        reference = self._task(work).remote(config.to_json(), __version__)
        while not ray.wait([reference], timeout=LOOK_S)[0]:
            if worker.given_up.is_set():
                ray.cancel(reference, force=True)  # ends its process, and with that the worker
                return Ending(KILLED)
        try:
            found = ray.get(reference)
        except ray.exceptions.RuntimeEnvSetupError as error:
            return Ending(error=ConfigError(f"{self.where}: the runtime environment cannot be made: {error}"))
        except ray.exceptions.RayError as error:  # its process has died, its node is gone, it is out of memory
            return Ending(1, f"was lost by {self.where}: {type(error).__name__}: {' '.join(str(error).split())}")
        return Ending(found["exit_code"], log=found["log"])

    def close(self) -> None:
        self._stack.close()


def _address(request: RunRequest) -> str | None:
    """The cluster's address; None: there is none, and Ray is started on this machine."""
    address = request.on_options.get("address") or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, in the main thread."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _runtime_env(path: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--on-option runtime_env={path}: {error}") from error
    return found
