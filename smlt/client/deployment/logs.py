"""The function's log group: made first, with how long lines are kept and with tags that lead to the rest of a deployment."""

from __future__ import annotations

from dataclasses import dataclass

from smlt.client.deployment.cloud import Cloud, asking
from smlt.client.deployment.names import FUNCTION_TAG, MANAGED, MANAGED_TAG, ROLE_TAG, STORE_TAG, is_managed, log_group
from smlt.client.deployment.request import DeployRequest
from smlt.client.deployment.steps import Step, Work


@dataclass(frozen=True)
class LogGroup:
    """A log group as it is in AWS. `days`: how long lines are kept, None for ever."""

    arn: str
    days: int | None
    tags: dict[str, str]


def find_log_group(cloud: Cloud, function: str) -> LogGroup | None:
    """The function's log group, None when there is none."""
    name, logs = log_group(function), cloud.client("logs")
    with asking(f"cannot look at log group {name}"):
        for group in logs.describe_log_groups(logGroupNamePrefix=name).get("logGroups", []):  # itself is the first
            if group["logGroupName"] == name:
                arn = cloud.account.arn("logs", f"log-group:{name}")  # AWS's own ends with ":*", which tags do not know
                return LogGroup(arn, group.get("retentionInDays"), logs.list_tags_for_resource(resourceArn=arn).get("tags", {}))
    return None


def plan_log_group(cloud: Cloud, request: DeployRequest) -> Step:
    """What happens to the log group. One that SMLT has not made keeps its retention: old lines would be deleted."""
    name = log_group(request.function)
    tags = {MANAGED_TAG: MANAGED, FUNCTION_TAG: request.function, ROLE_TAG: request.role.name, STORE_TAG: request.place.url}
    group = find_log_group(cloud, request.function)
    if group is None:
        return Step(
            "log group",
            name,
            "create",
            (f"lines kept {request.log_days} days",),
            lambda work: _create(cloud, request, tags, work),
        )
    if not is_managed(group.tags):
        return Step("log group", name, "keep", ("not made by smlt",))
    days = request.log_days if group.days != request.log_days else None
    wrong = {key: value for key, value in tags.items() if group.tags.get(key) != value}
    if days is None and not wrong:
        return Step("log group", name, "keep")
    details = ([f"lines kept {days} days"] if days else []) + (["tags"] if wrong else [])

    def update(_: Work) -> None:
        with asking(f"cannot change log group {name}"):
            if days:
                cloud.client("logs").put_retention_policy(logGroupName=name, retentionInDays=days)
            if wrong:
                cloud.client("logs").tag_resource(resourceArn=group.arn, tags=wrong)

    return Step("log group", name, "update", tuple(details), update)


def _create(cloud: Cloud, request: DeployRequest, tags: dict[str, str], work: Work) -> None:
    name, logs = log_group(request.function), cloud.client("logs")
    with asking(f"cannot create log group {name}"):
        logs.create_log_group(logGroupName=name, tags=tags)
        work.made(f"log group {name}", lambda: logs.delete_log_group(logGroupName=name))
        logs.put_retention_policy(logGroupName=name, retentionInDays=request.log_days)
