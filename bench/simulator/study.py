"""The study: SMLT with up to a thousand workers and several store nodes, and beside the systems it is compared with.

What is assumed of AWS, each with its source:

- a function's link: 600 Mbit/s each way (bench/links.py), the store's nodes: c6gn.2xlarge, 12.5 Gbit/s each way
  (smlt.client.platforms.BASELINE_GBIT), 0.5 ms to the store and back (smlt.collective.tuning.NETWORK);
- S3: 30 ms a request (smlt.client.platforms.OBJECT_TRIP_S; LambdaML measured 80 ms), 65 MB/s a function (LambdaML, arXiv
  2105.07806, table 6), 3,500 writes and 5,500 reads a second and prefix (S3's performance guidelines);
- who polls S3 waits 0.1 s between two listings;
- prices: smlt.client.prices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from bench.links import RATE_MBIT
from bench.simulator import validation
from bench.simulator.calibration import FRAME_SHARE, Calibration
from bench.simulator.cluster import Cluster, Place
from bench.simulator.collective import Result, run, smlt
from bench.simulator.models import Model
from bench.simulator.strategies import Done, Gradient, Strategy
from bench.simulator.strategies.centralised import Centralised, ParameterServers
from bench.simulator.strategies.requests import Client
from bench.simulator.strategies.scatter_reduce import ScatterReduce
from bench.simulator.training import CALM, Hazards, System, train
from smlt.client.cost import CostModel, Platform
from smlt.client.optimizer.space import Choice
from smlt.client.platforms import OBJECT_TRIP_S, STORE_NODE, node_rate
from smlt.collective.tuning import NETWORK

Row = dict[str, Any]
STUDIED_WORKERS = [1, 2, 4, 8, 16, 32, 64, 100, 200, 500, 1000]
STUDIED_NODES = [1, 2, 4, 8]
NODES_WORKERS, NODES_COUNTS, NODE_GBIT = [8, 16, 32, 64, 128, 256, 512, 1000], [1, 2, 4, 8, 16, 32], 10.0
WORTH = 0.1  # what so many more nodes must save, of the time
COMPARED_WORKERS = [8, 16, 32, 64, 100, 200]
LOCAL_BATCH, MEMORY_MB = 16, 1769
S3_BYTES_PER_S, S3_WRITES_PER_S, S3_POLL_S = 65e6, 3500.0, 0.1


@dataclass(frozen=True)
class Setting:
    """What all rows of a study share."""

    fitted: Calibration
    core_speed: float = 1.0
    local_batch: int = LOCAL_BATCH
    memory_mb: int = MEMORY_MB

    def functions(self, nodes: int = 1) -> Place:
        """Functions beside a store of so many nodes, everyone with a processor of his own."""
        costs = self.fitted.places["links"].costs
        return Place(
            "functions",
            costs,
            link_bytes_per_s=RATE_MBIT * 1e6 / 8 * FRAME_SHARE,
            store_bytes_per_s=node_rate(STORE_NODE),
            latency_s=NETWORK.round_trip_s / 2,
            flow_bytes=self.fitted.places["links"].flow_bytes,
            nodes=nodes,
            worker_speed=self.core_speed * min(1.0, self.memory_mb / 1769),
        )

    def objects(self) -> Place:
        """Functions that meet in S3: no thread or interface of a node limits it, but a number of requests."""
        place = self.functions()
        free = replace(
            place.costs,
            store_in_s_per_byte=0.0,
            store_out_s_per_byte=0.0,
            store_wake_s=0.0,
            store_command_s=1 / S3_WRITES_PER_S,
        )
        return replace(
            place, name="s3", costs=free, link_bytes_per_s=S3_BYTES_PER_S, store_bytes_per_s=None, request_s=OBJECT_TRIP_S
        )

    def cost_model(self, model: Model, workers: int, nodes: int = 1) -> CostModel:
        """Of `smlt.client.cost`, for compute, starts and memory."""
        platform = Platform.on_lambda(store_nodes=nodes, core_speed=self.core_speed)
        return CostModel(model.workload(self.local_batch, workers), platform)

    def choice(self, workers: int) -> Choice:
        return Choice(workers, self.memory_mb)


@lru_cache(maxsize=256)
def _smlt_cached(place: Place, n: int, floats: int, codec: str) -> Result:
    return smlt(place, n, Gradient(floats, codec))


# ---- n up to a thousand ----


def scaling(setting: Setting, models: list[Model], workers: list[int], nodes: list[int]) -> list[Row]:
    """A row for each model, n and k: step, efficiency (share of a step that is compute), cost of an epoch."""
    rows = []
    for model in models:
        for n in workers:
            for k in nodes if n > 1 else nodes[:1]:
                rows.append(_scaling_row(setting, model, n, k))
    return rows


def _scaling_row(setting: Setting, model: Model, n: int, k: int) -> Row:
    cost_model, choice = setting.cost_model(model, n, k), setting.choice(n)
    found = _smlt_cached(setting.functions(k), n, model.floats, "fp16") if n > 1 else None
    allreduce_s = found.seconds if found is not None else 0.0
    system = System("smlt fp16", allreduce_s, store_node=STORE_NODE, store_nodes=k if n > 1 else 0)
    calm, real = (train(system, cost_model, choice, hazards=hazards) for hazards in (CALM, Hazards()))
    compute_s = calm.compute_s / calm.steps
    return {
        "model": model.name,
        "workers": n,
        "nodes": k,
        "compute_s": compute_s,
        "allreduce_s": allreduce_s,
        "step_s": compute_s + allreduce_s,
        "efficiency": compute_s / (compute_s + allreduce_s),
        "samples_per_s": n * setting.local_batch / (compute_s + allreduce_s),
        "epoch_s": real.seconds,
        "epoch_usd": real.usd,
        "link_bound_s": bound_s(setting.functions(k), n, model),
        "events": found.events if found is not None else 0,
    }


def bound_s(place: Place, n: int, model: Model) -> float:
    """What no algorithm of this shape beats: the links, or the interfaces of the store's nodes."""
    size = Gradient(model.floats).wire_bytes
    received = 2 * (n - 1) / n * size
    assert place.link_bytes_per_s is not None
    assert place.store_bytes_per_s is not None
    return max(received / place.link_bytes_per_s, n * received / place.store_bytes_per_s / place.nodes)


# ---- how many nodes ----


def nodes(setting: Setting, floats: int, workers: list[int], counts: list[int], gbit: float) -> list[Row]:
    """A row for each n and k: an all-reduce over a store of k nodes of `gbit` each way.

    `needed`: the least k of `counts` from which on the next in the list would save less than `WORTH` of the time; 0 when
    more than the last would be needed.
    """
    rows: list[Row] = []
    for n in workers:
        times: dict[int, float] = {}
        for k in counts:
            place = replace(setting.functions(k), store_bytes_per_s=gbit * 1e9 / 8)
            found = _smlt_cached(place, n, floats, "fp16")
            times[k] = found.seconds
            size = Gradient(floats).wire_bytes
            assert place.link_bytes_per_s is not None
            rows.append(
                {
                    "workers": n,
                    "nodes": k,
                    "floats": floats,
                    "node_gbit": gbit,
                    "allreduce_s": found.seconds,
                    "link_bound_s": max(1.0, 2 * (n - 1) / n) * size / place.link_bytes_per_s,
                    "commands": found.store_commands,
                    "store_cpu_s": found.store_cpu_s,
                    "events": found.events,
                }
            )
        saved = [1 - times[more] / times[k] for k, more in pairwise(counts)]
        enough = [k for i, k in enumerate(counts[:-1]) if all(share < WORTH for share in saved[i:])]
        for row in rows[-len(counts) :]:
            row["needed"] = enough[0] if enough else 0
    return rows


# ---- beside others ----


def systems(setting: Setting, model: Model, n: int, nodes: int) -> list[System]:
    """SMLT and what it is compared with; a store or servers of `nodes` nodes. All recover as SMLT does, whatever they did."""
    place, s3 = setting.functions(nodes), setting.objects()
    gradient = Gradient(model.floats, "fp32")
    polls = 2 * n  # listings a step, about

    def took(where: Place, make: Callable[[Cluster, Done], Strategy]) -> float:
        return run(where, n, make).seconds

    def scatter(poll_s: float) -> Callable[[Cluster, Done], Strategy]:
        return lambda c, done: ScatterReduce(c, gradient, Client.python(c, poll_s=poll_s, listed_bytes=12.0), done)

    siren = took(s3, lambda c, done: Centralised(c, gradient, Client.python(c, poll_s=S3_POLL_S), done))

    def cirrus(where: Place) -> float:
        return took(where, lambda c, done: ParameterServers(c, gradient, Client.python(c), done))

    return [
        System("smlt fp16", _smlt_cached(place, n, model.floats, "fp16").seconds, 0, 0, STORE_NODE, nodes),
        System("smlt fp32", _smlt_cached(place, n, model.floats, "fp32").seconds, 0, 0, STORE_NODE, nodes),
        System("siren (S3, one aggregates)", siren, n + polls, 2 * n),
        System("cirrus (one server)", cirrus(setting.functions(1)), 0, 0, STORE_NODE, 1),
        System("cirrus (as many servers)", cirrus(place), 0, 0, STORE_NODE, nodes),
        System("lambdaml (S3)", took(s3, scatter(S3_POLL_S)), n * n + polls, 2 * n * (n - 1)),
        System("lambdaml (Redis)", took(place, scatter(0.0)), 0, 0, STORE_NODE, nodes),
    ]


#: The peer of bench/peers.py that is measured here for a system. Cirrus' servers and S3 cannot be.
MEASURED_AS = {
    "smlt fp16": "smlt fp16",
    "smlt fp32": "smlt fp32",
    "siren (S3, one aggregates)": "central float32",
    "lambdaml (Redis)": "lambdaml float32",
}
MEASURED_FLOATS, MEASURED_WORKERS = 11_000_000, (2, 4, 8)


def nodes_for(n: int) -> int:
    """Store nodes for n workers: one for each two dozen, up to eight."""
    return min(8, max(1, -(-n // 24)))


def comparison(setting: Setting, models: list[Model], workers: list[int]) -> list[Row]:
    """A row for each model, n and system; `ratio_*`: how many times SMLT's with fp16. Measured ones first, model ""."""
    rows: list[Row] = _measured_rows()
    for model in models:
        for n in workers:
            nodes, choice = nodes_for(n), setting.choice(n)
            cost_model = setting.cost_model(model, n, nodes)
            ours: Row | None = None
            for system in systems(setting, model, n, nodes):
                calm, real = (train(system, cost_model, choice, hazards=hazards) for hazards in (CALM, Hazards()))
                row = {
                    "kind": "simulated",
                    "model": model.name,
                    "workers": n,
                    "nodes": nodes,
                    **asdict(system),
                    "step_s": (calm.compute_s + calm.communication_s) / calm.steps,
                    "epoch_s": real.seconds,
                    "epoch_usd": real.usd,
                }
                ours = ours or row
                for name in ("allreduce_s", "step_s", "epoch_s", "epoch_usd"):
                    row[f"ratio_{name}"] = row[name] / ours[name]
                rows.append(row)
    return rows


def _measured_rows() -> list[Row]:
    known = validation.measured()
    rows = []
    for n in MEASURED_WORKERS:
        ours = known.get(("smlt fp16", n, MEASURED_FLOATS))
        for name, peer in MEASURED_AS.items():
            seconds = known.get((peer, n, MEASURED_FLOATS))
            if seconds is not None and ours is not None:
                rows.append(
                    {"kind": "measured", "model": "", "workers": n, "name": name, "peer": peer, "allreduce_s": seconds}
                    | {"ratio_allreduce_s": seconds / ours}
                )
    return rows


# ---- one run ----


def one_run(setting: Setting, model: Model, n: int, nodes: int, epochs: int, seed: int) -> list[Row]:
    """A training run with everything that may happen, as one row."""
    allreduce_s = _smlt_cached(setting.functions(nodes), n, model.floats, "fp16").seconds if n > 1 else 0.0
    system = System("smlt fp16", allreduce_s, store_node=STORE_NODE, store_nodes=nodes if n > 1 else 0)
    found = train(system, setting.cost_model(model, n, nodes), setting.choice(n), epochs=epochs, seed=seed)
    return [{"model": model.name, "workers": n, "nodes": nodes, "epochs": epochs, "seed": seed, **asdict(found)}]
