"""Before functions are invoked for a run: is there room for all of them, have they the memory that was asked for, and do
they reach the stores? What cannot work is said before anything is started."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from smlt._version import __version__
from smlt.client.deployment.lookup import Deployment, find_deployment
from smlt.client.executors.invocation import Invoker
from smlt.client.invocations import Invocation
from smlt.errors import ConfigError, DeployError
from smlt.store.aws import aws_client, aws_errors
from smlt.store.url import addresses
from smlt.worker.processors import threads_of

HANDLER = "smlt.worker.handler.handler"
#: How long Lambda may take to change a function's configuration.
CHANGE_S = 120
#: How long a function may be seen with the memory of another run's version, and how often it is looked at.
LENT_S, REST_EVERY_S = 10.0, 0.5
#: Over the wire an invocation may take as long as the longest function, and some.
READ_TIMEOUT_S = 960
PROBE_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Target:
    """A function that is ready to be invoked: with which memory, and how many at once."""

    deployment: Deployment
    qualifier: str | None  # the alias with that memory; None: the function as it is
    memory_mb: int
    concurrency: int

    @property
    def threads(self) -> int:
        """Threads that its processors are worth."""
        return threads_of(self.memory_mb)


def lambda_client(connections: int) -> Any:
    """A client for so many invocations at once, which tries nothing again by itself: the same invocation would run twice."""
    return aws_client("lambda", attempts=1, max_pool_connections=connections, read_timeout=READ_TIMEOUT_S, connect_timeout=10)


def prepare(function: str, workers: int, memory_mb: int | None) -> Target:
    """Find the function, give it the memory, see that `workers` can run at once. DeployError or ConfigError otherwise."""
    deployment = find_deployment(function)
    if deployment.handler not in ("", HANDLER):
        raise ConfigError(
            f"function {function} runs {deployment.handler}, not SMLT's workers: name another --function, or deploy it without "
            "--handler"
        )
    client = aws_client("lambda")
    concurrency = available(client, deployment)
    if workers > concurrency:
        limit = "its reserved" if deployment.reserved_concurrency is not None else "the account's unreserved"
        raise ConfigError(
            f"{workers} workers are as many invocations at once, but function {function} may have {concurrency} ({limit} "
            "concurrency): raise that, or give fewer --workers"
        )
    with aws_errors(f"cannot look at function {function}", DeployError):
        own: int = at_rest(client, function)["MemorySize"]
    memory = memory_mb or own
    qualifier = None if memory == own else alias_with_memory(client, function, memory)
    return Target(deployment, qualifier, memory, concurrency)


def available(client: Any, deployment: Deployment) -> int:
    """How many invocations of the function can run at once."""
    if deployment.reserved_concurrency is not None:
        return deployment.reserved_concurrency
    with aws_errors("cannot see the account's concurrency", DeployError):
        return int(client.get_account_settings()["AccountLimit"]["UnreservedConcurrentExecutions"])


def alias_with_memory(client: Any, function: str, memory_mb: int) -> str:
    """The alias that runs the function as it is now with another memory, made where it is missing or older.

    A version is published of the function as it is: it has that memory meanwhile, and its own again afterwards. A run that
    is to begin meanwhile waits (`at_rest`).
    """
    alias = f"smlt-{memory_mb}mb"
    deadline = time.monotonic() + CHANGE_S
    with aws_errors(f"cannot give function {function} {memory_mb} MB", DeployError):
        while True:
            latest = at_rest(client, function)
            try:
                there = client.get_function_configuration(FunctionName=function, Qualifier=alias)
            except client.exceptions.ResourceNotFoundException:
                there = None
            if there is not None and _same(there, latest) and there["MemorySize"] == memory_mb:
                return alias
            try:
                version = _publish(client, function, latest, memory_mb)
                break
            except client.exceptions.ResourceConflictException:  # somebody else changes it at this moment
                if time.monotonic() > deadline:
                    raise
                time.sleep(REST_EVERY_S)
        client.get_waiter("published_version_active").wait(FunctionName=function, Qualifier=version, WaiterConfig=_WAIT)
        point = {"FunctionName": function, "Name": alias, "FunctionVersion": version}
        if there is None:
            with suppress(client.exceptions.ResourceConflictException):  # another run has made it meanwhile
                client.create_alias(**point)
        client.update_alias(**point)
    return alias


_WAIT = {"Delay": 1, "MaxAttempts": CHANGE_S}
#: A function's description while it has another memory than its own. Whoever wrote it may have been ended since.
_LENT = "smlt: {} MB for a moment, {} MB of its own"
_LENT_PATTERN = re.compile(r"smlt: (\d+) MB for a moment, (\d+) MB of its own")


def at_rest(client: Any, function: str) -> dict[str, Any]:
    """The function's configuration when nobody is changing it, and with its own memory, as far as SMLT knows."""
    since: float | None = None
    while True:
        client.get_waiter("function_updated_v2").wait(FunctionName=function, WaiterConfig=_WAIT)
        found: dict[str, Any] = client.get_function_configuration(FunctionName=function)
        lent = _LENT_PATTERN.fullmatch(found.get("Description") or "")
        if lent is None or int(lent[1]) != found["MemorySize"]:
            return found
        since = since or time.monotonic()
        if time.monotonic() - since > LENT_S:  # a publication takes less: who has borrowed it will not give it back
            _configure(client, function, MemorySize=int(lent[2]), Description="")
        time.sleep(REST_EVERY_S)


def _publish(client: Any, function: str, latest: dict[str, Any], memory_mb: int) -> str:
    """A version with that memory; the function has its own again behind it, also behind a Ctrl-C."""
    own: int = latest["MemorySize"]
    client.update_function_configuration(FunctionName=function, MemorySize=memory_mb, Description=_LENT.format(memory_mb, own))
    try:
        client.get_waiter("function_updated_v2").wait(FunctionName=function, WaiterConfig=_WAIT)
        made = client.publish_version(FunctionName=function, Description=f"smlt: {memory_mb} MB")
    finally:
        client.get_waiter("function_updated_v2").wait(FunctionName=function, WaiterConfig=_WAIT)
        _configure(client, function, MemorySize=own, Description=latest.get("Description") or "")
    if made["MemorySize"] != memory_mb:
        raise DeployError(f"function {function} was changed while it was given {memory_mb} MB: try again")
    return str(made["Version"])


def _configure(client: Any, function: str, **changes: Any) -> None:
    client.update_function_configuration(FunctionName=function, **changes)
    client.get_waiter("function_updated_v2").wait(FunctionName=function, WaiterConfig=_WAIT)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two versions differ in nothing but their memory."""
    fields = (
        *("CodeSha256", "Runtime", "Handler", "ImageConfigResponse", "Timeout", "Role", "Environment", "Architectures"),
        *("EphemeralStorage", "LoggingConfig"),
    )
    layers = [[layer["Arn"] for layer in version.get("Layers", [])] for version in (one, other)]
    networks = [
        [sorted(version.get("VpcConfig", {}).get(kind) or []) for kind in ("SubnetIds", "SecurityGroupIds")]
        for version in (one, other)
    ]
    alike = layers[0] == layers[1] and networks[0] == networks[1]
    return alike and all(one.get(field) == other.get(field) for field in fields)


def check_reach(invoker: Invoker, target: Target, store_url: str, object_store_url: str) -> Invocation | None:
    """Have the function look for the stores itself; returns that invocation, which is billed like any other.

    DeployError or ConfigError with the one thing to change.
    """
    event = {"smlt_probe": {"store_url": store_url, "object_store_url": object_store_url}}
    answer = invoker.invoke(event, threading.Event(), PROBE_PATIENCE_S)
    function = target.deployment.function
    if answer.error is not None:
        raise answer.error
    found = answer.payload
    if answer.ended != "answered" or "smlt" not in found:
        raise DeployError(f"function {function} does not answer a probe: it {answer.account or 'gave something else'}")
    if found["smlt"] != __version__:
        raise DeployError(f"function {function} has smlt {found['smlt']}, not {__version__}: deploy it again, with its layer")
    if found["store"]:
        raise ConfigError(_store_advice(target, store_url, str(found["store"])))
    if found["objects"]:
        way = ": its VPC needs a gateway endpoint for S3, and the role rights on it" if target.deployment.vpc else ""
        raise ConfigError(f"function {function} cannot use {object_store_url}{way}; it says: {found['objects']}")
    return None if answer.row is None else replace(answer.row, worker_id="probe", outcome="probe")


def _store_advice(target: Target, store_url: str, said: str) -> str:
    function, where = target.deployment.function, ", ".join(addresses(store_url))
    if not said.startswith("StoreUnavailable"):
        return f"function {function} cannot use the store at {where}; it says: {said}"
    if target.deployment.vpc:
        advice = "let the store's security group admit that port from the function's security group, in the same VPC"
    else:
        advice = (
            "it is in no VPC, and a store mostly is: deploy it with --subnet and --security-group of the store's VPC, and let "
            "the store's security group admit it"
        )
    return f"function {function} cannot reach the store at {where}: {advice}; it says: {said}"
