"""The parameter store on AWS as a CloudFormation or Terraform template: a Valkey on EC2, or ElastiCache for Valkey.

The files in `templates/` are put together here: the network, which both kinds share, the store, the script that makes a
Valkey of a machine, and the hourly prices.
"""

from __future__ import annotations

import re
from importlib.resources import files

from smlt.client.platforms import BASELINE_GBIT
from smlt.client.prices import PRICES, Prices
from smlt.errors import ConfigError

KINDS, FORMATS = ("ec2", "elasticache"), ("cloudformation", "terraform")
_SUFFIXES = {"cloudformation": "yaml", "terraform": "tf"}
_TOP_LEVEL = re.compile(r"^([A-Za-z]+):(.*)\n", re.MULTILINE)


def store_template(kind: str, template_format: str, prices: Prices = PRICES) -> str:
    """The template's text. `kind`: "ec2" or "elasticache"; `template_format`: "cloudformation" or "terraform".

    Raises ConfigError for another kind or format.
    """
    if kind not in KINDS:
        raise ConfigError(f"--kind {kind!r}: {' or '.join(KINDS)}")
    if template_format not in FORMATS:
        raise ConfigError(f"--format {template_format!r}: {' or '.join(FORMATS)}")
    suffix = _SUFFIXES[template_format]
    own, network = _file(f"{kind}.{suffix}"), _file(f"network.{suffix}")
    text = _merged(own, network) if suffix == "yaml" else f"{own}\n{network}"
    beginning = "elasticache.cache." if kind == "elasticache" else "ec2."
    nodes = [name for name in PRICES if name.startswith(beginning) and name.removeprefix(beginning) in BASELINE_GBIT]
    hours = {name.split(".", 1)[1]: f"{prices[name].usd:f}" for name in nodes}
    line = '{}: {{Hour: "{}"}}' if suffix == "yaml" else '"{}" = "{}"'
    parts = {
        "@@PRICES@@": "\n".join(line.format(node, usd) for node, usd in hours.items()),
        "@@SCRIPT@@": _file("store.sh"),
    }
    for mark, part in parts.items():
        text = _inserted(text, mark, part)
    text = text.replace("@@ENDPOINT_HOUR@@", f"{prices['vpc.endpoint-hour'].usd:f}")
    return text.replace("@@PRICES_OF@@", f"{prices.region}, {prices.as_of}")


def _file(name: str) -> str:
    return (files("smlt.client") / "templates" / name).read_text(encoding="utf-8")


def _inserted(text: str, mark: str, part: str) -> str:
    """`part` in the place of the line with `mark`, as deep as that."""

    def indented(match: re.Match[str]) -> str:
        return "".join(f"{match[1]}{line}\n" if line else "\n" for line in part.splitlines())

    return re.sub(rf"^([ ]*){mark}\n", indented, text, flags=re.MULTILINE)


def _merged(first: str, second: str) -> str:
    """Two CloudFormation templates as one: their sections of the same name one below the other."""
    sections: dict[str, str] = {}
    for text in (first, second):
        starts = list(_TOP_LEVEL.finditer(text))
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            body = text[start.end() : following.start() if following else len(text)]
            sections[start[0]] = sections.get(start[0], "") + body
    return "".join(head + body for head, body in sections.items())
