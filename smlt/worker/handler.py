"""What a deployed function runs: `smlt.worker.handler.handler`, the entry point that AWS Lambda calls.

Two events: {"smlt_worker": WorkerConfig} takes part in a run until it ends, the function's time is up, or the job does
without this worker; {"smlt_probe": {"store_url", "object_store_url"}} says what the function can reach. A sandbox that is
invoked again still has model, data and connection. Modules named in SMLT_PRELOAD are imported when the sandbox is made,
where Lambda gives a function more processor than it pays for.
https://docs.aws.amazon.com/lambda/latest/dg/python-handler.html
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smlt.worker.processors import limit_threads

limit_threads()  # before NumPy is loaded

from smlt._version import __version__  # noqa: E402
from smlt.errors import ConfigError, SmltError  # noqa: E402
from smlt.store.object import open_object_store  # noqa: E402
from smlt.store.parameter import ParameterStore  # noqa: E402
from smlt.store.secrets import resolve_store_url  # noqa: E402
from smlt.worker.config import WorkerConfig  # noqa: E402
from smlt.worker.main import Sandbox  # noqa: E402

#: A store that is to be reached answers within that; a wrong security group drops packets, and nothing answers at all.
PROBE_S = 5.0
#: From the function's time, for what comes before and behind the worker.
MARGIN_S = 0.2


def preload(names: str) -> None:
    """Import the modules in `names`, separated by commas. One that is missing is the task's to tell, if it needs it."""
    for name in filter(None, (part.strip() for part in names.split(","))):
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"SMLT_PRELOAD: {name} cannot be imported: {error}", file=sys.stderr, flush=True)


preload(os.environ.get("SMLT_PRELOAD", ""))
_sandbox = Sandbox(ends_itself=False)


def handler(event: Mapping[str, Any], context: Any) -> dict[str, Any]:
    """Work for a run, or answer a probe.

    Returns for a worker {"exit_code", "ended", "requests"}: a failure that SMLT knows is told by its code (see
    `smlt.errors`), and by the store; requests are those to the object store, by kind. ConfigError for any other event.
    """
    if isinstance(event, Mapping):
        if isinstance(event.get("smlt_worker"), Mapping):
            return _work(event["smlt_worker"], context)
        if isinstance(event.get("smlt_probe"), Mapping):
            return probe(event["smlt_probe"])
    raise ConfigError(
        'this function trains for `smlt train --on lambda`: its event holds "smlt_worker" or "smlt_probe". In a handler of '
        "your own, call smlt.init(event) and smlt.allreduce(gradient)"
    )


def _work(values: Mapping[str, Any], context: Any) -> dict[str, Any]:
    config = WorkerConfig.from_json(json.dumps(dict(values)))
    # The truth about who this invocation was, also where its answer is lost, or it is a duplicate.
    print(f"smlt run={config.run} worker={config.worker_id} rank={config.rank}", flush=True)
    store_url = resolve_store_url(config.store_url)  # may ask a secret manager: that is of the function's time, too
    left_s = context.get_remaining_time_in_millis() / 1000 - MARGIN_S
    if config.time_limit_s is not None:
        left_s = min(left_s, config.time_limit_s)
    config = replace(config, store_url=store_url, time_limit_s=max(0.1, left_s))
    before = _sandbox.requests()
    code, ended = _sandbox.invoke(config)
    after = _sandbox.requests()
    requests = {kind: count - before.get(kind, 0) for kind, count in after.items()}
    return {"exit_code": code, "ended": ended, "requests": requests}


def probe(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What this function is and what it reaches: for each store "" when it does, else what is wrong."""
    return {
        "smlt": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "store": _reach_store(asked.get("store_url")),
        "objects": _reach_objects(asked.get("object_store_url")),
    }


def _reach_store(url: str | None) -> str:
    try:
        resolved = resolve_store_url(url)
        if resolved is None:
            return ""
        parameters = ParameterStore(resolved, job="probe", timeout_s=PROBE_S, retries=0)
        try:
            parameters.check()
        finally:
            parameters.close()
        return ""
    except SmltError as error:
        return f"{type(error).__name__}: {error}"


def _reach_objects(url: str | None) -> str:
    if not url:
        return ""
    began = time.monotonic()
    try:
        open_object_store(url).exists("probe")
        return ""
    except SmltError as error:
        return f"{type(error).__name__}: {error} (after {time.monotonic() - began:.0f} s)"
