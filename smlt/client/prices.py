"""What AWS asks for what a run uses: one dated table, and how a user puts his own prices in its place.

The table is that of us-east-1, without free tier, discounts and taxes. Other regions, savings plans and newer prices come
from a file, `--prices FILE` or SMLT_PRICES, in JSON or TOML. Its names are those of the table, tables nest at the dots:

    as-of = "2026-03-01"
    region = "eu-west-1"
    [lambda.x86_64]
    gb-second = 0.0000166667
    [ec2.t4g]
    small = 0.0184

Prices are decimals and amounts are fractions: a millisecond of a function costs 2e-8 USD, and a bill adds millions of them.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from smlt.errors import ConfigError

#: The day as of which the table holds, and for where.
AS_OF, REGION = "2025-06-01", "us-east-1"

_LAMBDA = "https://aws.amazon.com/lambda/pricing/"
_S3 = "https://aws.amazon.com/s3/pricing/"
_LOGS = "https://aws.amazon.com/cloudwatch/pricing/"
_EC2 = "https://aws.amazon.com/ec2/pricing/on-demand/"
_EBS = "https://aws.amazon.com/ebs/pricing/"
_ELASTICACHE = "https://aws.amazon.com/elasticache/pricing/"
_VPC = "https://aws.amazon.com/vpc/pricing/"
_ENDPOINTS = "https://aws.amazon.com/privatelink/pricing/"
_SECRETS = "https://aws.amazon.com/secrets-manager/pricing/"


@dataclass(frozen=True)
class Price:
    """What one `unit` costs, in USD. `source`: the AWS page, or the user's file."""

    name: str
    usd: Decimal
    unit: str
    source: str


#: (name, USD, unit, source). GB is 2^30 bytes, as AWS counts memory, storage and traffic.
_TABLE = (
    ("lambda.x86_64.gb-second", "0.0000166667", "GB-s", _LAMBDA),
    ("lambda.arm64.gb-second", "0.0000133334", "GB-s", _LAMBDA),
    # The price falls with what an account uses in a month: above 6 and 15 billion GB-s, for arm64 above 7.5 and 18.75.
    ("lambda.x86_64.gb-second-tier2", "0.0000150000", "GB-s", _LAMBDA),
    ("lambda.x86_64.gb-second-tier3", "0.0000133334", "GB-s", _LAMBDA),
    ("lambda.arm64.gb-second-tier2", "0.0000120001", "GB-s", _LAMBDA),
    ("lambda.arm64.gb-second-tier3", "0.0000106667", "GB-s", _LAMBDA),
    ("lambda.million-requests", "0.20", "million requests", _LAMBDA),
    ("lambda.ephemeral-gb-second", "0.0000000309", "GB-s above 512 MB", _LAMBDA),
    ("s3.thousand-puts", "0.005", "thousand PUT, COPY, POST, LIST", _S3),
    ("s3.thousand-gets", "0.0004", "thousand GET, HEAD", _S3),
    ("s3.gb-month", "0.023", "GB-month", _S3),
    ("logs.gb", "0.50", "GB taken in", _LOGS),
    ("vpc.nat-hour", "0.045", "hour", _VPC),
    ("vpc.nat-gb", "0.045", "GB", _VPC),
    ("vpc.endpoint-hour", "0.01", "hour and zone", _ENDPOINTS),
    ("vpc.endpoint-gb", "0.01", "GB", _ENDPOINTS),
    ("vpc.public-ipv4-hour", "0.005", "hour", _VPC),
    ("transfer.between-zones-gb", "0.01", "GB, each direction", _EC2),
    ("secrets.month", "0.40", "secret-month", _SECRETS),
    ("secrets.ten-thousand-calls", "0.05", "ten thousand calls", _SECRETS),
    ("ebs.gp3-gb-month", "0.08", "GB-month", _EBS),
    ("ec2.t4g.micro", "0.0084", "hour", _EC2),
    ("ec2.t4g.small", "0.0168", "hour", _EC2),
    ("ec2.t4g.medium", "0.0336", "hour", _EC2),
    ("ec2.m7g.medium", "0.0408", "hour", _EC2),
    ("ec2.m7g.large", "0.0816", "hour", _EC2),
    ("ec2.c7g.large", "0.0725", "hour", _EC2),
    ("ec2.c6gn.large", "0.0864", "hour", _EC2),
    ("ec2.c6gn.xlarge", "0.1728", "hour", _EC2),
    ("ec2.c6gn.2xlarge", "0.3456", "hour", _EC2),
    ("ec2.r7g.large", "0.1071", "hour", _EC2),
    # To compare functions with: compute-optimised machines, x86 and arm64.
    ("ec2.c6i.large", "0.085", "hour", _EC2),
    ("ec2.c6i.xlarge", "0.17", "hour", _EC2),
    ("ec2.c6i.2xlarge", "0.34", "hour", _EC2),
    ("ec2.c6i.4xlarge", "0.68", "hour", _EC2),
    ("ec2.c6i.8xlarge", "1.36", "hour", _EC2),
    ("ec2.c6i.16xlarge", "2.72", "hour", _EC2),
    ("ec2.c6i.32xlarge", "5.44", "hour", _EC2),
    ("ec2.c7g.xlarge", "0.145", "hour", _EC2),
    ("ec2.c7g.2xlarge", "0.29", "hour", _EC2),
    ("ec2.c7g.4xlarge", "0.58", "hour", _EC2),
    ("ec2.c7g.8xlarge", "1.16", "hour", _EC2),
    ("ec2.c7g.16xlarge", "2.32", "hour", _EC2),
    # Valkey's nodes cost a fifth less than those of Redis OSS.
    ("elasticache.cache.t4g.micro", "0.0128", "hour", _ELASTICACHE),
    ("elasticache.cache.t4g.small", "0.0256", "hour", _ELASTICACHE),
    ("elasticache.cache.t4g.medium", "0.052", "hour", _ELASTICACHE),
    ("elasticache.cache.m7g.large", "0.1264", "hour", _ELASTICACHE),
    ("elasticache.cache.m7g.xlarge", "0.252", "hour", _ELASTICACHE),
    ("elasticache.cache.r7g.large", "0.1752", "hour", _ELASTICACHE),
    ("elasticache.cache.r7g.xlarge", "0.3496", "hour", _ELASTICACHE),
)


@dataclass(frozen=True)
class Prices(Mapping[str, Price]):
    """Prices by name, in USD. `as_of`: the day they are of; `region`: where they hold."""

    by_name: Mapping[str, Price]
    as_of: str = AS_OF
    region: str = REGION

    def __getitem__(self, name: str) -> Price:
        try:
            return self.by_name[name]
        except KeyError:
            raise ConfigError(f"no price is known for {name!r}; add it to the file of --prices (SMLT_PRICES)") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    def store_hour(self, node: str) -> Price:
        """The hour of a store's node: "t4g.small" (EC2) or "cache.t4g.small" (ElastiCache)."""
        return self[store_price_name(node)]


def store_price_name(node: str) -> str:
    """The price's name of a store's node type."""
    return f"elasticache.{node}" if node.startswith("cache.") else f"ec2.{node}"


PRICES = Prices({row[0]: Price(row[0], Decimal(row[1]), row[2], row[3]) for row in _TABLE})

#: GB-s a month above which the second and the third price hold.
#: https://aws.amazon.com/blogs/compute/introducing-tiered-pricing-for-aws-lambda/
_TIERS = {"x86_64": (6e9, 15e9), "arm64": (7.5e9, 18.75e9)}


def at_usage(prices: Prices, architecture: str, month_gb_s: float) -> Prices:
    """The prices of an account that has used so many GB-s this month: those of its tier. One job is taken to stay within it."""
    tier = 1 + sum(month_gb_s >= limit for limit in _TIERS[architecture])
    if tier == 1:
        return prices
    name = f"lambda.{architecture}.gb-second"
    lower = replace(prices[f"{name}-tier{tier}"], name=name)
    return replace(prices, by_name={**prices.by_name, name: lower})


def load_prices(path: Path | None = None) -> Prices:
    """The table with the prices of the file at `path`, else of the file that SMLT_PRICES names, else as it is.

    Node types of stores (`ec2.*`, `elasticache.cache.*`) may be new; every other name must be one of the table's.
    Raises ConfigError, which names the file and what is wrong: unreadable, an unknown name, a value that is no price.
    """
    named = "--prices" if path is not None else "SMLT_PRICES"
    if path is None:
        found = os.environ.get("SMLT_PRICES")
        if not found:
            return PRICES
        path = Path(found)
    where = f"{named}: {path}"
    values = dict(_flat(_parsed(path, where)))
    about = {name: values.pop(name) for name in ("as-of", "region") if name in values}
    for name, value in about.items():
        if not isinstance(value, str) or not value or len(value) > 64 or not value.isprintable():
            raise ConfigError(f"{where}: {name} must be a short text")
    unknown = sorted(name for name in values if name not in PRICES and not _is_node(name))
    if unknown:
        raise ConfigError(f"{where}: unknown price {', '.join(unknown)}; known are {', '.join(PRICES)}")
    own = {name: _price(name, value, where) for name, value in values.items()}
    return replace(
        PRICES,
        by_name={**PRICES.by_name, **own},
        as_of=about.get("as-of", f"{AS_OF}, {len(own)} of {path.name}"),
        region=about.get("region", REGION),
    )


def _is_node(name: str) -> bool:
    kind, _, node = name.partition(".")
    parts = node.split(".")
    wanted = {"ec2": 2, "elasticache": 3}.get(kind)
    return len(parts) == wanted and all(parts) and (kind == "ec2" or parts[0] == "cache")


def _price(name: str, value: Any, where: str) -> Price:
    number = Decimal(value) if isinstance(value, (int, Decimal)) and not isinstance(value, bool) else Decimal("NaN")
    # The lower bound keeps 1e-999999 from becoming a fraction of a million digits.
    if not number.is_finite() or not (number == 0 or Decimal("1e-18") <= number <= 1_000_000) or len(str(number)) > 40:
        raise ConfigError(f"{where}: {name} is no price: give a number of USD from 0 to 1000000")
    known = PRICES.by_name.get(name)
    return Price(name, number, known.unit if known else "hour", where)


def _parsed(path: Path, where: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            value = json.loads(text, parse_float=Decimal, parse_constant=Decimal)
        else:
            value = tomllib.loads(text, parse_float=Decimal)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no {'JSON' if path.suffix.lower() == '.json' else 'TOML'}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is no table of prices by name")
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
