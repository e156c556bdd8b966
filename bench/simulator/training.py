"""A whole training run: steps, cold starts, the limit of an invocation, stragglers, failures, and what it costs.

Compute, starts and memory's share of processors are those of `smlt.client.cost`, an all-reduce is simulated once for each
setting (`collective`), and chance is drawn step by step from a seed. Everything is synchronous: a step ends when the
slowest worker has computed and the all-reduce is over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from smlt.client.bill import ObjectUse, StoreUse, estimate
from smlt.client.cost import CostModel
from smlt.client.optimizer.space import Choice
from smlt.client.prices import PRICES, Prices


@dataclass(frozen=True)
class Hazards:
    """What goes wrong, and how much things vary.

    `straggling`: the standard deviation of the logarithm of a worker's compute time in a step. `starting`: of a cold start.
    `failures_per_hour`: of one worker. `detect_s`: until a dead function is noticed (docs/reliability.md, --liveness).
    `margin_s`: of an invocation's limit, left for the checkpoint.
    """

    straggling: float = 0.10
    starting: float = 0.30
    failures_per_hour: float = 0.02
    detect_s: float = 10.0
    margin_s: float = 30.0


CALM = Hazards(straggling=0.0, starting=0.0, failures_per_hour=0.0)


@dataclass(frozen=True)
class System:
    """How a system trains: an all-reduce's seconds, S3's requests in it, machines beside the functions.

    `resumes`: a worker that is lost costs its step; otherwise everyone goes back to the last checkpoint, an epoch's beginning.
    """

    name: str
    allreduce_s: float
    step_puts: float = 0.0
    step_gets: float = 0.0
    store_node: str = ""
    store_nodes: int = 0
    resumes: bool = True


@dataclass(frozen=True)
class Training:
    """A run. Seconds by what they went to; their sum is `seconds`."""

    seconds: float
    compute_s: float
    waiting_s: float  # for stragglers
    communication_s: float
    starts_s: float  # the first start and re-invocations
    recovery_s: float
    steps: int
    failures: int
    pauses: int  # for re-invocation
    usd: float


def train(
    system: System,
    model: CostModel,
    choice: Choice,
    *,
    epochs: int = 1,
    hazards: Hazards = Hazards(),
    seed: int = 0,
    prices: Prices = PRICES,
) -> Training:
    """`epochs` of the model's workload with these workers. The same seed gives the same run."""
    chance = np.random.default_rng(seed)
    n, workload = choice.workers, model.workload
    parts = model.step(choice, workload.global_batch_size)
    own_s, allreduce_s = parts.compute_s + parts.data_s + parts.overhead_s, system.allreduce_s if n > 1 else 0.0
    start_s, steps = model.switch_s(None, choice), epochs * workload.steps_per_epoch
    limit_s = model.platform.invocation_s - hazards.margin_s

    def start(workers: int) -> float:
        """Until the last of `workers` has started."""
        return start_s * float(np.exp(hazards.starting * chance.standard_normal(workers)).max())

    def until_failure() -> float:
        rate = n * hazards.failures_per_hour / 3600
        return float(chance.exponential(1 / rate)) if rate else math.inf

    now = starts_s = start(n)
    invoked, fails_at = 0.0, now + until_failure()
    waiting_s = recovery_s = 0.0
    failures = pauses = done = 0
    while done < steps:
        slowest = own_s * float(np.exp(hazards.straggling * chance.standard_normal(n)).max())
        step_s = slowest + allreduce_s
        if now + step_s - invoked > limit_s and now > invoked + start_s:
            paused = workload.checkpoint_s + workload.checkpoint_bytes / model.platform.object_bytes_per_s + start(n)
            now, starts_s, pauses, invoked = now + paused, starts_s + paused, pauses + 1, now
        if fails_at < now + step_s:
            lost = fails_at - now + hazards.detect_s + start(1)
            if not system.resumes:
                back = done % workload.steps_per_epoch
                lost += back * (own_s + allreduce_s)
            now, recovery_s, failures = now + max(lost, 0.0), recovery_s + max(lost, 0.0), failures + 1
            fails_at = now + until_failure()
            continue
        now, done, waiting_s = now + step_s, done + 1, waiting_s + slowest - own_s
    usd = bill_usd(system, model, choice, now, steps, pauses, prices)
    return Training(now, steps * own_s, waiting_s, steps * allreduce_s, starts_s, recovery_s, steps, failures, pauses, usd)


def bill_usd(
    system: System, model: CostModel, choice: Choice, seconds: float, steps: int, pauses: int, prices: Prices = PRICES
) -> float:
    """Functions for the whole time, the store or the servers as long, S3's requests."""
    objects = ObjectUse(
        puts=round(system.step_puts * steps) + pauses, gets=round(system.step_gets * steps) + 10 * choice.workers
    )
    store = StoreUse(system.store_node, seconds, system.store_nodes) if system.store_nodes else None
    made = estimate(
        choice.workers,
        choice.memory_mb,
        seconds,
        architecture=model.platform.architecture,
        invocation_s=model.platform.invocation_s,
        objects=objects,
        store=store,
        prices=prices,
    )
    return float(made.total_usd)
