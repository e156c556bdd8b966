"""docs/aws.md says what the commands really are, and what the table of prices says."""

from __future__ import annotations

import re
import shlex
from fractions import Fraction
from typing import Any

import pytest
import typer.main
from commandline import REPOSITORY

import smlt.cli
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


def commands() -> list[str]:
    """Every line of a fenced block that runs smlt, without what stands before it and behind a pipe or redirection."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:\$ )?(?:[A-Z_]+=\S* )*smlt (.*)", line)
            if match:
                found.append(match[1])
    return found


def problem(line: str) -> str:
    """Why the command line would refuse this, "" when it would not."""
    words = shlex.split(line)
    for index, word in enumerate(words):
        if word in ("|", ">", "&&", ";", "&"):
            words = words[:index]
            break
    command: Any = typer.main.get_command(smlt.cli.app)
    context = command.context_class(command)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"there is no command {words[0]}"
        command = command.commands[words.pop(0)]
        context = command.context_class(command, parent=context)
    try:
        given, left, _ = command.make_parser(context).parse_args(words)
    except Exception as error:
        return str(error) or type(error).__name__
    if left:
        return f"too many arguments: {left}"
    missing = [one.name for one in command.params if one.required and given.get(one.name) in (None, ())]
    return f"missing: {missing}" if missing else ""


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_guide_is_one(line: str) -> None:
    assert problem(line) == ""


def test_every_step_has_its_commands_and_the_check_sees_what_is_wrong() -> None:
    steps = re.split(r"^## \d+\. ", GUIDE, flags=re.MULTILINE)[1:]
    assert len(steps) == 10
    for step in steps:
        assert "```sh" in step
        assert re.search(r"\bcosts?\b", step, re.IGNORECASE)
        assert "Undo" in step or step.startswith("Clean up")
    assert len(commands()) >= 12
    # Nothing is left out: no other kind of block, and no smlt behind anything but variables.
    assert set(re.findall(r"^```(.*)$", GUIDE, re.MULTILINE)) == {"sh", ""}
    lines = [
        line for block in re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]
    runs = [line for line in lines if re.search(rf"(?<![\w/-])smlt (?:{'|'.join(WORDS)})", line)]
    assert len(runs) == len([line for line in lines if re.match(r"(?:[A-Z_]+=\S* )*smlt ", line)]) == len(commands())
    assert "no command" in problem("logz RUN")
    assert "--folow" in problem("logs RUN --folow")
    assert "missing" in problem("logs --follow")
    assert "too many" in problem("logs RUN another")
    assert problem("store template --kind ec2 > store.yaml") == ""


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
