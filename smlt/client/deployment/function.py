"""The function itself: created, or updated only where it differs from what was asked for."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smlt._version import __version__
from smlt.client.deployment.cloud import Cloud, asking, may_lack
from smlt.client.deployment.limits import size_text
from smlt.client.deployment.names import MANAGED, MANAGED_TAG, PACKAGE_TAG, VERSION_TAG, is_managed
from smlt.client.deployment.package import PRELOADABLE, Package
from smlt.client.deployment.request import DeployRequest
from smlt.client.deployment.steps import Step, Work
from smlt.client.deployment.upload import code_of
from smlt.errors import DeployError
from smlt.store.aws import error_code

#: A new role is known everywhere within seconds; this long it is waited for.
ROLE_WAIT_S = 60.0
#: Between two looks at a function that is not ready yet; the network interfaces of a VPC take about a minute.
LOOK_EVERY_S, LOOKS = 1, 300


@dataclass(frozen=True)
class Found:
    """A function as GetFunction shows it."""

    configuration: Mapping[str, Any]
    code: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    reserved_concurrency: int | None = None


@dataclass(frozen=True)
class Changes:
    """What an existing function lacks: its code, fields of its configuration, tags. `busy`: an earlier change is under way."""

    busy: bool
    code: bool
    fields: dict[str, Any]
    tags: dict[str, str]


def find_function(cloud: Cloud, name: str) -> Found | None:
    """The function, None when there is none of that name."""
    with asking(f"cannot look at function {name}"), may_lack("ResourceNotFoundException"):
        answer = cloud.client("lambda").get_function(FunctionName=name)
        reserved = answer.get("Concurrency", {}).get("ReservedConcurrentExecutions")
        return Found(answer["Configuration"], answer.get("Code", {}), answer.get("Tags", {}), reserved)
    return None


def wanted_environment(request: DeployRequest, imports: frozenset[str], modules: frozenset[str]) -> dict[str, str]:
    """The function's variables. `imports`: of the package; `modules`: what package and layer hold."""
    there = imports if request.image is not None else imports & modules
    preload = ",".join(name for name in PRELOADABLE if name in there)
    variables = {"SMLT_OBJECT_STORE": request.place.url}
    if request.store:
        variables["SMLT_STORE"] = request.store
    if preload:
        variables["SMLT_PRELOAD"] = preload
    return {**variables, **request.environment}


def plan_function(
    cloud: Cloud,
    request: DeployRequest,
    package: Package | None,
    variables: dict[str, str],
    role_arn: str,
    layer_arn: str | None,
    new_layer: bool,
) -> Step:
    """What happens to the function. `package` is None with an image. `new_layer`: the layer's ARN comes while carrying out."""
    name, found = request.function, find_function(cloud, request.function)
    wanted = _configuration(request, variables, role_arn, layer_arn)
    tags = _tags(request, package)
    if found is None:
        size = size_text(package.zip.stat().st_size) if package else str(request.image)
        details = (f"{request.arch}, {request.memory_mb} MB, {request.timeout_s} s", size)
        return Step("function", name, "create", details, lambda work: _create(cloud, request, package, wanted, tags, work))
    if not is_managed(dict(found.tags)):
        raise DeployError(f"function {name} is there and was not made by smlt: choose another name, or delete it yourself")
    if found.configuration.get("PackageType", "Zip") != ("Zip" if package else "Image"):
        raise DeployError(
            f"function {name}: Lambda cannot change a function between a zip and an image: smlt destroy {name} first"
        )
    if found.configuration.get("State") == "Failed":
        reason = found.configuration.get("StateReason", "Lambda does not say why")
        raise DeployError(f"function {name} cannot run: {reason}; mend that, smlt destroy {name}, and deploy again")
    code = _code_differs(request, package, found)
    fields = _differing(wanted, found.configuration, new_layer)
    wrong = {key: value for key, value in tags.items() if found.tags.get(key) != value}
    differs = (*code, *_shown(fields, wanted, found.configuration), *sorted(wrong))
    if not differs:
        return Step("function", name, "keep")
    busy = found.configuration.get("State") == "Pending" or found.configuration.get("LastUpdateStatus") == "InProgress"
    changes = Changes(busy, bool(code), {field: wanted[field] for field in fields}, wrong)
    return Step("function", name, "update", differs, lambda work: _update(cloud, request, package, changes, work))


def _configuration(request: DeployRequest, variables: dict[str, str], role_arn: str, layer_arn: str | None) -> dict[str, Any]:
    """The fields that CreateFunction and UpdateFunctionConfiguration share."""
    fields: dict[str, Any] = {
        "Role": role_arn,
        "Timeout": request.timeout_s,
        "MemorySize": request.memory_mb,
        "EphemeralStorage": {"Size": request.tmp_mb},
        "Environment": {"Variables": variables},
        "VpcConfig": {"SubnetIds": sorted(request.subnets), "SecurityGroupIds": sorted(request.security_groups)},
    }
    if request.image is None:
        fields |= {"Runtime": request.runtime, "Handler": request.handler, "Layers": [layer_arn] if layer_arn else []}
    return fields


def _tags(request: DeployRequest, package: Package | None) -> dict[str, str]:
    sha256 = package.sha256 if package else str(request.image).partition("@sha256:")[2]
    return {MANAGED_TAG: MANAGED, VERSION_TAG: __version__, PACKAGE_TAG: sha256}


def _code_differs(request: DeployRequest, package: Package | None, found: Found) -> list[str]:
    if package is None:
        return [] if found.code.get("ImageUri") == request.image else [f"image {request.image}"]
    differs = []
    if found.configuration["CodeSha256"] != package.code_sha256:
        differs.append(f"code ({size_text(package.zip.stat().st_size)})")
    if found.configuration.get("Architectures", ["x86_64"]) != [request.arch]:
        differs.append(f"architecture {request.arch}")
    return differs


def _there(configuration: Mapping[str, Any], name: str) -> Any:
    """A field as `_configuration` writes it."""
    value = configuration.get(name)
    if name == "Layers":
        return [layer["Arn"] for layer in value or []]
    if name == "VpcConfig":
        return {key: sorted((value or {}).get(key, [])) for key in ("SubnetIds", "SecurityGroupIds")}
    if name == "Environment":
        return {"Variables": (value or {}).get("Variables", {})}
    return {"Size": 512} if name == "EphemeralStorage" and value is None else value


def _differing(wanted: dict[str, Any], there: Mapping[str, Any], new_layer: bool) -> list[str]:
    return [name for name, value in wanted.items() if _there(there, name) != value or (name == "Layers" and new_layer)]


def _shown(fields: list[str], wanted: dict[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What differs, for the plan. Of variables only the names: a value may be a secret."""
    shown = []
    for name in fields:
        old, new = _there(there, name), wanted[name]
        if name == "Environment":
            before, after = old["Variables"], new["Variables"]
            changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
            shown.append(f"variables {', '.join(changed)}")
        elif name in ("Timeout", "MemorySize", "Runtime", "Handler", "Role"):
            shown.append(f"{name} {old} -> {new}")
        elif name == "EphemeralStorage":
            shown.append(f"{name} {old['Size']} -> {new['Size']}")
        else:
            shown.append(name)
    return shown


def _create(
    cloud: Cloud, request: DeployRequest, package: Package | None, wanted: dict[str, Any], tags: dict[str, str], work: Work
) -> None:
    client, name = cloud.client("lambda"), request.function
    fields = dict(wanted)
    if work.layer_arn:
        fields["Layers"] = [work.layer_arn]
    if not request.subnets:
        del fields["VpcConfig"]
    code = _code(cloud, request, package, work)
    kind = "Zip" if package else "Image"
    call = {"FunctionName": name, "Code": code, "PackageType": kind, "Architectures": [request.arch], "Tags": tags, **fields}
    with asking(f"cannot create function {name}"):
        _when_role_is_known(work, lambda: client.create_function(**call))
    work.made(f"function {name}", lambda: client.delete_function(FunctionName=name))
    _wait(cloud, name, "function_active_v2", work)


def _update(cloud: Cloud, request: DeployRequest, package: Package | None, changes: Changes, work: Work) -> None:
    client, name, fields = cloud.client("lambda"), request.function, dict(changes.fields)
    if changes.busy:  # Lambda refuses a change while it makes another one
        _wait(cloud, name, "function_active_v2", work)
        _wait(cloud, name, "function_updated_v2", work)
    if fields:
        if "Layers" in fields and work.layer_arn:
            fields["Layers"] = [work.layer_arn]
        with asking(f"cannot change the configuration of function {name}"):
            _when_role_is_known(work, lambda: client.update_function_configuration(FunctionName=name, **fields))
        work.settled()
        _wait(cloud, name, "function_updated_v2", work)
    if changes.code:
        code = _code(cloud, request, package, work)
        with asking(f"cannot change the code of function {name}"):
            client.update_function_code(FunctionName=name, Architectures=[request.arch], **code)
        work.settled()
        _wait(cloud, name, "function_updated_v2", work)
    if changes.tags:
        with asking(f"cannot tag function {name}"):
            client.tag_resource(Resource=cloud.account.arn("lambda", f"function:{name}"), Tags=changes.tags)


def _code(cloud: Cloud, request: DeployRequest, package: Package | None, work: Work) -> dict[str, Any]:
    if package is None:
        return {"ImageUri": request.image}
    return code_of(cloud, request, package.zip, f"package-{package.sha256}.zip", work)


def _when_role_is_known(work: Work, call: Any) -> None:
    """Ask again while Lambda does not know a role, or its rights, that were written moments ago.

    https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_general.html#troubleshoot_general_eventual-consistency
    """
    from botocore.exceptions import ClientError

    began, pause = time.monotonic(), 0.5
    while True:
        try:
            call()
            return
        except ClientError as error:
            text = str(error)
            waits = work.role_is_new and ("cannot be assumed" in text or "execution role does not have permissions" in text)
            if not waits or error_code(error) != "InvalidParameterValueException" or time.monotonic() - began > ROLE_WAIT_S:
                raise
        work.report.waiting("until Lambda knows the new role")
        time.sleep(pause * random.uniform(0.8, 1.2))
        pause = min(2 * pause, 8.0)


def _wait(cloud: Cloud, name: str, until: str, work: Work) -> None:
    work.report.waiting("until the function is ready")
    with asking(f"function {name} does not become ready"):
        waiter = cloud.client("lambda").get_waiter(until)
        waiter.wait(FunctionName=name, WaiterConfig={"Delay": LOOK_EVERY_S, "MaxAttempts": LOOKS})


def plan_invocation(cloud: Cloud, request: DeployRequest, is_new: bool) -> Step:
    """Lambda tries no event a second time: the scheduler decides what happens to a lost worker."""
    name = request.function
    retries = None
    if not is_new:
        with asking(f"cannot look at the asynchronous invocations of function {name}"), may_lack("ResourceNotFoundException"):
            retries = cloud.client("lambda").get_function_event_invoke_config(FunctionName=name).get("MaximumRetryAttempts")
    if retries == 0:
        return Step("invocation", name, "keep", ("no retries by Lambda",))

    def put(_: Work) -> None:
        with asking(f"cannot set the asynchronous invocations of function {name}"):
            cloud.client("lambda").put_function_event_invoke_config(FunctionName=name, MaximumRetryAttempts=0)

    return Step("invocation", name, "create" if retries is None else "update", ("no retries by Lambda",), put)
