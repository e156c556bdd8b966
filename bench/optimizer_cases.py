"""Simulated jobs for bench.optimizer: a world that is not what the optimizer was told.

The world's formulas are its own and none of smlt's: what is told is another set of formulas with other constants, so a prior
mean is wrong in its constants and in its shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.space import Choice, Space

MEMORY_MB = (512, 1024, 1769, 2654, 3538, 4423, 5307, 7076, 8845, 10240)
WORKERS = tuple(sorted({round(200 ** (i / 47)) for i in range(48)} | {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}))
GB_S_USD = 0.0000166667


@dataclass(frozen=True)
class Physics:
    """A model to be trained and what it is trained on. Times in s, sizes in MB, rates in MB/s."""

    sample_s: float  # compute of one sample on one vCPU
    parallel: float  # the part of it that more vCPUs make faster (Amdahl)
    gradient_mb: float  # on the wire
    link_mb_s: float  # of a worker with a whole vCPU, each way
    store_mb_s: float  # of all stores together
    round_trip_s: float
    worker_overhead_s: float  # a step's fixed cost
    crowd_s: float  # and what of it grows with the number of workers
    straggling: float  # by which part the slowest of e times as many workers is slower
    needs_mb: float
    store_usd_h: float
    start_s: float


def vcpus(memory_mb: int) -> float:
    return min(memory_mb / 1769, 6.0)


class World:
    """How long steps really take and what a second really costs. A StepModel, for the exhaustive search."""

    def __init__(self, physics: Physics) -> None:
        self.physics = physics

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        it, n, v = self.physics, choice.workers, vcpus(choice.memory_mb)
        cores = v if v < 1 else 1 / (1 - it.parallel + it.parallel / v)
        compute = math.ceil(global_batch_size / n) * it.sample_s / cores * (1 + it.straggling * math.log(n))
        link = it.link_mb_s * min(1.0, 0.35 + 0.65 * v)
        moved = 2 * (n - 1) / n * it.gradient_mb
        # what limits, limits softly: the 4-norm of the link's and the store's time
        wire = ((moved / link) ** 4 + (1.5 * n * moved / it.store_mb_s) ** 4) ** 0.25 if n > 1 else 0.0
        rounds = it.round_trip_s * (2 + math.sqrt(n)) if n > 1 else 0.0
        hidden = 0.4 * min(compute, wire)
        return compute + wire - hidden + rounds + it.worker_overhead_s / min(v, 1) + it.crowd_s * n**1.2

    def usd_per_s(self, choice: Choice) -> float:
        return choice.workers * choice.memory_mb / 1024 * GB_S_USD + self.physics.store_usd_h / 3600

    def switch_s(self, before: Choice | None, after: Choice) -> float:
        if before == after:
            return 0.0
        cold = self.physics.start_s * (1 + 1 / min(vcpus(after.memory_mb), 1.0)) / 2
        if before is None:
            return cold
        return cold + 1.0 if before.memory_mb != after.memory_mb else 0.5 * math.log2(1 + after.workers)

    def why_not(self, choice: Choice, global_batch_size: int | None = None) -> str:
        return "" if choice.memory_mb >= self.physics.needs_mb else f"needs {self.physics.needs_mb:.0f} MB"


class Told(World):
    """What the optimizer is told of it: simpler, and wrong where `Case.draw` makes it so."""

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        it, n, v = self.physics, choice.workers, vcpus(choice.memory_mb)
        compute = global_batch_size / n * it.sample_s / (v if v < 1 else 1 / (1 - it.parallel + it.parallel / v))
        wire = max(2 * it.gradient_mb / it.link_mb_s, 1.5 * n * 2 * it.gradient_mb / it.store_mb_s) if n > 1 else 0.0
        return compute + wire + 4 * it.round_trip_s + it.worker_overhead_s


class Flat(World):
    """No cost model: prices and starts are known, step times are not."""

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Case:
    """A job in a world, its goal, and the best that any choice, kept from start to end, could make of it."""

    world: World
    told: Told
    goal: Goal
    phase: Phase
    noise: float
    seed: int
    space: Space
    best: Choice
    best_value: float

    @property
    def kind(self) -> str:
        if self.goal.deadline_s is not None:
            return "deadline"
        return "budget" if self.goal.budget_usd is not None else "trade"

    def value(self, seconds: float, usd: float) -> float:
        """What counts: USD under a deadline, seconds under a budget, else their product."""
        return {"deadline": usd, "budget": seconds, "trade": seconds * usd}[self.kind]

    def kept(self, seconds: float, usd: float) -> bool:
        return seconds <= (self.goal.deadline_s or math.inf) and usd <= (self.goal.budget_usd or math.inf)


def draw(seed: int) -> Case:
    """A case. World and what is told differ by: compute, link, store, latency and overhead ±40 %, Amdahl's part, stragglers."""
    rng = np.random.default_rng(seed)

    def between(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    batch = int(rng.choice([512, 1024, 2048, 4096]))
    believed = Physics(
        sample_s=between(1e-3, 5e-2), parallel=rng.uniform(0.85, 0.97), gradient_mb=between(4, 250), link_mb_s=75.0,
        store_mb_s=float(rng.choice([1250, 2500, 5000])), round_trip_s=1e-3, worker_overhead_s=5e-3, crowd_s=0.0,
        straggling=0.0, needs_mb=float(rng.choice([300, 900, 1500, 2500])), store_usd_h=float(rng.choice([0.07, 0.3, 1.2])),
        start_s=between(3, 12),
    )  # fmt: skip

    def off(value: float, by: float = 0.4) -> float:
        return value * rng.uniform(1 - by, 1 + by)

    true = replace(
        believed, sample_s=off(believed.sample_s), parallel=rng.uniform(0.75, 0.99), link_mb_s=off(75.0),
        store_mb_s=off(believed.store_mb_s), round_trip_s=off(1e-3), worker_overhead_s=off(5e-3), crowd_s=between(1e-5, 4e-4),
        straggling=rng.uniform(0.0, 0.12),
    )  # fmt: skip
    world, space = World(true), Space(WORKERS, MEMORY_MB)
    kind = ("deadline", "budget", "trade")[seed % 3]
    choices = [choice for choice in space if not world.why_not(choice)]
    steps_s = np.array([world.step_s(choice, batch) for choice in choices])
    rates = np.array([world.usd_per_s(choice) for choice in choices])
    starts = np.array([world.switch_s(None, choice) for choice in choices])
    job_s = between(900, 6 * 3600)  # of the best trade
    steps = max(50, round(job_s / float(steps_s[(steps_s**2 * rates).argmin()])))
    seconds = starts + steps * steps_s
    usd = rates * seconds
    goal = Goal()
    if kind == "deadline":
        goal = Goal(deadline_s=float(seconds.min() + between(0.1, 3.0) * seconds.min()))
    elif kind == "budget":
        goal = Goal(budget_usd=float(usd.min() + between(0.1, 3.0) * usd.min()))
    case = Case(world, Told(believed), goal, Phase(steps, batch), rng.uniform(0.05, 0.1), seed, space, choices[0], 0.0)
    values = [case.value(s, c) if case.kept(s, c) else math.inf for s, c in zip(seconds, usd, strict=True)]
    best = int(np.argmin(values))
    return replace(case, best=choices[best], best_value=values[best])


class Run:
    """A job under way in a case's world: rounds are trained, time passes and money is spent."""

    def __init__(self, case: Case) -> None:
        self.case, self.left = case, case.phase.steps
        self.seconds = self.usd = 0.0
        self.current: Choice | None = None
        self.switches = 0
        self._rng = np.random.default_rng(case.seed + 7)

    @property
    def standing(self) -> Standing:
        return Standing(self.seconds, self.usd, (Phase(self.left, self.case.phase.global_batch_size),))

    def train(self, choice: Choice, round_s: float) -> tuple[float, int, float]:
        """A round of about so many seconds (inf: to the end). Returns its mean step time, its steps, and that mean's error.

        Every step scatters by the case's noise; so does what a whole round meets (the store's other users), by a fifth of it.
        """
        world, batch, noise = self.case.world, self.case.phase.global_batch_size, self.case.noise
        if choice != self.current:
            self._pass(world.switch_s(self.current, choice), choice)
            self.switches += self.current is not None
        self.current = choice
        true_s = world.step_s(choice, batch)
        steps = int(min(self.left, max(5, math.ceil(min(round_s / true_s, 1e9)))))
        error = math.hypot(noise / math.sqrt(steps), noise / 5)
        mean_s = true_s * math.exp(self._rng.normal(0.0, error)) if math.isfinite(round_s) else true_s
        self.left -= steps
        self._pass(steps * mean_s, choice)
        return mean_s, steps, error

    def _pass(self, seconds: float, choice: Choice) -> None:
        self.seconds += seconds
        self.usd += seconds * self.case.world.usd_per_s(choice)
