"""The function's role: an existing one that Lambda may take, or one made with just the rights that the function needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from smlt.client.deployment.cloud import Cloud, asking, may_lack
from smlt.client.deployment.names import (
    FUNCTION_TAG,
    MANAGED,
    MANAGED_TAG,
    RoleName,
    as_tags,
    is_managed,
    policy_name,
    tag_list,
)
from smlt.client.deployment.policies import function_policy, trust_policy, trusts_lambda
from smlt.client.deployment.request import DeployRequest, store_secrets
from smlt.client.deployment.steps import Step, Work
from smlt.errors import DeployError


@dataclass(frozen=True)
class Role:
    """A role as it is in AWS."""

    arn: str
    trust: dict[str, Any]
    tags: dict[str, str]


def find_role(cloud: Cloud, name: RoleName) -> Role | None:
    """The role, None when there is none of that name. DeployError for a role of another account."""
    if name.account is not None and name.account != cloud.account.id:
        raise DeployError(f"role {name.name} is of account {name.account}, the credentials of {cloud.account.id}: use one")
    with asking(f"cannot look at role {name.name}"), may_lack("NoSuchEntity"):
        role = cloud.client("iam").get_role(RoleName=name.name)["Role"]
        return Role(role["Arn"], role["AssumeRolePolicyDocument"], as_tags(role.get("Tags", [])))
    return None


def plan_role(cloud: Cloud, request: DeployRequest, kms_key: str | None) -> tuple[Step, str]:
    """What happens to the role, and its ARN. DeployError when it is missing, or Lambda may not take it."""
    name = request.role.name
    secrets = store_secrets(request.store) if request.store else ()
    policy = function_policy(
        request.function, request.place, cloud.account, secrets, vpc=bool(request.subnets), kms_key=kms_key
    )
    role = find_role(cloud, request.role)
    if role is None:
        if not request.create_role:
            raise DeployError(
                f"there is no role {name}: give --create-role to have it made, or the ARN of one that has the rights "
                f"`smlt policy --function {request.function} {request.place.url}` prints"
            )
        arn = request.role.arn(cloud.account)
        return Step("role", name, "create", _shown(policy), lambda work: _create(cloud, request, policy, work)), arn
    if not trusts_lambda(role.trust):
        raise DeployError(
            f"role {name}: Lambda may not take it; its trust policy must allow lambda.amazonaws.com sts:AssumeRole"
        )
    if not is_managed(role.tags):
        return Step("role", name, "keep", ("not made by smlt: its rights are yours to give",)), role.arn
    if not request.create_role:  # whoever has no rights on roles deploys all the same
        return Step("role", name, "keep", ("its policy is looked at with --create-role",)), role.arn
    there = None
    with asking(f"cannot look at the policy of role {name}"), may_lack("NoSuchEntity"):
        there = cloud.client("iam").get_role_policy(RoleName=name, PolicyName=policy_name(request.function))["PolicyDocument"]
    if there == policy:
        return Step("role", name, "keep"), role.arn
    return Step(
        "role", name, "update", ("policy", *_shown(policy)), lambda work: _put_policy(cloud, request, policy, work)
    ), role.arn


def _shown(policy: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{', '.join(statement['Action'])} on {statement['Resource']}" for statement in policy["Statement"])


def _create(cloud: Cloud, request: DeployRequest, policy: dict[str, Any], work: Work) -> None:
    iam, role = cloud.client("iam"), request.role
    with asking(f"cannot create role {role.name}"):
        iam.create_role(
            RoleName=role.name,
            Path=role.path,
            AssumeRolePolicyDocument=json.dumps(trust_policy()),
            Description=f"What the function {request.function} may do; made by smlt deploy",
            Tags=tag_list({MANAGED_TAG: MANAGED, FUNCTION_TAG: request.function}),
        )
    work.made(f"role {role.name}", lambda: iam.delete_role(RoleName=role.name))
    _put_policy(cloud, request, policy, work)
    work.made("its policy", lambda: iam.delete_role_policy(RoleName=role.name, PolicyName=policy_name(request.function)))


def _put_policy(cloud: Cloud, request: DeployRequest, policy: dict[str, Any], work: Work) -> None:
    with asking(f"cannot write the policy of role {request.role.name}"):
        cloud.client("iam").put_role_policy(
            RoleName=request.role.name, PolicyName=policy_name(request.function), PolicyDocument=json.dumps(policy)
        )
    work.role_is_new = True
