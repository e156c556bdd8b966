"""docs/aws.md says what the steps cost, and what the table of prices says. Its commands: tests/docs."""

from __future__ import annotations

import re
from fractions import Fraction

from commandline import REPOSITORY
from documented import blocks, smlt_lines

from smlt.client.bill import StoreUse, estimate
from smlt.client.prices import PRICES

GUIDE = (REPOSITORY / "docs" / "aws.md").read_text()
#: What the guide runs.
WORDS = (
    "--version",
    "store",
    "doctor",
    "layer",
    "deploy",
    "lambda-local",
    "train",
    "logs",
    "status",
    "bill",
    "stop",
    "destroy",
)


def test_every_step_has_its_commands_and_none_escapes_the_check() -> None:
    steps = re.split(r"^## \d+\. ", GUIDE, flags=re.MULTILINE)[1:]
    assert len(steps) == 10
    for step in steps:
        assert "```sh" in step
        assert re.search(r"\bcosts?\b", step, re.IGNORECASE)
        assert "Undo" in step or step.startswith("Clean up")
    commands = [line for block in blocks("docs/aws.md") if block.language == "sh" for line in smlt_lines(block)]
    assert len(commands) >= 12
    # Nothing is left out: no other kind of block, and no smlt behind anything but variables. tests/docs checks each.
    assert {block.language for block in blocks("docs/aws.md")} == {"sh", "text"}
    lines = [
        line for block in re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]
    runs = [line for line in lines if re.search(rf"(?<![\w/-])smlt (?:{'|'.join(WORDS)})", line)]
    assert len(runs) == len([line for line in lines if re.match(r"(?:[A-Z_]+=\S* )*smlt ", line)]) == len(commands)


def test_the_guides_table_is_the_table_of_prices() -> None:
    rows = re.findall(r"^\| `([a-z0-9_.-]+)` \| ([0-9.]+) \| (.*) \|$", GUIDE, re.MULTILINE)
    assert rows == [(name, f"{price.usd:f}", price.unit) for name, price in PRICES.items()]
    assert f"As of {PRICES.as_of}, {PRICES.region}" in GUIDE


def test_what_the_guide_says_of_costs_is_computed() -> None:
    guide = " ".join(GUIDE.split())
    made = estimate(8, 1769, 600, store=StoreUse("c6gn.large", 600))
    functions = made.items[0].usd + made.items[1].usd
    assert f"{float(made.items[0].usd):.4f} USD" in guide  # of step 8
    assert f"about {float(functions):.2f} USD of functions" in guide
    store = made.items[2].usd + Fraction(600, 3600) * Fraction(PRICES["vpc.endpoint-hour"].usd)
    assert f"{float(store):.2f} USD of store" in guide
    assert f"costs {float(estimate(1, 1769, 1).items[0].usd):.7f} USD" in guide
    for node in ("c6gn.large", "t4g.micro", "cache.m7g.large"):
        assert f"{PRICES.store_hour(node).usd}" in guide
