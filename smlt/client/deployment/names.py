"""How the things of a deployment are called and marked. All of it is found again in AWS: there is no local state."""

from __future__ import annotations

import re
from dataclasses import dataclass

from smlt.errors import ConfigError

#: On everything that SMLT has made: what does not bear it is not changed and not removed.
MANAGED_TAG, MANAGED = "smlt:managed", "smlt"
VERSION_TAG = "smlt:version"
PACKAGE_TAG = "smlt:package-sha256"
#: On buckets and roles: the function that they were made for.
FUNCTION_TAG = "smlt:function"
#: On the log group: what the function uses, to be found when a deployment did not get as far as the function.
ROLE_TAG, STORE_TAG = "smlt:role", "smlt:object-store"
#: What the description of a layer version begins with (AWS has no tags for layers).
LAYER_MARK = "SMLT "

#: Where deployments keep their files below the bucket's prefix; no run's name begins with a dot.
DEPLOY_FOLDER = ".deploy"


def check_function_name(name: str) -> str:
    """The name itself. ConfigError unless it is one of Lambda's: 1 to 64 letters, digits, '-' and '_'."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ConfigError(f"function {name!r}: use 1 to 64 letters, digits, '-' and '_'")
    return name


def log_group(function: str) -> str:
    """The log group that Lambda writes to."""
    return f"/aws/lambda/{function}"


def layer_name(function: str) -> str:
    """Each function has a layer of its own: `smlt destroy` then takes it from nobody else."""
    return f"smlt-{function}"


def policy_name(function: str) -> str:
    """The inline policy in the function's role; a role may hold those of several functions."""
    return f"smlt-{function}"


def is_managed(tags: dict[str, str]) -> bool:
    """Whether SMLT has made what bears these tags."""
    return tags.get(MANAGED_TAG) == MANAGED


def as_tags(tags: list[dict[str, str]]) -> dict[str, str]:
    """AWS's list of Key and Value as a dict."""
    return {tag["Key"]: tag["Value"] for tag in tags}


def tag_list(tags: dict[str, str]) -> list[dict[str, str]]:
    """A dict as AWS's list of Key and Value."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


@dataclass(frozen=True)
class Place:
    """A bucket and the prefix below which SMLT keeps everything; `prefix` is "" or ends without a slash."""

    bucket: str
    prefix: str = ""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    def key(self, name: str) -> str:
        """The object key of `name` below the prefix."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def deploy_key(self, function: str, name: str = "") -> str:
        """The key of a deployment's file; without a name what they all begin with."""
        return self.key(f"{DEPLOY_FOLDER}/{function}/{name}")

    @classmethod
    def parse(cls, text: str) -> Place:
        """From "bucket" or "s3://bucket/prefix". ConfigError for what cannot be one.

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
        """
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        prefix = prefix.removesuffix("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) or ".." in bucket:
            raise ConfigError(
                f"bucket {text!r}: give a name of 3 to 63 small letters, digits, '-' and '.', or s3://NAME/PREFIX"
            )
        if prefix and not all(re.fullmatch(r"[A-Za-z0-9_=-][A-Za-z0-9_.=-]*", part) for part in prefix.split("/")):
            raise ConfigError(f"bucket {text!r}: a prefix has letters, digits, '-', '_', '=', '.', and no part begins with '.'")
        return cls(bucket, prefix)


@dataclass(frozen=True)
class Account:
    """Where things are: the parts of an ARN."""

    id: str
    region: str
    partition: str = "aws"

    def arn(self, service: str, resource: str) -> str:
        """arn:aws:lambda:eu-west-1:123456789012:function:smlt; IAM has no region, S3 neither region nor account."""
        region = "" if service in ("iam", "s3") else self.region
        account = "" if service == "s3" else self.id
        return f"arn:{self.partition}:{service}:{region}:{account}:{resource}"


@dataclass(frozen=True)
class RoleName:
    """A role as it was given: by its ARN or by its name. `path` begins and ends with a slash; `account` may be unknown."""

    name: str
    path: str = "/"
    account: str | None = None

    @classmethod
    def parse(cls, text: str) -> RoleName:
        """ConfigError for what is neither a role's ARN nor its name."""
        found = re.fullmatch(r"arn:aws[a-z-]*:iam::(\d{12}):role(/(?:[\w+=,.@-]+/)*)([\w+=,.@-]{1,64})", text, re.ASCII)
        if found:
            return cls(found[3], found[2], found[1])
        if not re.fullmatch(r"[\w+=,.@-]{1,64}", text, re.ASCII):
            raise ConfigError(f"role {text!r}: give a role's ARN, or a name of 1 to 64 letters, digits and '_+=,.@-'")
        return cls(text)

    def arn(self, account: Account) -> str:
        return account.arn("iam", f"role{self.path}{self.name}")
