"""What the loggers call a run's numbers, the same everywhere: "loss", "seconds/compute", "metrics/accuracy", ..."""

from __future__ import annotations

import math
from typing import Any

#: Of each worker in a step's row -> what its slowest worker's is called.
_SLOWEST = {
    "compute_s": "seconds/compute",
    "communication_s": "seconds/communication_exposed",
    "communication_total_s": "seconds/communication_total",
    "data_s": "seconds/data",
}


def of_step(row: dict[str, Any]) -> dict[str, float]:
    """A step's: loss, samples/s, workers, the slowest worker's seconds, the largest one's MB."""
    found: dict[str, Any] = {
        "loss": row["loss"],
        "samples_per_s": row["samples_per_s"],
        "workers": len(row["ranks"]),
        **{name: row[name] for name in ("global_batch_size", "lr_factor") if name in row},
        **{name: max(row[known]) for known, name in _SLOWEST.items() if row.get(known)},
        **({"memory_mb": max(row["rss_mb"])} if row.get("rss_mb") else {}),
    }
    return _numbers(found)


def of_epoch(row: dict[str, Any]) -> dict[str, float]:
    """An epoch's: what evaluate() gave."""
    return _numbers({"epoch": row["epoch"] + 1, **{f"metrics/{name}": value for name, value in row["metrics"].items()}})


def of_membership(row: dict[str, Any]) -> dict[str, float]:
    """A change's: how long training stood still, how many workers were lost."""
    return _numbers({"seconds/recovery": row["recovery_s"], "workers_lost": len(row["lost_ranks"])})


def of_decision(row: dict[str, Any]) -> dict[str, float]:
    """A round's: what was spent, what is forecast."""
    names = {"seconds": "forecast/seconds", "usd": "forecast/usd", "odds": "forecast/odds"}
    forecast = {name: row["forecast"].get(known) for known, name in names.items()}
    return _numbers({"cost_usd": row["spent_usd"], **forecast})


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """NaN and Inf stay: that a loss has become one is to be seen."""
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float)) or _is_scalar(value)}


def _is_scalar(value: Any) -> bool:
    try:
        return value is not None and not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
