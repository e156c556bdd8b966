"""What can be had for a job: time and cost over workers and memory, which of them to take, and what a machine would do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from smlt.client.cost import Choice, CostModel
from smlt.client.optimizer.goals import Goal
from smlt.client.optimizer.space import Space
from smlt.client.platforms import LOCAL_MEMORY_MB, Platform
from smlt.worker.processors import MB_PER_VCPU

#: A prediction may be off by so much (the bar of `python -m bench.estimate`): a recommendation keeps that distance if it can.
MARGIN = 0.15
#: vCPUs by size of EC2's compute-optimised machines, and their memory. https://aws.amazon.com/ec2/instance-types/c6i/, .../c7g/
MACHINE_MB_PER_VCPU = 2000
MACHINE_VCPUS = {"large": 2, "xlarge": 4, "2xlarge": 8, "4xlarge": 16, "8xlarge": 32, "16xlarge": 64, "32xlarge": 128}
FAMILIES = {"x86_64": "c6i", "arm64": "c7g"}
#: EC2 bills by the second, a minute at least. https://aws.amazon.com/ec2/pricing/on-demand/
MACHINE_MINIMUM_S = 60.0
#: Until a machine has booted and has the packages: an assumption, not measured.
MACHINE_BOOT_S = 60.0


@dataclass(frozen=True)
class Offer:
    """A choice with its predicted time and cost. `on_front`: no other one is both faster and cheaper."""

    choice: Choice
    seconds: float
    usd: float
    on_front: bool = False
    store_limited: bool = False

    def keeps(self, goal: Goal, margin: float = 0.0) -> bool:
        """Whether it is within deadline and budget, with so much to spare."""
        return all(
            limit is None or value * (1 + margin) <= limit
            for value, limit in ((self.seconds, goal.deadline_s), (self.usd, goal.budget_usd))
        )


@dataclass(frozen=True)
class MachineOffer:
    """One rented machine for the job: its type, vCPUs, the workers on it, and time and cost, booting among it."""

    node: str
    vcpus: int
    workers: int
    seconds: float
    usd: float


def offers(model: CostModel, space: Space) -> list[Offer]:
    """All choices that can work, by time."""
    found = []
    for choice in space:
        if model.why_not(choice):
            continue
        job = model.job(choice)
        found.append(Offer(choice, job.seconds, job.usd, store_limited=model.communication.store_limited(choice.workers)))
    found.sort(key=lambda offer: (offer.seconds, offer.usd))
    least, marked = math.inf, []
    for offer in found:
        marked.append(replace(offer, on_front=offer.usd < least))
        least = min(least, offer.usd)
    return marked


def recommended(found: Sequence[Offer], goal: Goal) -> Offer | None:
    """The one to take for a goal (see `Goal` for what is best), with a margin if there is such a one; None: none keeps it."""
    able = [offer for offer in found if offer.keeps(goal, MARGIN)] or [offer for offer in found if offer.keeps(goal)]
    if not able:
        return None
    if goal.deadline_s is not None:
        return min(able, key=lambda offer: (offer.usd, offer.seconds))
    if goal.budget_usd is not None:
        return min(able, key=lambda offer: (offer.seconds, offer.usd))
    return min(able, key=lambda offer: offer.seconds * offer.usd)


def interesting(found: Sequence[Offer], taken: Offer | None, rows: int = 14) -> list[Offer]:
    """A few of all: the front, thinned evenly by time, what is recommended, and the best for 1, 2, 4, ... workers beside it."""
    if len(found) <= rows:
        return list(found)
    front = [offer for offer in found if offer.on_front]
    shown = {id(offer): offer for offer in _thinned(front, rows - 5)}
    if taken is not None:
        shown[id(taken)] = taken
    for n in _powers(max((offer.choice.workers for offer in found), default=0)):
        alike = [offer for offer in found if offer.choice.workers == n]
        if alike and len(shown) < rows and not any(offer.choice.workers == n for offer in shown.values()):
            best = min(alike, key=lambda offer: offer.seconds * offer.usd)
            shown[id(best)] = best
    return sorted(shown.values(), key=lambda offer: (offer.seconds, offer.usd))


def _thinned(front: Sequence[Offer], most: int) -> Iterable[Offer]:
    if len(front) <= most:
        return front
    places = {round(place * (len(front) - 1) / (most - 1)) for place in range(most)}
    return [front[place] for place in sorted(places)]


def _powers(most: int) -> Iterable[int]:
    n = 1
    while n <= most:
        yield n
        n *= 4


# ---- a machine instead ----


def machines(model: CostModel) -> list[MachineOffer]:
    """The job on each compute-optimised machine of the price table, its workers beside a store of their own, as `smlt train`.

    A vCPU there is taken for a vCPU of a function: both are a thread of a core of x86, a core of arm64.
    """
    architecture = model.platform.architecture
    found = []
    for size, vcpus in MACHINE_VCPUS.items():
        node = f"{FAMILIES[architecture]}.{size}"
        if f"ec2.{node}" not in model.prices:
            continue
        here = CostModel(model.workload, Platform.local(vcpus), model.prices)
        able = [n for n in {1, 2, 4, 8, vcpus // 4, vcpus // 2, vcpus} if 1 <= n <= vcpus and not here.why_not(_at(n))]
        held = [n for n in able if _resident_mb(here, n) < 0.9 * MACHINE_MB_PER_VCPU * vcpus]
        if not held:
            continue
        workers, job_s = min(((n, here.job(_at(n)).seconds) for n in held), key=lambda pair: pair[1])
        seconds = MACHINE_BOOT_S + job_s
        billed = Fraction(max(seconds, MACHINE_MINIMUM_S)) / 3600
        usd = float(billed * Fraction(model.prices[f"ec2.{node}"].usd))
        found.append(MachineOffer(node, vcpus, workers, seconds, usd))
    return found


def _resident_mb(model: CostModel, workers: int) -> float:
    return workers * model.workload.resident_mb(-(-model.workload.global_batch_size // workers), workers)


def _at(workers: int) -> Choice:
    return Choice(workers, LOCAL_MEMORY_MB)


def machine_like(offer: Offer, found: Sequence[MachineOffer]) -> MachineOffer | None:
    """Of machines the one with as many vCPUs as the functions have together, or the next larger one; else the largest."""
    if not found:
        return None
    vcpus = offer.choice.workers * offer.choice.memory_mb / MB_PER_VCPU
    return next((machine for machine in found if machine.vcpus >= 0.9 * vcpus), found[-1])


def better_machine(offer: Offer, found: Sequence[MachineOffer]) -> MachineOffer | None:
    """The cheapest machine that is cheaper than the offer and not slower; None when functions are the right tool."""
    able = [machine for machine in found if machine.usd < offer.usd and machine.seconds <= offer.seconds]
    return min(able, key=lambda machine: machine.usd, default=None)
