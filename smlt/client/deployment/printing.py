"""`smlt policy`: both policies of a deployment, whether or not it is there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from smlt.client.deployment.cloud import Cloud
from smlt.client.deployment.names import Account, Place, RoleName, check_function_name
from smlt.client.deployment.policies import Policy, Resources, deployer_policy, function_policy
from smlt.client.deployment.request import store_secrets
from smlt.client.deployment.rights import COMMANDS
from smlt.errors import ConfigError


def print_policies(
    function: str,
    place: Place,
    role: RoleName | None,
    *,
    account: str | None = None,
    commands: Iterable[str] | None = None,
    options: Iterable[str] = (),
    store: str | None = None,
    image: str | None = None,
    layer: str | None = None,
) -> dict[str, Policy]:
    """The policies by "function" and, when there is a role, "deployer". AWS is asked only for an account that is not given.

    `commands`: what the deployer runs, all when None. `options`: of "create_role", "create_bucket", "vpc", "image".
    Raises ConfigError for values that cannot be, DeployError when AWS must be asked and does not answer.
    """
    check_function_name(function)
    wanted, options = list(commands or COMMANDS), list(options)
    for command in wanted:
        if command not in COMMANDS:
            raise ConfigError(f"--for {command}: give {', '.join(COMMANDS)}")
    if account is not None and not re.fullmatch(r"\d{12}", account):
        raise ConfigError(f"--account {account!r}: an account has twelve digits")
    secrets = store_secrets(store) if store else ()
    if account:
        region = os.environ.get("AWS_REGION") or Cloud().region
        where = Account(account, region, _partition(region))
    else:
        where = Cloud().account
    made = {"function": function_policy(function, place, where, secrets, vpc="vpc" in options)}
    if role is not None:
        made["deployer"] = deployer_policy(Resources(function, place, role, where, image, layer), wanted, options)
    return made


def _partition(region: str) -> str:
    """https://docs.aws.amazon.com/IAM/latest/UserGuide/reference-arns.html"""
    for begin, partition in (("cn-", "aws-cn"), ("us-gov-", "aws-us-gov")):
        if region.startswith(begin):
            return partition
    return "aws"
