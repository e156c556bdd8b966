"""The simulator's constants: fitted to collectives measured here, kept in calibration.json, beside what is assumed of AWS.

Fitted are seconds of a core's time, separately for a unix socket and for the network stack, and three things that no look
at a processor tells: how much of a connection lies in a link's queue, how much slower threads are that share cores and
caches, how long after one worker a barrier lets the next one go. For each cell three figures are to be met: the time of
the all-reduce, the processor's time of a worker and that of the store; the latter two pin down what the former is made of.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.links import RATE_MBIT
from bench.simulator.cluster import Costs, Place
from bench.simulator.collective import Result, run, smlt
from bench.simulator.measured import PLACES, Cell, Sample
from bench.simulator.strategies import Gradient
from bench.simulator.strategies.centralised import Centralised
from bench.simulator.strategies.requests import Client
from bench.simulator.strategies.scatter_reduce import ScatterReduce

PATH = Path(__file__).with_name("calibration.json")
#: Which cells are fitted, and which are only looked at afterwards.
FIT_WORKERS, TEST_WORKERS = (2, 4, 8), (3, 6)
FLOATS = (100_000, 1_000_000, 11_000_000)
PEERS = ("central float32", "lambdaml float32")
PEER_FLOATS = (1_000_000, 11_000_000)
#: A full frame of Ethernet carries so much of TCP's data: 1448 of 1514 bytes (tc counts those).
FRAME_SHARE = 1448 / 1514
#: What kernels take for a float32 in cache (`python -m bench.kernels`, fp16); their sum is fitted as a multiple of these.
KERNELS = {
    "encode_s_per_float": 0.15e-9,
    "add_s_per_float": 0.10e-9,
    "publish_s_per_float": 0.45e-9,
    "decode_s_per_float": 0.15e-9,
}
ROUNDS = 3  # simulated one after the other: the links' buckets are then as in a loop of measurements


@dataclass(frozen=True)
class Calibration:
    """The places "local" and "links" of this machine, as fitted."""

    places: Mapping[str, Place]
    machine: str
    fitted: str  # on what

    def to_json(self) -> str:
        """Readable, to be kept."""
        places = {name: asdict(place) for name, place in self.places.items()}
        return json.dumps({"machine": self.machine, "fitted": self.fitted, "places": places}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The inverse of `to_json`."""
        value = json.loads(text)
        places = {name: Place(**{**place, "costs": Costs(**place["costs"])}) for name, place in value["places"].items()}
        return cls(places, value["machine"], value["fitted"])


def load(path: Path = PATH) -> Calibration:
    """What was fitted before."""
    return Calibration.from_json(path.read_text())


def simulate(cell: Cell, place: Place) -> Result:
    """The all-reduce of a measured cell."""
    if cell.peer.startswith("smlt"):
        return smlt(place, cell.workers, Gradient(cell.floats, cell.peer.removeprefix("smlt ")), rounds=ROUNDS)
    gradient = Gradient(cell.floats, "fp32")
    if cell.peer == "central float32":
        return run(place, cell.workers, lambda c, done: Centralised(c, gradient, Client.python(c), done), rounds=2)
    if cell.peer == "lambdaml float32":

        def make(cluster: Any, done: Any) -> ScatterReduce:
            return ScatterReduce(cluster, gradient, Client.python(cluster, poll_s=0.0, listed_bytes=12.0), done)

        return run(place, cell.workers, make, rounds=2)
    raise ValueError(f"nobody simulates {cell.peer}")


def peer_cells() -> list[Cell]:
    """Of others' programs. Over links alone: on one machine what their bytes cost depends on whose caches they fit, twofold."""
    return [Cell("links", n, floats, peer) for n in (2, 4) for floats in PEER_FLOATS for peer in PEERS]


def smlt_cells() -> list[Cell]:
    """SMLT's, those to be fitted and those only to be looked at."""
    return [Cell(place, n, floats) for place in PLACES for n in sorted(FIT_WORKERS + TEST_WORKERS) for floats in FLOATS]


# ---- the fit ----

#: (parameter, first guess, does it hold for "local", for "links"). Times in ns; all are positive and fitted as logarithms.
_PARAMETERS: tuple[tuple[str, float, bool, bool], ...] = (
    ("kernels", 1.5, True, True),
    ("worker_ns_per_byte", 0.15, True, True),
    ("worker_message_us", 1.5, True, True),
    ("worker_wake_us", 4.0, True, True),
    ("store_in_ns_per_byte", 0.12, True, True),
    ("store_out_ns_per_byte", 0.12, True, True),
    ("store_command_us", 1.5, True, True),
    ("store_wake_us", 4.0, True, True),
    ("release_us", 25.0, True, True),
    ("crowding", 0.02, True, False),
    ("latency_us", 10.0, False, True),
    ("flow_kib", 256.0, False, True),
)


def place_of(name: str, values: Mapping[str, float]) -> Place:
    """The place "local" or "links" with these parameters."""
    kernels = {key: value * values["kernels"] for key, value in KERNELS.items()}
    command_s = values["store_command_us"] * 1e-6
    costs = Costs(
        **kernels,
        worker_s_per_byte=values["worker_ns_per_byte"] * 1e-9,
        worker_message_s=values["worker_message_us"] * 1e-6,
        worker_wake_s=values["worker_wake_us"] * 1e-6,
        store_in_s_per_byte=values["store_in_ns_per_byte"] * 1e-9,
        store_out_s_per_byte=values["store_out_ns_per_byte"] * 1e-9,
        store_command_s=command_s,
        store_serve_s=command_s,
        store_wake_s=values["store_wake_us"] * 1e-6,
    )
    place = Place(name, costs, cores=os.cpu_count() or 1, release_s=values["release_us"] * 1e-6)
    if name == "local":
        return replace(place, crowding=values["crowding"], socket_bytes=212_992)
    rate = RATE_MBIT * 1e6 / 8 * FRAME_SHARE
    return replace(
        place,
        link_bytes_per_s=rate,
        link_burst_bytes=128 * 1024,
        latency_s=values["latency_us"] * 1e-6,
        flow_bytes=values["flow_kib"] * 1024,
    )


def _logs(found: Result, sample: Sample) -> list[float]:
    """How far a simulated cell is from the measured one, in logarithms.

    The processor's times, which neighbours inflate, count a tenth.
    """
    return [
        math.log(found.seconds / sample.typical_s),
        0.1 * math.log(found.worker_cpu_s / sample.worker_cpu_s),
        0.1 * math.log(found.store_cpu_s / sample.store_cpu_s),
    ]


#: Logarithms: steps of a tenth, outliers (disturbed cells) count less.
_FIT: dict[str, Any] = {"diff_step": 0.03, "x_scale": 0.5, "loss": "soft_l1", "f_scale": 0.1}


def _around(first: list[float]) -> tuple[list[float], list[float]]:
    """Bounds: a sixteenth to sixteen times the first guess."""
    return [value - math.log(16) for value in first], [value + math.log(16) for value in first]


def fit_place(name: str, samples: Mapping[Cell, Sample], *, evaluations: int = 12) -> Place:
    """The place whose simulated collectives of SMLT are nearest to `samples`."""
    from scipy.optimize import least_squares

    cells = [cell for cell in samples if cell.place == name and cell.peer.startswith("smlt")]
    free = [row for row in _PARAMETERS if row[2 if name == "local" else 3]]

    def place_at(logs: Any) -> Place:
        return place_of(name, {row[0]: math.exp(value) for row, value in zip(free, logs, strict=True)})

    def misses(logs: Any) -> Any:
        place = place_at(logs)
        off = [miss for cell in cells for miss in _logs(simulate(cell, place), samples[cell])]
        # What the cells do not tell stays near the first guess.
        return np.array(off + [0.03 * (value - math.log(row[1])) for row, value in zip(free, logs, strict=True)])

    first = [math.log(row[1]) for row in free]
    found = least_squares(misses, first, bounds=_around(first), **_FIT, max_nfev=evaluations)
    return place_at(found.x)


def fit_python(place: Place, samples: Mapping[Cell, Sample], *, evaluations: int = 10) -> Place:
    """`place` with what Python's clients cost, from the peers' cells."""
    from scipy.optimize import least_squares

    cells = [cell for cell in samples if cell.place == place.name and cell.peer in PEERS]
    if not cells:
        return place
    first = [math.log(value) for value in (0.3e-9, 80e-6, 0.5e-9)]

    def place_at(logs: Any) -> Place:
        per_byte, message, add = (math.exp(value) for value in logs)
        costs = replace(place.costs, python_s_per_byte=per_byte, python_message_s=message, python_add_s_per_float=add)
        return replace(place, costs=costs)

    def misses(logs: Any) -> Any:
        candidate = place_at(logs)
        off = [_logs(simulate(cell, candidate), samples[cell])[0] for cell in cells]
        return np.array(off + [0.05 * (value - guess) for value, guess in zip(logs, first, strict=True)])

    found = least_squares(misses, first, bounds=_around(first), **_FIT, max_nfev=evaluations)
    return place_at(found.x)


def fit(samples: Mapping[Cell, Sample]) -> Calibration:
    """Both places from the cells of `FIT_WORKERS`; others in `samples` are left alone."""
    chosen = {cell: sample for cell, sample in samples.items() if cell.workers in FIT_WORKERS}
    places = {name: fit_python(fit_place(name, chosen), chosen) for name in PLACES}
    sizes = ", ".join(f"{floats:,}" for floats in FLOATS)
    return Calibration(
        places, machine(), f"n = {', '.join(map(str, FIT_WORKERS))}; {sizes} floats; unix socket and shaped links"
    )


def machine() -> str:
    """What this machine is: processor, cores, kernel, Python."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model
        )
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return f"{os.cpu_count()} cores of {model}, {system}, Python {platform.python_version()}"
