"""What a run on Lambda has cost: put together from its invocations, its log and what else it has used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from smlt.client.bill import FREE_EPHEMERAL_MB, Bill, ObjectUse, StoreUse, bill, write_bill
from smlt.client.invocations import Invocation, append_invocation, read_invocations, with_reports
from smlt.client.logs import is_on_lambda, reports
from smlt.client.platforms import nodes_of
from smlt.client.prices import load_prices
from smlt.client.runs import Run
from smlt.errors import ConfigError


def add_use(run: Run, requests: Mapping[str, int], store_s: float) -> None:
    """Add to what a run has used, over all its starts: requests to the object store by kind, seconds of the store."""
    status = run.status
    total = Counter({kind: int(count) for kind, count in dict(status.get("s3_requests") or {}).items()})
    total.update(requests)
    run.write_status(s3_requests=dict(total), store_s=float(status.get("store_s") or 0.0) + store_s)


def settle(run: Run, *, from_log: bool, prices: Path | None = None) -> Bill:
    """The bill of a run, written into its folder.

    `from_log`: ask CloudWatch for the REPORT lines that no answer has brought: of invocations that Lambda has repeated, and
    of those whose connection was lost. Lines come some seconds late. ConfigError for a run that was not on Lambda.
    """
    if not is_on_lambda(run):
        raise ConfigError(f"run {run.name} had no functions: there is nothing to bill")
    rows = read_invocations(run.path)
    if from_log:
        found = with_reports(rows, reports(run))
        for row in _new(rows, found):
            append_invocation(run.path, row)
        rows = found
    status, node = run.status, run.config.get("store_node")
    nodes = int(run.config.get("store_nodes") or nodes_of(run.config.get("store")))
    requests = Counter({str(kind): int(count) for kind, count in dict(status.get("s3_requests") or {}).items()})
    made = bill(
        rows,
        architecture=str(status.get("architecture") or "x86_64"),
        ephemeral_mb=int(status.get("tmp_mb") or FREE_EPHEMERAL_MB),
        objects=ObjectUse(puts=requests["put"] + requests["list"], gets=requests["get"]),
        store=StoreUse(str(node), float(status.get("store_s") or 0.0), nodes) if node else None,
        prices=load_prices(prices),
    )
    write_bill(run.path, made)
    run.write_status(cost_usd=float(made.total_usd))
    return made


def _new(before: Iterable[Invocation], after: Iterable[Invocation]) -> list[Invocation]:
    """The rows that are more than there were, by request id: the same id may be there several times."""
    left = Counter(row.request_id for row in before)
    new = []
    for row in after:
        if left[row.request_id]:
            left[row.request_id] -= 1
        else:
            new.append(row)
    return new
