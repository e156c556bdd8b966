"""`smlt destroy`: remove what a deployment consists of, found by the function, its log group's tags, and its layer's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from smlt.client.deployment.bucket import bucket_region, bucket_tags
from smlt.client.deployment.cloud import Cloud, asking, may_lack
from smlt.client.deployment.function import Found, find_function
from smlt.client.deployment.layer import layer_versions
from smlt.client.deployment.limits import size_text
from smlt.client.deployment.logs import LogGroup, find_log_group
from smlt.client.deployment.names import (
    FUNCTION_TAG,
    LAYER_MARK,
    ROLE_TAG,
    STORE_TAG,
    Place,
    RoleName,
    check_function_name,
    is_managed,
    layer_name,
    log_group,
    policy_name,
)
from smlt.client.deployment.objects import find_leftovers, remove_leftovers
from smlt.client.deployment.role import find_role
from smlt.client.deployment.steps import Reporter, Step, Work, carry_out
from smlt.errors import ConfigError, DeployError
from smlt.store.aws import error_code

Confirm = Callable[[Sequence[Step]], bool]


def destroy(
    function: str,
    report: Reporter,
    confirm: Confirm,
    *,
    place: Place | None = None,
    role: RoleName | None = None,
    keep_logs: bool = False,
    data: bool = False,
    dry_run: bool = False,
) -> int:
    """Remove the deployment; returns how many things were removed, 0 when there was nothing.

    `place`, `role`: where AWS no longer tells. `data`: the runs below the prefix too. `confirm` is asked once, with what would
    be removed. DeployError for a function that SMLT has not made, and when something cannot be removed.
    """
    check_function_name(function)
    cloud = Cloud()
    steps = plan_removal(cloud, function, place, role, keep_logs=keep_logs, data=data)
    removals = [step for step in steps if step.action == "delete"]
    report.planned(steps, ())
    if removals and not dry_run and not confirm(removals):
        raise ConfigError("nothing was removed")
    if not dry_run:
        carry_out(steps, Work(report), "destroy again to go on")
    removals = [step for step in removals if step.action == "delete"]
    if not removals:
        line = f"there is nothing of {function} to remove" + ("" if place else "; what runs have left: --bucket BUCKET --data")
    elif dry_run:
        line = f"dry run: {len(removals)} to remove, nothing was touched"
    else:
        line = f"{function} is removed: {', '.join(step.kind for step in removals)}"
    report.ended({"event": "dry-run" if dry_run else "destroyed", "function": function, "removed": len(removals)}, line)
    return len(removals)


def plan_removal(
    cloud: Cloud, function: str, place: Place | None, role: RoleName | None, *, keep_logs: bool, data: bool
) -> list[Step]:
    """What would be removed, in its order, and what stays. The log group, whose tags lead to all, is last."""
    assert cloud.account  # credentials and region come before all else
    found = find_function(cloud, function)
    if found is not None and not is_managed(dict(found.tags)):
        raise DeployError(f"function {function} was not made by smlt: delete it yourself")
    group = find_log_group(cloud, function)
    place, role = place or _place(found, group), role or _role(found, group)
    steps = []
    if found is not None:
        steps.append(_removal(cloud, "function", function, lambda: _delete_function(cloud, function)))
    steps += _layer_steps(cloud, function)
    if place is not None:
        steps += _bucket_steps(cloud, function, place, data=data)
    if role is not None:
        steps += _role_steps(cloud, function, role)
    if group is not None:
        steps.append(_log_step(cloud, function, group, keep_logs=keep_logs))
    return steps


def _place(found: Found | None, group: LogGroup | None) -> Place | None:
    variables = found.configuration.get("Environment", {}).get("Variables", {}) if found else {}
    url = variables.get("SMLT_OBJECT_STORE") or (group.tags.get(STORE_TAG) if group else None)
    return Place.parse(url) if url else None


def _role(found: Found | None, group: LogGroup | None) -> RoleName | None:
    name = found.configuration.get("Role") if found else None
    name = name or (group.tags.get(ROLE_TAG) if group else None)
    return RoleName.parse(name) if name else None


def _removal(cloud: Cloud, kind: str, name: str, remove: Callable[[], object], *details: str) -> Step:
    def run(_: Work) -> None:
        with asking(f"cannot remove {kind} {name}"):
            remove()

    return Step(kind, name, "delete", details, run)


def _delete_function(cloud: Cloud, function: str) -> None:
    """With its versions and aliases."""
    with may_lack("ResourceNotFoundException"):
        cloud.client("lambda").delete_function(FunctionName=function)


def _layer_steps(cloud: Cloud, function: str) -> list[Step]:
    name, client = layer_name(function), cloud.client("lambda")
    versions = [version for version in layer_versions(cloud, function) if version.get("Description", "").startswith(LAYER_MARK)]

    def remove() -> None:
        for version in versions:
            client.delete_layer_version(LayerName=name, VersionNumber=version["Version"])

    return [_removal(cloud, "layer", name, remove, f"versions {len(versions)}")] if versions else []


def _bucket_steps(cloud: Cloud, function: str, place: Place, *, data: bool) -> list[Step]:
    region = bucket_region(cloud, place.bucket)
    if region is None:
        return []
    if region != cloud.region:
        raise DeployError(f"bucket {place.bucket} lies in {region}: give --region {region}, or another --bucket")
    own, runs = find_leftovers(cloud, place, function, data=data)
    steps = []
    for kind, left in (("files", own), ("runs", runs)):
        if left.any:
            told = f"{len(left.keys)} objects, {size_text(left.size)}; {len(left.uploads)} unfinished uploads"
            url = f"{place.url}/.deploy/{function}/" if kind == "files" else f"{place.url}/"
            steps.append(Step(kind, url, "delete", (told,), partial(remove_leftovers, cloud, left)))
    tags = bucket_tags(cloud, place.bucket)
    if is_managed(tags) and tags.get(FUNCTION_TAG) == function:
        step = Step("bucket", place.bucket, "delete", ("if it is empty then",))
        step.run = lambda work: _delete_bucket(cloud, place, function, step, work)
        steps.append(step)
    return steps


def _delete_bucket(cloud: Cloud, place: Place, function: str, step: Step, work: Work) -> None:
    from botocore.exceptions import ClientError

    with asking(f"cannot remove bucket {place.bucket}"), may_lack("NoSuchBucket"):
        try:
            cloud.client("s3").delete_bucket(Bucket=place.bucket)
        except ClientError as error:
            if error_code(error) != "BucketNotEmpty":
                raise
            step.action = "keep"
            how = f"smlt destroy {function} --bucket {place.url} --data"
            work.report.note(f"bucket {place.bucket} is not empty and stays, with what runs have left: {how}")


def _role_steps(cloud: Cloud, function: str, name: RoleName) -> list[Step]:
    role, iam, own = find_role(cloud, name), cloud.client("iam"), policy_name(function)
    if role is None or not is_managed(role.tags):
        return [] if role is None else [Step("role", name.name, "keep", ("not made by smlt",))]
    if users := _functions_with(cloud, role.arn, function):
        return [Step("role", name.name, "keep", (f"{', '.join(users)} has it",))]
    with asking(f"cannot look at the policies of role {name.name}"):
        inline = iam.list_role_policies(RoleName=name.name)["PolicyNames"]
        others = [policy for policy in inline if policy != own]
        others += [policy["PolicyName"] for policy in iam.list_attached_role_policies(RoleName=name.name)["AttachedPolicies"]]
    if others:
        keeps = f"it has {', '.join(others)}"
        if own not in inline:
            return [Step("role", name.name, "keep", (keeps,))]

    def remove() -> None:
        with may_lack("NoSuchEntity"):
            iam.delete_role_policy(RoleName=name.name, PolicyName=own)
        if not others:
            iam.delete_role(RoleName=name.name)

    if others:
        return [_removal(cloud, "policy", f"{name.name}/{own}", remove, f"the role stays: {keeps}")]
    return [_removal(cloud, "role", name.name, remove)]


def _functions_with(cloud: Cloud, role_arn: str, but: str) -> list[str]:
    """The other functions that have a role."""
    with asking("cannot list the functions"):
        pages = cloud.client("lambda").get_paginator("list_functions").paginate()
        found = [one for page in pages for one in page["Functions"]]
    return [one["FunctionName"] for one in found if one.get("Role") == role_arn and one["FunctionName"] != but]


def _log_step(cloud: Cloud, function: str, group: LogGroup, *, keep_logs: bool) -> Step:
    name = log_group(function)
    if keep_logs or not is_managed(group.tags):
        return Step("log group", name, "keep", ("--keep-logs" if keep_logs else "not made by smlt",))
    return _removal(cloud, "log group", name, lambda: cloud.client("logs").delete_log_group(logGroupName=name))
