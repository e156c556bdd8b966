"""IAM policies: what a function may do, and what whoever deploys it must be allowed. Each names its resources."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from smlt.client.deployment.names import Account, Place, RoleName, layer_name, log_group
from smlt.client.deployment.request import Secret
from smlt.client.deployment.rights import COMMANDS, Right, rights_for

Policy = dict[str, Any]
_VERSION = "2012-10-17"

#: What Lambda does for a function in a VPC, with the function's rights. These actions know no resource:
#: https://docs.aws.amazon.com/lambda/latest/dg/configuration-vpc.html#configuration-vpc-permissions
NETWORK_ACTIONS = (
    "ec2:AssignPrivateIpAddresses",
    "ec2:CreateNetworkInterface",
    "ec2:DeleteNetworkInterface",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSubnets",
    "ec2:UnassignPrivateIpAddresses",
)


def trust_policy() -> Policy:
    """Who may take the function's role: Lambda."""
    return _policy({"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"})


def trusts_lambda(policy: Policy) -> bool:
    """Whether Lambda may take a role that has this trust policy."""
    statements = policy.get("Statement", [])
    for statement in statements if isinstance(statements, list) else [statements]:
        principal = statement.get("Principal", {})
        services = _listed(principal.get("Service", [])) if isinstance(principal, dict) else _listed(principal)
        if (
            statement.get("Effect") == "Allow"
            and {"lambda.amazonaws.com", "*"} & set(services)
            and {"sts:AssumeRole", "sts:*", "*"} & set(_listed(statement.get("Action", [])))
        ):
            return True
    return False


def function_policy(
    function: str,
    place: Place,
    account: Account,
    secrets: Sequence[Secret] = (),
    *,
    vpc: bool = False,
    kms_key: str | None = None,
) -> Policy:
    """What the function may do: write its own log, keep objects below the prefix, read its store's secret.

    `vpc`: and have network interfaces. `kms_key`: the ARN of the key that encrypts the bucket by default.
    """
    group = account.arn("logs", f"log-group:{log_group(function)}")
    bucket = account.arn("s3", place.bucket)
    listing: dict[str, Any] = {"Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": bucket}
    if place.prefix:
        listing["Condition"] = _below(place)
    statements: list[dict[str, Any]] = [
        {"Sid": "Log", "Effect": "Allow", "Action": ["logs:CreateLogStream", "logs:PutLogEvents"], "Resource": f"{group}:*"},
        {
            "Sid": "Objects",
            "Effect": "Allow",
            "Action": ["s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:PutObject"],
            "Resource": f"{bucket}/{place.key('*')}",
        },
        {"Sid": "List", **listing},
    ]
    for number, secret in enumerate(secrets):
        service = "secretsmanager" if secret.scheme == "aws-secretsmanager" else "ssm"
        action = "secretsmanager:GetSecretValue" if service == "secretsmanager" else "ssm:GetParameter"
        sid = "Secret" if number == 0 else f"Secret{number + 1}"
        statements.append(
            {"Sid": sid, "Effect": "Allow", "Action": [action], "Resource": _secret_arn(secret, account, service)}
        )
    if vpc:
        statements.append({"Sid": "Network", "Effect": "Allow", "Action": list(NETWORK_ACTIONS), "Resource": "*"})
    if kms_key:
        actions = ["kms:Decrypt", "kms:GenerateDataKey"]
        statements.append({"Sid": "Encryption", "Effect": "Allow", "Action": actions, "Resource": kms_key})
    return _policy(*statements)


@dataclass(frozen=True)
class Resources:
    """The ARNs of what one deployment consists of, by the names that the table of rights has for them.

    `layer`: the ARN of a layer version of somebody else's that the function has.
    """

    function: str
    place: Place
    role: RoleName
    account: Account
    image: str | None = None
    layer: str | None = None

    def arns(self, on: str) -> list[str]:
        """A function's ARN comes with and without a version, a log group's with and without its streams."""
        arn = self.account.arn
        function, layer = f"function:{self.function}", f"layer:{layer_name(self.function)}"
        group, bucket = f"log-group:{log_group(self.function)}", arn("s3", self.place.bucket)
        found: dict[str, list[str]] = {
            "any": ["*"],
            "function": [arn("lambda", function), arn("lambda", f"{function}:*")],
            "layer": [arn("lambda", layer)],
            "layer version": [arn("lambda", f"{layer}:*"), *([self.layer] if self.layer else [])],
            "role": [self.role.arn(self.account)],
            "log groups": [arn("logs", "log-group:*")],  # it lists, and knows no single group
            "log group": [arn("logs", group), arn("logs", f"{group}:*")],
            "bucket": [bucket],
            "objects": [f"{bucket}/{self.place.key('*')}"],
            "image": [self._repository()],
        }
        return found[on]

    def condition(self, name: str) -> dict[str, Any] | None:
        """The Condition of that name, None where it would not limit anything."""
        if name == "passed to lambda":
            return {"StringEquals": {"iam:PassedToService": "lambda.amazonaws.com"}}
        return _below(self.place) if name == "below the prefix" and self.place.prefix else None

    def _repository(self) -> str:
        # ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG
        found = re.match(r"(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.[^/]+/([^:@]+)", self.image or "")
        if found is None:
            return self.account.arn("ecr", "repository/*")
        return Account(found[1], found[2], self.account.partition).arn("ecr", f"repository/{found[3]}")


def deployer_policy(resources: Resources, commands: Iterable[str] = COMMANDS, options: Iterable[str] = ()) -> Policy:
    """What whoever runs `commands` on this deployment must be allowed, and no more.

    `options`: of "create_role", "create_bucket", "vpc" and "image" those that `smlt deploy` is run with.
    """
    groups: dict[tuple[str, str], list[Right]] = {}
    for right in rights_for(commands, options):
        groups.setdefault((right.on, right.condition), []).append(right)
    statements = []
    for (on, name), rights in groups.items():
        arns = resources.arns(on)
        statement: dict[str, Any] = {
            "Sid": "".join(word.capitalize() for word in f"{on} {name}".split()),
            "Effect": "Allow",
            "Action": sorted({right.action for right in rights}),
            "Resource": arns if len(arns) > 1 else arns[0],
        }
        condition = resources.condition(name)
        if condition is not None:
            statement["Condition"] = condition
        statements.append(statement)
    return _policy(*statements)


def _policy(*statements: dict[str, Any]) -> Policy:
    return {"Version": _VERSION, "Statement": list(statements)}


def _below(place: Place) -> dict[str, Any]:
    return {"StringLike": {"s3:prefix": [place.prefix, f"{place.prefix}/*"]}}


def _listed(value: Any) -> list[str]:
    return list(value) if isinstance(value, list) else [value]


def _secret_arn(secret: Secret, account: Account, service: str) -> str:
    if secret.name.startswith("arn:"):
        return secret.name
    where = Account(account.id, secret.region or account.region, account.partition)
    if service == "ssm":
        return where.arn("ssm", f"parameter/{secret.name}")
    # Secrets Manager adds a hyphen and six characters of its own to a name:
    # https://docs.aws.amazon.com/secretsmanager/latest/userguide/auth-and-access_iam-policies.html
    return where.arn("secretsmanager", f"secret:{secret.name}-??????")
