"""The table of prices, and a user's own in its place."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from smlt.client.prices import PRICES, load_prices
from smlt.errors import ConfigError


def test_every_price_is_positive_and_names_its_aws_page() -> None:
    for name, price in PRICES.items():
        assert price.name == name
        assert price.usd > 0
        assert price.source.startswith("https://aws.amazon.com/")
    assert PRICES["lambda.x86_64.gb-second"].usd == Decimal("0.0000166667")
    assert PRICES.store_hour("cache.t4g.micro").usd < PRICES.store_hour("cache.t4g.small").usd


@pytest.mark.parametrize("by", ["argument", "variable"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.json", '{"region": "eu-west-1", "lambda": {"x86_64.gb-second": 0.1}, "ec2.t4g.nano": 3, "logs.gb": 0}'),
        ("own.toml", 'region = "eu-west-1"\nlogs.gb = 0\n[lambda.x86_64]\ngb-second = 0.1\n[ec2]\nt4g.nano = 3\n'),
    ],
)
def test_a_file_replaces_prices_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    if by == "variable":
        monkeypatch.setenv("SMLT_PRICES", str(tmp_path / name))
    prices = load_prices(tmp_path / name if by == "argument" else None)
    assert prices["lambda.x86_64.gb-second"].usd == Decimal("0.1")  # not the float's 0.1000000000000000055
    assert prices["logs.gb"].usd == 0
    assert prices.store_hour("t4g.nano").usd == 3  # a node that the table does not have
    assert prices["s3.thousand-puts"] == PRICES["s3.thousand-puts"]
    assert prices.region == "eu-west-1"
    assert name in prices.as_of  # a bill says that it is not the table's alone
    assert PRICES["logs.gb"].usd == Decimal("0.50")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"lambda.gb-seconds": 1, "s4.get": 2}', "unknown price lambda.gb-seconds, s4.get"),
        ("a.json", '{"ec2.t4g": 1}', "unknown price ec2.t4g"),
        ("a.json", '{"elasticache.t4g.micro.x": 1}', "unknown price"),
        ("a.json", '{"logs.gb": -1}', "logs.gb is no price"),
        ("a.json", '{"logs.gb": NaN}', "logs.gb is no price"),
        ("a.json", '{"logs.gb": true}', "logs.gb is no price"),
        ("a.json", '{"logs.gb": "0.5"}', "logs.gb is no price"),
        ("a.json", '{"logs.gb": [1]}', "logs.gb is no price"),
        ("a.toml", "logs.gb = 1e-999999", "logs.gb is no price"),
        ("a.toml", "logs.gb = inf", "logs.gb is no price"),
        ("a.json", '{"region": 3}', "region must be a short text"),
        ("a.json", "[1]", "no table of prices"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.toml", "a =", "is no TOML"),
    ],
)
def test_a_file_that_makes_no_sense_is_one_clear_sentence(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_prices(tmp_path / name)
    assert said in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)


def test_a_file_that_is_missing_or_binary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLT_PRICES", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match=r"SMLT_PRICES: .*none.toml cannot be read: No such file"):
        load_prices()
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no TOML"):
        load_prices(tmp_path / "bytes.toml")


def test_a_missing_price_says_where_to_add_it() -> None:
    with pytest.raises(ConfigError, match=r"no price is known for 'ec2.u7i.metal'; add it to the file of --prices"):
        PRICES.store_hour("u7i.metal")
