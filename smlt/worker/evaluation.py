"""The task's metrics over its test set, by all workers together."""

from __future__ import annotations

from typing import Any

import numpy as np

from smlt.collective.communicator import Communicator
from smlt.errors import TaskError
from smlt.worker.data import dataset_length, part, take
from smlt.worker.frameworks import Adapter

BATCH = 256


def metrics_of_one_sample(adapter: Adapter, test: Any) -> dict[str, float]:
    """To know the metrics' names before training begins."""
    return adapter.evaluate(adapter.prepare(take(test, np.arange(1))))


def evaluate(adapter: Adapter, test: Any, comm: Communicator) -> dict[str, float]:
    """The task's metrics over the whole test set, each worker taking its part; exact sums of the parts, alike on all."""
    indices = np.arange(dataset_length(test))
    mine = part(indices, comm.rank, comm.world_size)
    sums: dict[str, float] = {}
    # A worker with no part evaluates one sample of weight 0, to know the metrics' names.
    for low in range(0, max(len(mine), 1), BATCH):
        batch = mine[low : low + BATCH]
        metrics = adapter.evaluate(adapter.prepare(take(test, batch if len(batch) else indices[:1])))
        if not isinstance(metrics, dict):
            raise TaskError(f"evaluate() gave a {type(metrics).__name__}, not a dict of numbers by name")
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + (float(value) * len(batch) if len(batch) else 0.0)
    totals: dict[str, float] = comm.allreduce(sums, op="sum", codec="fp32") if sums else {}
    return {name: total / len(indices) for name, total in totals.items()}
