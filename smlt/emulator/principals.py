"""Who asks: users and roles by their access keys, and the policies they have in moto's IAM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Principal:
    """A user or an assumed role. `name` is the user's or the role's."""

    kind: str  # "user" or "role"
    name: str
    arn: str
    account: str

    def policies(self) -> Iterator[dict[str, Any]]:
        """The documents of all policies that it has: inline, attached, and of a user's groups."""
        from moto.iam.models import iam_backends

        backend = iam_backends[self.account]["aws"]
        holders: list[Any]
        if self.kind == "role":
            holders = [backend.get_role(self.name)]
        else:
            holders = [backend.get_user(self.name), *backend.get_groups_for_user(self.name)]
        for holder in holders:
            yield from map(json.loads, list(holder.policies.values()))
            for policy in list(holder.managed_policies.values()):
                yield from (json.loads(version.document) for version in policy.versions if version.is_default)


class Principals:
    """Finds who an access key belongs to. A role's are kept as they are found; a user's may be deleted at any time."""

    def __init__(self, account: str) -> None:
        self._account = account
        self._known: dict[str, Principal] = {}

    def of_key(self, access_key: str) -> Principal | None:
        """The owner, None when moto's IAM and STS know no such key."""
        if not access_key:
            return None
        if access_key not in self._known:
            user = self._user(access_key)
            if user is not None:
                return user
            role = self._role(access_key)
            if role is not None:
                self._known[access_key] = role
        return self._known.get(access_key)

    def of_role(self, arn: str) -> Principal | None:
        """The role itself, None when there is no such role."""
        from moto.iam.models import iam_backends

        for role in list(iam_backends[self._account]["aws"].roles.values()):
            if role.arn == arn:
                return Principal("role", role.name, arn, self._account)
        return None

    def _user(self, access_key: str) -> Principal | None:
        from moto.iam.models import iam_backends

        for user in list(iam_backends[self._account]["aws"].users.values()):
            if any(key.access_key_id == access_key and key.status == "Active" for key in list(user.access_keys)):
                return Principal("user", user.name, user.arn, self._account)
        return None

    def _role(self, access_key: str) -> Principal | None:
        from moto.sts.models import sts_backends

        assumed = sts_backends[self._account]["aws"].get_assumed_role_from_access_key(access_key)
        if assumed is None:
            return None
        return Principal("role", assumed.role_arn.rpartition("/")[2], assumed.arn, self._account)
