"""IAM policies enforced (`authorize=True`): moto keeps users, roles and policies, and this evaluates them.

moto's own enforcement compares every resource but S3's with "*", which refuses whatever a policy of least privilege allows.
Evaluated here: identity policies with Effect, (Not)Action, (Not)Resource with wildcards, and Conditions of strings on
s3:prefix, iam:PassedToService and aws:RequestedRegion. A statement with another condition does not apply when it allows.
Not evaluated: signatures (a key's secret is not checked), resource policies, permission boundaries, session policies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from smlt.emulator.operations import Need, Operation
from smlt.emulator.principals import Principal, Principals


@lru_cache(maxsize=4096)
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in text), re.DOTALL)


#: Anyone may ask who he is (https://docs.aws.amazon.com/STS/latest/APIReference/API_GetCallerIdentity.html).
_ALWAYS = {"sts:GetCallerIdentity"}
_OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "StringEquals": lambda value, pattern: value == pattern,
    "StringNotEquals": lambda value, pattern: value != pattern,
    "StringLike": lambda value, pattern: bool(_pattern(pattern).fullmatch(value)),
    "StringNotLike": lambda value, pattern: not _pattern(pattern).fullmatch(value),
    "ArnLike": lambda value, pattern: bool(_pattern(pattern).fullmatch(value)),
    "ArnEquals": lambda value, pattern: bool(_pattern(pattern).fullmatch(value)),
}


class Refusal(Exception):
    """The request is not allowed. `code` and the message are as AWS gives them."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check(operation: Operation, principals: Principals) -> None:
    """Raise Refusal unless the caller is known and may do all that the request needs."""
    principal = principals.of_key(operation.access_key)
    if principal is None:
        if operation.service == "s3":
            raise Refusal("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.")
        code = "InvalidClientTokenId" if operation.service in ("iam", "sts", "ec2") else "UnrecognizedClientException"
        raise Refusal(code, "The security token included in the request is invalid.")
    for need in operation.needs:
        if need.action not in _ALWAYS and not allows(principal, need, operation.region):
            on = f" on resource: {need.resource}" if need.resource else ""
            raise Refusal(
                "AccessDenied" if operation.service in ("s3", "iam", "sts") else "AccessDeniedException",
                f"User: {principal.arn} is not authorized to perform: {need.action}{on} because no identity-based policy "
                f"allows the {need.action} action",
            )


def allows(principal: Principal, need: Need, region: str) -> bool:
    """Whether some statement of the principal's policies allows it, and none denies it."""
    context = {"aws:RequestedRegion": region, **dict(need.context)}
    allowed = False
    for policy in principal.policies():
        statements = policy.get("Statement") or []
        for statement in [statements] if isinstance(statements, dict) else statements:
            if not _concerns(statement, need):
                continue
            met = _conditions_met(statement.get("Condition") or {}, context)
            if statement.get("Effect") == "Deny" and met is not False:
                return False
            allowed = allowed or (statement.get("Effect") == "Allow" and met is True)
    return allowed


def _concerns(statement: dict[str, Any], need: Need) -> bool:
    if "NotAction" in statement:
        if _matches(_listed(statement["NotAction"]), (need.action.lower(),), lower=True):
            return False
    elif not _matches(_listed(statement.get("Action")), (need.action.lower(),), lower=True):
        return False
    if "NotResource" in statement:
        return not _matches(_listed(statement["NotResource"]), need.resources)
    return _matches(_listed(statement.get("Resource")), need.resources)


def _conditions_met(conditions: dict[str, Any], context: dict[str, str]) -> bool | None:
    """Whether all hold; None when one is of a kind that is not evaluated here."""
    met: bool | None = True
    for operator, keys in conditions.items():
        compare = _OPERATORS.get(operator.removesuffix("IfExists"))
        for key, patterns in keys.items():
            value = {name.lower(): found for name, found in context.items()}.get(key.lower())
            if compare is None or (value is None and not operator.endswith("IfExists")):
                met = None if met else met
            elif value is not None:
                results = [compare(value, pattern) for pattern in _listed(patterns)]
                if not (all(results) if "Not" in operator else any(results)):
                    return False
    return met


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _matches(patterns: Iterable[str], values: Iterable[str], *, lower: bool = False) -> bool:
    found = [_pattern(pattern.lower() if lower else pattern) for pattern in patterns]
    return any(pattern.fullmatch(value) for value in values for pattern in found)
