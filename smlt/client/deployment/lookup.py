"""A deployment as it is in AWS, for the commands that use one: `smlt train --on lambda`, `smlt logs`."""

from __future__ import annotations

from dataclasses import dataclass

from smlt.client.deployment.cloud import Cloud
from smlt.client.deployment.function import find_function
from smlt.client.deployment.names import check_function_name, log_group
from smlt.errors import DeployError


@dataclass(frozen=True)
class Deployment:
    """A function that SMLT's workers run in.

    `runtime`: "python3.12", "" for an image. `handler`: what Lambda calls, "" for an image, which says it itself.
    `object_store`: s3://bucket/prefix. `store`: the parameter store's URL with the reference to its password, None when runs
    bring their own. `vpc`: whether it is in a VPC. `reserved_concurrency`: sandboxes that are set aside for it, None when it
    shares the account's.
    """

    function: str
    arn: str
    memory_mb: int
    tmp_mb: int
    timeout_s: int
    arch: str
    runtime: str
    handler: str
    package_type: str
    object_store: str
    store: str | None
    vpc: bool
    reserved_concurrency: int | None
    log_group: str


def find_deployment(function: str) -> Deployment:
    """The deployed function of that name. DeployError when there is none, or it is not one of SMLT's."""
    check_function_name(function)
    found = find_function(Cloud(), function)
    how = f"smlt deploy {function} BUCKET PACKAGE ROLE"
    if found is None:
        raise DeployError(f"there is no function {function} in this account and region: {how}")
    there = found.configuration
    variables = there.get("Environment", {}).get("Variables", {})
    if not variables.get("SMLT_OBJECT_STORE"):
        raise DeployError(f"function {function} was not made by smlt (it has no SMLT_OBJECT_STORE): {how}, with another name")
    return Deployment(
        function=function,
        arn=there["FunctionArn"],
        memory_mb=int(there["MemorySize"]),
        tmp_mb=int(there.get("EphemeralStorage", {}).get("Size", 512)),
        timeout_s=int(there["Timeout"]),
        arch=there.get("Architectures", ["x86_64"])[0],
        runtime=there.get("Runtime") or "",
        handler=there.get("Handler") or "",
        package_type=there.get("PackageType", "Zip"),
        object_store=variables["SMLT_OBJECT_STORE"],
        store=variables.get("SMLT_STORE"),
        vpc=bool((there.get("VpcConfig") or {}).get("SubnetIds")),
        reserved_concurrency=None if found.reserved_concurrency is None else int(found.reserved_concurrency),
        log_group=there.get("LoggingConfig", {}).get("LogGroup") or log_group(function),
    )
