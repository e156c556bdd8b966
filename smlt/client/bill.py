"""What a run costs: before it (`estimate`) and after it (`bill`), by the table in `prices`.

A bill holds what SMLT can count: the functions' time and requests, the object store's requests and storage, the logs,
and the store's node while the run lasted. Not in it: the free tier, discounts, taxes, a store left running after the run,
and traffic between availability zones. Amounts are exact fractions, rounded only where they are shown.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from smlt.client.invocations import Invocation
from smlt.client.prices import PRICES, Prices
from smlt.errors import CheckpointError, ConfigError

FILE = "bill.json"
#: A function's own disk of this size is in the price of its memory. https://aws.amazon.com/lambda/pricing/
FREE_EPHEMERAL_MB = 512
#: The longest invocation. https://docs.aws.amazon.com/lambda/latest/dg/configuration-timeout.html
LONGEST_INVOCATION_S = 900
#: AWS counts a month of S3 by its hours; 30 days are the usual month of an estimate.
MONTH_S = 30 * 24 * 3600
NOTE = "without free tier, discounts, taxes, traffic between zones, and a store that runs on after the run"

ARCHITECTURES = ("x86_64", "arm64")


@dataclass(frozen=True)
class Item:
    """A line of a bill: so much of something at a price for each `unit`."""

    name: str
    quantity: Fraction
    unit: str
    price_usd: Decimal

    @property
    def usd(self) -> Fraction:
        """Quantity times price, exactly."""
        return self.quantity * Fraction(self.price_usd)


@dataclass(frozen=True)
class ObjectUse:
    """What a run asked of S3: requests, and bytes that lie there for `stored_s` seconds."""

    puts: int = 0  # PUT, COPY, POST, LIST; a part of a multipart upload is one too
    gets: int = 0  # GET, HEAD
    stored_bytes: int = 0
    stored_s: float = 0.0


@dataclass(frozen=True)
class StoreUse:
    """The store's node ("t4g.small", "cache.t4g.small") and how many seconds of it the run took; `nodes` of them."""

    node: str
    seconds: float
    nodes: int = 1


@dataclass(frozen=True)
class Bill:
    """What was used and what it costs. `unreported`: invocations without a REPORT line yet, which are not in it."""

    items: tuple[Item, ...]
    as_of: str = PRICES.as_of
    region: str = PRICES.region
    invocations: int = 0
    unreported: int = 0

    @property
    def total_usd(self) -> Fraction:
        """The sum, exactly."""
        return sum((item.usd for item in self.items), Fraction(0))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: quantities as the nearest floats, amounts in USD to twelve decimals."""
        return {
            "total_usd": round(float(self.total_usd), 12),
            "items": [
                {
                    "name": item.name,
                    "quantity": float(item.quantity),
                    "unit": item.unit,
                    "price_usd": float(item.price_usd),
                    "usd": round(float(item.usd), 12),
                }
                for item in self.items
            ],
            "invocations": self.invocations,
            "unreported": self.unreported,
            "prices_as_of": self.as_of,
            "region": self.region,
            "note": NOTE,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Bill:
        """What `to_dict` made. Raises KeyError, TypeError or ValueError for anything else."""
        items = tuple(
            Item(
                str(row["name"]),
                Fraction(repr(float(row["quantity"]))),
                str(row["unit"]),
                Decimal(repr(float(row["price_usd"]))),
            )
            for row in value["items"]
        )
        counts = int(value["invocations"]), int(value["unreported"])
        return cls(items, str(value["prices_as_of"]), str(value["region"]), *counts)

    def to_text(self) -> str:
        """A table for people."""
        rows = [("item", "quantity", "unit", "USD each", "USD")]
        for item in self.items:
            rows.append((item.name, shown(item.quantity), item.unit, f"{item.price_usd.normalize():f}", shown_usd(item.usd)))
        rows.append(("total", "", "", "", shown_usd(self.total_usd)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, quantity, unit, price, usd in rows:
            cells = (name.ljust(widths[0]), quantity.rjust(widths[1]), unit.ljust(widths[2]))
            lines.append("  ".join((*cells, price.rjust(widths[3]), usd.rjust(widths[4]))))
        if self.unreported:
            lines.append(f"{self.unreported} of {self.invocations} invocations have no REPORT line yet and are not in it")
        lines.append(f"prices of {self.region}, {self.as_of}; {NOTE}")
        return "\n".join(lines)


def shown(quantity: Fraction) -> str:
    """A quantity for people: whole numbers whole, others to six significant digits."""
    if quantity.denominator == 1:
        return f"{quantity.numerator:,}"
    return f"{Decimal(f'{float(quantity):.6g}'):f}"  # never 3e-06


def shown_usd(usd: Fraction) -> str:
    """An amount for people: to a millionth of a dollar, what is smaller but something as "<0.000001"."""
    return "<0.000001" if 0 < usd < Fraction(1, 2_000_000) else f"{float(usd):.6f}"


def bill(
    invocations: Iterable[Invocation],
    *,
    architecture: str = "x86_64",
    ephemeral_mb: int = FREE_EPHEMERAL_MB,
    objects: ObjectUse | None = None,
    store: StoreUse | None = None,
    log_bytes: int = 0,
    prices: Prices = PRICES,
) -> Bill:
    """The bill of a run. Every invocation counts, also when two have one request id: Lambda bills each time it runs.

    A function's time is billed by the millisecond, its memory as MB / 1024. Raises ConfigError for an architecture or a node
    without a price.
    """
    rows = list(invocations)
    billed = [row for row in rows if row.billed_ms is not None]
    milliseconds = sum(row.billed_ms or 0 for row in billed)
    memory = Fraction(sum((row.billed_ms or 0) * row.memory_mb for row in billed), 1024 * 1000)
    items = _functions(len(billed), memory, Fraction(milliseconds, 1000), architecture, ephemeral_mb, prices)
    items += _objects(objects, prices) + _store(store, prices)
    if log_bytes:
        items.append(_item("logs taken in", Fraction(log_bytes, 2**30), "logs.gb", prices))
    return Bill(tuple(items), prices.as_of, prices.region, len(rows), len(rows) - len(billed))


def estimate(
    workers: int,
    memory_mb: int,
    seconds: float,
    *,
    architecture: str = "x86_64",
    ephemeral_mb: int = FREE_EPHEMERAL_MB,
    invocation_s: float = LONGEST_INVOCATION_S,
    objects: ObjectUse | None = None,
    store: StoreUse | None = None,
    log_bytes: int = 0,
    prices: Prices = PRICES,
) -> Bill:
    """What a run of `workers` functions of `memory_mb` for `seconds` each would cost, invoked anew every `invocation_s`.

    Raises ConfigError for a number that cannot be, an architecture or a node without a price.
    """
    for name, value in (("workers", workers), ("memory_mb", memory_mb), ("seconds", seconds), ("invocation_s", invocation_s)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"an estimate needs a positive {name}, not {value}")
    # By whole milliseconds, as they are billed; the fraction of the float itself, not of its decimal look.
    milliseconds = math.ceil(Fraction(seconds) * 1000)
    invocations = workers * math.ceil(Fraction(seconds) / Fraction(invocation_s))
    time = Fraction(workers * milliseconds, 1000)
    items = _functions(invocations, time * memory_mb / 1024, time, architecture, ephemeral_mb, prices)
    items += _objects(objects, prices) + _store(store, prices)
    if log_bytes:
        items.append(_item("logs taken in", Fraction(log_bytes, 2**30), "logs.gb", prices))
    return Bill(tuple(items), prices.as_of, prices.region, invocations)


def _functions(
    count: int, gb_seconds: Fraction, seconds: Fraction, architecture: str, ephemeral_mb: int, prices: Prices
) -> list[Item]:
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"there is no price for the architecture {architecture!r}: {' or '.join(ARCHITECTURES)}")
    items = [
        _item(f"function time, {architecture}", gb_seconds, f"lambda.{architecture}.gb-second", prices),
        _item("function requests", Fraction(count, 1_000_000), "lambda.million-requests", prices),
    ]
    above = max(0, ephemeral_mb - FREE_EPHEMERAL_MB)
    if above:
        items.append(_item("function disk", seconds * above / 1024, "lambda.ephemeral-gb-second", prices))
    return items


def _objects(objects: ObjectUse | None, prices: Prices) -> list[Item]:
    if objects is None:
        return []
    items = [
        _item("S3 writes", Fraction(objects.puts, 1000), "s3.thousand-puts", prices),
        _item("S3 reads", Fraction(objects.gets, 1000), "s3.thousand-gets", prices),
    ]
    kept = Fraction(objects.stored_bytes, 2**30) * Fraction(objects.stored_s) / MONTH_S
    return [*items, _item("S3 storage", kept, "s3.gb-month", prices)] if kept else items


def _store(store: StoreUse | None, prices: Prices) -> list[Item]:
    if store is None:
        return []
    hours = Fraction(store.seconds) * store.nodes / 3600
    price = prices.store_hour(store.node)
    return [Item(f"store {store.node}", hours, price.unit, price.usd)]


def _item(name: str, quantity: Fraction, price_name: str, prices: Prices) -> Item:
    price = prices[price_name]
    return Item(name, quantity, price.unit, price.usd)


def write_bill(run_path: Path, made: Bill) -> None:
    """Replace a run's bill.json. CheckpointError when it cannot be written."""
    path = Path(run_path) / FILE
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{FILE}-", dir=run_path)
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(made.to_dict(), indent=1) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def read_bill(run_path: Path) -> Bill | None:
    """A run's bill.json, None when it has none; amounts to a float's precision. CheckpointError when it is damaged."""
    path = Path(run_path) / FILE
    try:
        return Bill.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; remove it: the bill is computed again from invocations.jsonl"
        ) from error
