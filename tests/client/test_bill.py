"""REPORT lines, the rows of invocations, and what they add up to."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt.client.bill import ObjectUse, StoreUse, bill, estimate, read_bill, write_bill
from smlt.client.invocations import (
    Invocation,
    Report,
    append_invocation,
    parse_report,
    read_invocations,
    with_reports,
)
from smlt.client.prices import PRICES
from smlt.errors import CheckpointError, ConfigError

ID = "8f507cfc-xmpl-4697-b07a-ac58fc914c95"
PLAIN = f"REPORT RequestId: {ID}\tDuration: 15.74 ms\tBilled Duration: 16 ms\tMemory Size: 1769 MB\tMax Memory Used: 56 MB\t"
COLD = f"{PLAIN}Init Duration: 130.49 ms\t\n"
TRACED = f"{COLD}XRAY TraceId: 1-5e34a66a-474xmpl7c2534a87870b4370\tSegmentId: 073cxmpl3e442861\tSampled: true\t\n"
TIMEOUT = f"{PLAIN}Status: timeout\n"
KILLED = f"{PLAIN}Status: error\tError Type: Runtime.ExitError\n"
RESTORED = f"{PLAIN}Restore Duration: 742.96 ms\tBilled Restore Duration: 50 ms\t\n"


def test_every_form_of_a_report_line_is_read() -> None:
    plain = Report(ID, 15.74, 16, 1769, 56)
    assert parse_report(PLAIN) == plain
    assert parse_report(PLAIN.rstrip()) == plain
    assert parse_report(COLD) == replace(plain, init_ms=130.49)
    assert parse_report(TRACED) == replace(plain, init_ms=130.49)
    assert parse_report(TIMEOUT) == replace(plain, status="timeout")
    assert parse_report(KILLED) == replace(plain, status="error", error_type="Runtime.ExitError")
    assert parse_report(RESTORED) == replace(plain, restore_ms=742.96)  # Billed Duration has its share already
    assert parse_report(PLAIN.replace("15.74 ms", "900000 ms")) == replace(plain, duration_ms=900000.0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "START RequestId: x Version: $LATEST",
        f" {PLAIN}",
        PLAIN.replace("16 ms", "16.5 ms"),
        PLAIN.replace("16 ms", "-16 ms"),
        PLAIN.replace("16 ms", "١٦ ms"),
        PLAIN.replace("16 ms", f"{'9' * 5000} ms"),
        PLAIN.replace("1769 MB", "0 MB"),
        PLAIN.replace("1769 MB", "1769 ms"),
        PLAIN.replace(ID, "a b"),
        PLAIN.replace(ID, ""),
        f"{PLAIN}Billed Duration: 1 ms",  # twice, and not the same
        "REPORT RequestId: " + "x" * 100_000,
    ],
)
def test_a_line_that_only_looks_like_a_report_is_none(line: str) -> None:
    assert parse_report(line) is None


@given(end=st.integers(0, len(PLAIN.rstrip()) - 1))
def test_a_report_line_that_is_cut_off_is_none(end: int) -> None:
    assert parse_report(PLAIN[:end]) is None


@given(text=st.text())
def test_whatever_follows_report_does_not_raise(text: str) -> None:
    parse_report(f"REPORT RequestId: {text}")
    parse_report(f"{PLAIN}{text}")


def row(request_id: str, billed_ms: int | None = 1000, memory_mb: int = 1024, **more: object) -> Invocation:
    return replace(Invocation(request_id, "w1", 0, 10.0, billed_ms, memory_mb, outcome="done"), **more)  # type: ignore[arg-type]


def test_a_bill_is_the_sum_of_its_items_to_the_last_digit() -> None:
    rows = [row("a", 1, 128), row("b", 999, 1769), row("c", 12345, 3008)]
    made = bill(rows)
    used = Fraction(1 * 128 + 999 * 1769 + 12345 * 3008, 1024 * 1000)
    assert [(item.name, item.quantity) for item in made.items] == [
        ("function time, x86_64", used),
        ("function requests", Fraction(3, 1_000_000)),
    ]
    assert made.total_usd == used * Fraction("0.0000166667") + 3 * Fraction("0.0000002")
    arm = bill(rows, architecture="arm64")
    assert arm.items[0].usd == used * Fraction("0.0000133334")


def test_a_million_small_invocations_lose_no_cent() -> None:
    made = bill([row("x", 1, 128)] * 100_000)
    assert made.total_usd == 100_000 * (Fraction(128, 1024) / 1000 * Fraction("0.0000166667") + Fraction("0.0000002"))


def test_a_repeated_invocation_is_billed_twice() -> None:
    once = bill([row("a")])
    twice = bill([row("a"), row("a")])
    assert twice.total_usd == 2 * once.total_usd
    assert twice.invocations == 2


def test_disk_objects_store_and_logs_are_billed() -> None:
    made = bill(
        [row("a", 2000)],
        ephemeral_mb=1536,
        objects=ObjectUse(puts=3, gets=5, stored_bytes=2**31, stored_s=15 * 24 * 3600),
        store=StoreUse("t4g.small", 1800, nodes=2),
        log_bytes=2**29,
    )
    assert {item.name: item.usd for item in made.items} == {
        "function time, x86_64": 2 * Fraction("0.0000166667"),
        "function requests": Fraction("0.0000002"),
        "function disk": 2 * Fraction("0.0000000309"),
        "S3 writes": Fraction("0.000015"),
        "S3 reads": Fraction("0.000002"),
        "S3 storage": Fraction("0.023"),
        "store t4g.small": Fraction("0.0168"),
        "logs taken in": Fraction("0.25"),
    }


def test_what_has_no_report_yet_is_counted_and_told() -> None:
    made = bill([row("a"), row("b", None)])
    assert (made.invocations, made.unreported) == (2, 1)
    assert made.total_usd == bill([row("a")]).total_usd
    assert "1 of 2 invocations have no REPORT line yet" in made.to_text()
    assert "REPORT" not in bill([row("a")]).to_text()


def test_the_text_is_a_table_with_a_total_and_what_is_not_in_it() -> None:
    lines = bill([row("a", 1000)], store=StoreUse("cache.t4g.micro", 3600)).to_text().splitlines()
    assert lines[0].split() == ["item", "quantity", "unit", "USD", "each", "USD"]
    assert lines[1].split() == ["function", "time,", "x86_64", "1", "GB-s", "0.0000166667", "0.000017"]
    assert lines[2].split()[-1] == "<0.000001"
    assert lines[3].split() == ["store", "cache.t4g.micro", "1", "hour", "0.0128", "0.012800"]
    assert lines[4].split() == ["total", "0.012817"]
    assert "without free tier" in lines[5]
    assert PRICES.as_of in lines[5]


def test_an_estimate_counts_every_worker_and_every_invocation() -> None:
    made = estimate(8, 1769, 1000.0)
    assert made.invocations == 16  # 900 s and 100 s
    assert made.items[0].quantity == Fraction(8 * 1000 * 1769, 1024)
    assert made.items[1].quantity == Fraction(16, 1_000_000)
    assert estimate(1, 1024, 0.0101).items[0].quantity == Fraction(11, 1000)  # begun milliseconds
    with_store = estimate(8, 1769, 1000.0, store=StoreUse("t4g.small", 1000))
    assert with_store.total_usd == made.total_usd + Fraction(1000, 3600) * Fraction("0.0168")
    for wrong in ((0, 1769, 1.0), (1, -1, 1.0), (1, 1769, float("nan")), (1, 1769, float("inf"))):
        with pytest.raises(ConfigError, match="needs a positive"):
            estimate(*wrong)
    with pytest.raises(ConfigError, match="no price for the architecture 'riscv'"):
        estimate(1, 1, 1.0, architecture="riscv")
    with pytest.raises(ConfigError, match="no price is known for"):
        estimate(1, 1, 1.0, store=StoreUse("cache.none", 1))


def test_own_prices_make_the_bill() -> None:
    own = {**PRICES.by_name, "logs.gb": replace(PRICES["logs.gb"], usd=Decimal("7"))}
    assert bill([], log_bytes=2**30, prices=replace(PRICES, by_name=own, region="mars")).total_usd == 7


def test_bill_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_bill(tmp_path) is None
    made = bill([row("a", 1001, 3), row("b", None)], store=StoreUse("t4g.small", 10))
    write_bill(tmp_path, made)
    found = read_bill(tmp_path)
    assert found is not None
    assert found.to_dict() == made.to_dict()
    assert abs(found.total_usd - made.total_usd) < Fraction(1, 10**15)
    assert [path.name for path in tmp_path.iterdir()] == ["bill.json"]
    for damaged in ("", "[]", "{}", '{"items": [{"name": 1}]}', (tmp_path / "bill.json").read_text()[:-9]):
        (tmp_path / "bill.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"bill.json cannot be read"):
            read_bill(tmp_path)


def test_rows_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    assert read_invocations(tmp_path) == []

    def add(number: int) -> None:
        for index in range(50):
            append_invocation(tmp_path, row(f"{number}-{index}", init_ms=1.5, max_memory_mb=7))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_invocations(tmp_path)
    assert {one.request_id for one in found} == {f"{number}-{index}" for number in range(4) for index in range(50)}
    assert found[0] == row(found[0].request_id, init_ms=1.5, max_memory_mb=7)


def test_a_row_that_was_cut_short_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "invocations.jsonl"
    append_invocation(tmp_path, row("a"))
    path.write_bytes(path.read_bytes() + b'{"request_id": "cut", "work')
    append_invocation(tmp_path, row("b", None))
    assert read_invocations(tmp_path) == [row("a"), row("b", None)]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b"{}",
        b'{"request_id": 3}',
        b'{"request_id": "a", "billed_ms": 1.5}',
        b'{"request_id": "a", "billed_ms": true}',
        b'{"request_id": "a", "billed_ms": -1}',
        b'{"request_id": "a", "started": NaN}',
    ],
)
def test_a_row_that_makes_no_sense_is_left_out(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "invocations.jsonl").write_bytes(json.dumps({"request_id": "b", "more": 1}).encode() + b"\n" + line + b"\n")
    assert read_invocations(tmp_path) == [Invocation("b")]


def test_reports_complete_the_rows_and_tell_of_repeated_and_unanswered_invocations() -> None:
    rows = [row("a", None, 0, outcome=""), row("b", None, outcome="lost")]
    reports = [
        Report("a", 5.0, 5, 1769, 60, time=21.0),
        Report("b", 2.0, 2, 1769, 50, status="timeout", time=20.0),
        Report("a", 9.0, 9, 1769, 70, time=30.0),
        Report("c", 4.0, 4, 1769, 80, time=40.0, worker_id="w9", rank=2),
    ]
    found = with_reports(rows, reports)
    assert [(one.request_id, one.billed_ms, one.outcome) for one in found] == [
        ("a", 5, "done"),
        ("b", 2, "lost"),
        ("a", 9, "duplicate"),
        ("c", 4, "unanswered"),
    ]
    assert (found[3].worker_id, found[3].rank, found[3].started) == ("w9", 2, 40.0 - 0.004)
    assert bill(found).items[0].quantity == Fraction(20 * 1769, 1024 * 1000)
