"""Measuring here for the simulator: to fit it, to see how far it is off, to fill a table's measured columns."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bench.simulator.calibration import (
    FIT_WORKERS,
    PATH,
    Calibration,
    fit,
    machine,
    peer_cells,
    simulate,
    smlt_cells,
)
from bench.simulator.measured import Cell, Sample, measure

Row = dict[str, Any]
#: What `--measure` has measured: read by the comparison.
MEASURED_PATH = Path(__file__).with_name("measured.json")
PEERS = ("smlt fp16", "smlt fp32", "central float32", "lambdaml float32")
PEER_CELLS = [Cell("links", n, floats, peer) for floats in (1_000_000, 11_000_000) for n in (2, 4, 8) for peer in PEERS]

tell = partial(print, file=sys.stderr, flush=True)


def calibrate(passes: int) -> tuple[list[Row], Calibration]:
    """Measure all cells, fit those of `FIT_WORKERS`, keep the constants. A row a cell, also of those that were not fitted.

    What was fitted and what was not is measured in the same passes: a machine with other users is 10 % faster or slower an
    hour later.
    """
    samples = measure(smlt_cells(), passes=passes, tell=tell)
    samples |= measure(peer_cells(), tell=tell)  # long, and far less varied
    tell("fitting ...")
    fitted = fit(samples)
    PATH.write_text(fitted.to_json())
    return [_row(cell, sample, fitted) for cell, sample in samples.items()], fitted


def validate(fitted: Calibration, passes: int) -> list[Row]:
    """Measure all cells anew and simulate each."""
    samples = measure(smlt_cells(), passes=passes, tell=tell)
    return [_row(cell, sample, fitted) for cell, sample in samples.items()]


def measure_peers(passes: int) -> list[Row]:
    """The peers over shaped links, kept for the comparison."""
    samples = measure(PEER_CELLS, passes=passes, tell=tell)
    rows = [
        {"peer": cell.peer, "workers": cell.workers, "floats": cell.floats, "seconds": round(sample.typical_s, 6)}
        for cell, sample in samples.items()
    ]
    MEASURED_PATH.write_text(json.dumps({"machine": machine(), "place": "links of 600 Mbit/s", "rows": rows}, indent=1) + "\n")
    print(f"{MEASURED_PATH} written")
    return rows


def measured() -> dict[tuple[str, int, int], float]:
    """Seconds by (peer, workers, floats), of what was kept."""
    if not MEASURED_PATH.exists():
        return {}
    return {
        (row["peer"], row["workers"], row["floats"]): row["seconds"] for row in json.loads(MEASURED_PATH.read_text())["rows"]
    }


def _row(cell: Cell, sample: Sample, fitted: Calibration) -> Row:
    found = simulate(cell, fitted.places[cell.place])
    return {
        "cell": str(cell),
        "place": cell.place,
        "workers": cell.workers,
        "floats": cell.floats,
        "peer": cell.peer,
        "fitted": cell.workers in FIT_WORKERS or cell.peer != "smlt fp16",
        "measured_s": sample.typical_s,
        "simulated_s": found.seconds,
        "error": found.seconds / sample.typical_s - 1,
        "worker_cpu_s": [sample.worker_cpu_s, found.worker_cpu_s],
        "store_cpu_s": [sample.store_cpu_s, found.store_cpu_s],
        "others": sample.others,
        "windows": len(sample.windows),
    }
