"""What a step, and a job, take and cost with so many workers of so much memory.

The formulas, the constants and where they come from are in docs/cost.md. Time is predicted from a profiled `Workload` and a
`Platform`; money is put together by `smlt.client.bill`, as that of a real run is.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from typing import Protocol

from smlt.client.bill import Bill, ObjectUse, StoreUse, estimate
from smlt.client.communication import Communication
from smlt.client.optimizer.goals import Phase
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.space import Choice, Space
from smlt.client.platforms import (
    COLD_START_S,
    LOCAL_MEMORY_MB,
    MEMORY_MB_MAX,
    MEMORY_MB_MIN,
    OBJECT_TRIP_S,
    SANDBOX_S,
    Platform,
)
from smlt.client.prices import PRICES, Prices, at_usage
from smlt.client.workload import Workload
from smlt.errors import ConfigError
from smlt.worker.processors import MB_PER_VCPU

__all__ = [
    "Choice",
    "CostModel",
    "JobEstimate",
    "Phase",
    "Platform",
    "Rehearsal",
    "Scales",
    "StepModel",
    "StepParts",
    "Workload",
]

#: What a worker does in a step beside the framework's work and the collective: minibatch, seeds, report, loss. One core's
#: time; this and the next three as `python -m bench.local_costs` finds them.
STEP_OVERHEAD_S = 0.5e-3
#: What the scheduler does for a step's reports, on the cores that local workers share: for the step, for each worker.
SCHEDULER_STEP_S, SCHEDULER_REPORT_S = 0.08e-3, 0.13e-3
#: From the scheduler's start to the workers' first step, beside what the workers themselves import and load: store and
#: upload; Python and our own modules in each worker; and from the last step to the end, beside the workers' exit.
LOCAL_START_S, LOCAL_WORKER_S, LOCAL_END_S = 0.05, 0.18, 0.3
#: A change of the membership: freeze, acknowledge, resume (docs/reliability.md), without the step that is done again.
CHANGE_S = 0.1
#: S3's requests of a checkpoint beside the parts: state, manifest, the list of older ones; of a start: manifests, code.
CHECKPOINT_PUTS, START_GETS = 3, 4
#: A large object goes up in parts of this size (smlt/store/s3_upload.py).
PART_BYTES = 8 << 20
#: What an invocation leaves in the log: START, END, REPORT and a few lines of ours.
LOG_BYTES = 1500
#: Left free of a function's memory: the runtime, and what pages and allocators waste.
MEMORY_MARGIN = 1.1


class StepModel(Protocol):
    """What the optimizer asks of a model of costs; `CostModel` is the real one."""

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        """Predicted wall time of one global step, in seconds: compute, communication that it does not hide, overhead."""

    def usd_per_s(self, choice: Choice) -> float:
        """What a second of the job costs: functions, their disk, the store; requests to S3 and Lambda by their mean rate."""

    def switch_s(self, before: Choice | None, after: Choice) -> float:
        """Seconds for which training stands still when it changes over (None: at the start)."""

    def why_not(self, choice: Choice) -> str:
        """ "" when a choice can work, else why it cannot: too little memory, more workers than samples in a batch."""


@dataclass(frozen=True)
class StepParts:
    """A global step's wall time, in seconds; `total_s` is the sum of the others.

    `compute_s`: forward, backward, optimizer; `communication_s`: what of the all-reduce they do not hide; `data_s`: waiting for
    samples; `overhead_s`: minibatch, report; `epoch_end_s`: the step's share of evaluation, checkpoint and of being
    invoked anew.
    """

    compute_s: float
    communication_s: float
    data_s: float
    overhead_s: float
    epoch_end_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.communication_s + self.data_s + self.overhead_s + self.epoch_end_s


@dataclass(frozen=True)
class JobEstimate:
    """A whole job: wall time and its parts in seconds, and its bill. `usd` of a local job is a shadow price, no money."""

    choice: Choice
    seconds: float
    start_s: float
    steps_s: float
    end_s: float
    invocations: int
    bill: Bill

    @property
    def usd(self) -> float:
        """All of it, in USD."""
        return float(self.bill.total_usd)


@dataclass(frozen=True)
class Scales:
    """What observation has taught: factors of the parts of a step."""

    compute: float = 1.0
    communication: float = 1.0
    data: float = 1.0
    total: float = 1.0
    start: float = 1.0  # of a local run, with its end: `with_rehearsal`
    end: float = 1.0


@dataclass(frozen=True)
class Rehearsal:
    """A short real run: its steps without the ends of epochs, from its start to the first step, from the last to its end."""

    observation: Observation
    start_s: float
    end_s: float


class CostModel:
    """Predicts step times and costs of `workload` on `platform`. Immutable: `calibrated` gives another one."""

    def __init__(
        self, workload: Workload, platform: Platform, prices: Prices = PRICES, *, scales: Scales | None = None
    ) -> None:
        self.workload, self.platform, self.scales = workload, platform, scales or Scales()
        self.prices = at_usage(prices, platform.architecture, platform.month_gb_s)
        self.communication = Communication(workload.bucket_bytes(), platform, workload.codec)
        self._parts: dict[tuple[Choice, int], StepParts] = {}

    # ---- a step ----

    def step(self, choice: Choice, global_batch_size: int) -> StepParts:
        """The parts of a step, with its share of the epochs' ends and of the re-invocations."""
        key = choice, global_batch_size
        if key not in self._parts:
            parts = self._scaled(self._within(choice, global_batch_size))
            steps = self.workload.steps_of(global_batch_size)
            epoch_end = self.scales.total * self._epoch_end_s(choice) / steps
            if not self.platform.is_local:  # every so many seconds, all stand still for a start
                again = self._start_s(choice) / self.platform.invocation_s
                epoch_end += again * (parts.total_s + epoch_end)
            self._parts[key] = replace(parts, epoch_end_s=epoch_end)
        return self._parts[key]

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        return self.step(choice, global_batch_size).total_s

    def _within(self, choice: Choice, global_batch_size: int) -> StepParts:
        workload, platform, n = self.workload, self.platform, choice.workers
        local = -(-global_batch_size // n)
        computing = workload.compute_s(local)
        load = workload.load_sample_s * local
        speed = platform.speed(n, choice.memory_mb, workload.parallel_fraction)
        if platform.is_local:
            return self._on_shared_cores(n, computing, load, speed)
        one = platform.core_speed * min(1.0, platform.vcpus(choice.memory_mb))
        compute_s = computing / speed
        communication_s = self.communication.exposed_s(n, workload.tail_fraction * compute_s, one)
        overhead_s = STEP_OVERHEAD_S / one + platform.tuning.round_trip_s  # the report waits for its answer
        compute_s += workload.optimizer_s / one
        data_s = self._stream_s(local)
        # With less than two vCPUs the thread that loads samples takes its time from the one that computes.
        data_s = max(0.0, data_s - compute_s) + (load / one if platform.vcpus(choice.memory_mb) < 2 else 0.0)
        return StepParts(compute_s, communication_s, data_s, overhead_s, 0.0)

    def _on_shared_cores(self, n: int, computing: float, load: float, speed: float) -> StepParts:
        """Workers in waves over the cores; the phases of a step follow one another, for each waits for the slowest worker."""
        workload, cores = self.workload, self.platform.cores
        waves = max(1.0, n / cores)
        threads = self.platform.threads(n, LOCAL_MEMORY_MB)
        if threads > 1 and threads == workload.cores:
            speed = 1 / workload.all_cores  # as measured
        crowd = 1 + (workload.crowding - 1) * (min(n * threads, cores) - 1) / max(1, cores - 1) if threads == 1 else 1.0
        compute_s = waves * crowd * (computing / speed + workload.optimizer_s)
        # The thread that loads ahead has a core for itself as long as there are more cores than busy threads.
        spare = cores - n * threads
        data_s = 0.0 if spare > 0 else load * waves
        # Where a worker's threads have all cores, one that the scheduler takes away holds up the others.
        aside = SCHEDULER_STEP_S + n * SCHEDULER_REPORT_S
        overhead_s = STEP_OVERHEAD_S * waves + (aside / cores if threads == 1 else aside)
        return StepParts(compute_s, self.communication.on_shared_cores_s(n), data_s, overhead_s, 0.0)

    def _scaled(self, parts: StepParts) -> StepParts:
        scales = self.scales
        return StepParts(
            parts.compute_s * scales.compute * scales.total,
            parts.communication_s * scales.communication * scales.total,
            parts.data_s * scales.data * scales.total,
            parts.overhead_s * scales.total,
            0.0,
        )

    def _stream_s(self, local: int) -> float:
        """What bringing a step's samples takes when the data do not fit a function's disk."""
        workload, platform = self.workload, self.platform
        if workload.data_bytes <= platform.ephemeral_mb * 2**20 * 0.75:
            return 0.0
        return local * workload.data_bytes / workload.samples / platform.object_bytes_per_s + OBJECT_TRIP_S

    # ---- around the steps ----

    def _epoch_end_s(self, choice: Choice) -> float:
        """Evaluation by all, a checkpoint by one for whom the others wait at the next step."""
        workload, platform, n = self.workload, self.platform, choice.workers
        part = workload.evaluate_s(-(-workload.test_samples // n)) / platform.speed(
            n, choice.memory_mb, workload.parallel_fraction
        )
        if platform.is_local:
            part *= max(1.0, n / platform.cores)
        small = self.communication.small_s(n) * (2 if workload.test_samples else 1)
        return part + small + self._checkpoint_s(choice) / workload.checkpoint_every_epochs

    def _checkpoint_s(self, choice: Choice) -> float:
        workload, platform = self.workload, self.platform
        if platform.is_local:
            return workload.checkpoint_s
        sent = workload.checkpoint_bytes / platform.object_bytes_per_s + CHECKPOINT_PUTS * OBJECT_TRIP_S
        return workload.checkpoint_s / min(1.0, platform.vcpus(choice.memory_mb)) + sent

    def _start_s(self, choice: Choice) -> float:
        """From nothing to the first step: sandbox, imports, code and data, model, the others."""
        workload, platform, n = self.workload, self.platform, choice.workers
        own = workload.import_s + workload.load_s
        joined = self.communication.broadcast_s(n, workload.model_bytes)
        if platform.is_local:
            waves = max(1.0, n / platform.cores)
            crowd = workload.crowding if n > 1 else 1.0
            return LOCAL_START_S + (own + LOCAL_WORKER_S) * waves * crowd + joined
        one = platform.core_speed * min(1.0, platform.vcpus(choice.memory_mb))
        there = min(workload.data_bytes, platform.ephemeral_mb * 2**20)
        fetched = (workload.code_bytes + there) / platform.object_bytes_per_s
        asked = (START_GETS + workload.data_files / 4) * OBJECT_TRIP_S
        return SANDBOX_S + (COLD_START_S + own) / one + fetched + asked + joined

    def _end_s(self, choice: Choice) -> float:
        if not self.platform.is_local:
            return CHANGE_S
        return LOCAL_END_S + self.workload.exit_s * max(1.0, choice.workers / self.platform.cores)

    def switch_s(self, before: Choice | None, after: Choice) -> float:
        if before is None:
            return self.scales.start * self._start_s(after)
        if before == after:
            return 0.0
        again = max(self.step(choice, self.workload.global_batch_size).total_s for choice in (before, after))
        snapshot = 2 * self.workload.checkpoint_bytes / self.platform.object_bytes_per_s + self.workload.checkpoint_s
        if before.memory_mb == after.memory_mb or self.platform.is_local:
            # Newcomers load while the others train on; then they take the donor's snapshot.
            return CHANGE_S + again + (snapshot if after.workers > before.workers else 0.0)
        return self._checkpoint_s(before) + self._start_s(after) + snapshot / 2

    # ---- a job ----

    def job(self, choice: Choice, left: Sequence[Phase] | None = None, *, begun: bool = False) -> JobEstimate:
        """What is left of a job (None: all of it), and its bill. `begun`: the workers are there already.

        ConfigError when the choice cannot work.
        """
        if reason := self.why_not(choice):
            raise ConfigError(f"{choice}: {reason}")
        workload, platform = self.workload, self.platform
        left = self.phases() if left is None else left
        start_s = 0.0 if begun else self.scales.start * self._start_s(choice)
        steps_s = sum(phase.steps * self.step_s(choice, phase.global_batch_size) for phase in left)
        end_s = self.scales.end * self._end_s(choice)
        seconds = start_s + steps_s + end_s
        epochs = sum(phase.steps / workload.steps_of(phase.global_batch_size) for phase in left)
        invocations = choice.workers * math.ceil(seconds / platform.invocation_s)
        return JobEstimate(
            choice, seconds, start_s, steps_s, end_s, invocations, self._bill(choice, seconds, epochs, invocations)
        )

    def phases(self) -> tuple[Phase, ...]:
        """The whole job, at one global batch size."""
        workload = self.workload
        return (Phase(workload.epochs * workload.steps_per_epoch, workload.global_batch_size),)

    def _bill(self, choice: Choice, seconds: float, epochs: float, invocations: int) -> Bill:
        platform, n = self.platform, choice.workers
        if platform.is_local:  # a shadow price: least cost is then fewest worker-seconds
            return shadow_bill(choice, seconds, self.prices)
        written = math.ceil(epochs / self.workload.checkpoint_every_epochs) * self._checkpoint_puts()
        gets = invocations * (START_GETS + self.workload.data_files)
        kept = 3 * self.workload.checkpoint_bytes + self.workload.data_bytes + self.workload.code_bytes
        return estimate(
            n,
            choice.memory_mb,
            seconds,
            architecture=platform.architecture,
            ephemeral_mb=platform.ephemeral_mb,
            invocation_s=platform.invocation_s,
            objects=ObjectUse(puts=written + START_GETS, gets=gets, stored_bytes=kept, stored_s=seconds),
            store=StoreUse(platform.store_node, seconds, platform.store_nodes) if platform.store_node else None,
            log_bytes=invocations * LOG_BYTES,
            prices=self.prices,
        )

    def _checkpoint_puts(self) -> int:
        return CHECKPOINT_PUTS + max(1, -(-self.workload.checkpoint_bytes // PART_BYTES))

    def usd_per_s(self, choice: Choice) -> float:
        if self.platform.is_local:
            return float(shadow_bill(choice, 1.0, self.prices).total_usd)
        # A thousand seconds at once: a bill counts whole milliseconds, invocations and requests.
        platform, seconds = self.platform, 1000.0
        functions = estimate(
            choice.workers,
            choice.memory_mb,
            seconds,
            architecture=platform.architecture,
            ephemeral_mb=platform.ephemeral_mb,
            invocation_s=seconds,
            store=StoreUse(platform.store_node, seconds, platform.store_nodes) if platform.store_node else None,
            prices=self.prices,
        )
        batch = self.workload.global_batch_size
        epoch_s = self.workload.steps_per_epoch * self.step_s(choice, batch) * self.workload.checkpoint_every_epochs
        writes = float(self.prices["s3.thousand-puts"].usd) / 1000 * self._checkpoint_puts() / max(epoch_s, 1e-9)
        requests = float(self.prices["lambda.million-requests"].usd) / 1e6 * choice.workers
        anew = requests / platform.invocation_s - requests / seconds
        return float(functions.total_usd) / seconds + writes + anew

    # ---- what can be chosen ----

    def why_not(self, choice: Choice, global_batch_size: int | None = None) -> str:
        batch = global_batch_size or self.workload.global_batch_size
        if choice.workers > batch:
            return f"{choice.workers} workers cannot share a global batch of {batch}"
        if self.platform.is_local:
            return ""
        if not MEMORY_MB_MIN <= choice.memory_mb <= MEMORY_MB_MAX:
            return f"a function has {MEMORY_MB_MIN} to {MEMORY_MB_MAX} MB"
        needed = MEMORY_MARGIN * self.workload.resident_mb(-(-batch // choice.workers), choice.workers) * 1e6 / 2**20
        if needed > choice.memory_mb:
            return f"a worker needs about {math.ceil(needed)} MB, not {choice.memory_mb}"
        return ""

    def space(self, max_workers: int, memory_mb: Iterable[int] | None = None) -> Space:
        """The choices: every number of workers up to 16, then ever wider steps; memory by half vCPUs above one.

        Only what can work with some other value is in it. ConfigError when nothing can.
        """
        batch = self.workload.global_batch_size
        if self.platform.is_local:
            return Space(_counts(min(max_workers, batch)), (LOCAL_MEMORY_MB,))
        sizes = sorted(set(memory_mb)) if memory_mb is not None else memory_sizes()
        workers = [n for n in _counts(min(max_workers, batch)) if not self.why_not(Choice(n, max(sizes)))]
        fitting = [size for size in sizes if workers and not self.why_not(Choice(max(workers), size))]
        if not fitting:
            raise ConfigError(f"no function can hold this task: {self.why_not(Choice(min(max_workers, batch), max(sizes)))}")
        return Space(tuple(workers), tuple(fitting))

    # ---- learning ----

    def calibrated(self, observations: Iterable[Observation]) -> CostModel:
        """This model, its parts scaled to what was observed: compute, communication, waiting for data, and then the whole.

        Medians of ratios, so that one disturbed round does not matter. Without the parts only the whole is scaled.
        """
        rows = [row for row in observations if not self.why_not(row.choice, row.global_batch_size)]
        if not rows:
            return self
        ratios: dict[str, list[float]] = {"compute": [], "communication": [], "data": []}
        for row in rows:
            parts = self.step(row.choice, row.global_batch_size)
            for name, known in ratios.items():
                observed, predicted = getattr(row, f"{name}_s"), getattr(parts, f"{name}_s")
                if observed > 0 and predicted > 0.02 * parts.total_s:
                    known.append(observed / predicted)
        learnt = {
            name: getattr(self.scales, name) * (statistics.median(known) if known else 1.0) for name, known in ratios.items()
        }
        inner = CostModel(self.workload, self.platform, self.prices, scales=replace(self.scales, **learnt))
        whole = statistics.median(row.step_s / inner.step_s(row.choice, row.global_batch_size) for row in rows)
        scales = replace(inner.scales, total=inner.scales.total * whole)
        return CostModel(self.workload, self.platform, self.prices, scales=scales)

    def with_rehearsal(self, rehearsal: Rehearsal) -> CostModel:
        """This model after a short real run: scaled to its steps, and to what starting and ending took."""
        row = rehearsal.observation
        start_s, end_s = (rehearsal.start_s / self._start_s(row.choice), rehearsal.end_s / self._end_s(row.choice))
        parted = replace(self.calibrated([row]).scales, total=self.scales.total)
        parts = CostModel(self.workload, self.platform, self.prices, scales=parted).step(row.choice, row.global_batch_size)
        whole = row.step_s / (parts.total_s - parts.epoch_end_s)  # no end of an epoch was in it
        scales = replace(parted, total=parted.total * whole, start=start_s, end=end_s)
        return CostModel(self.workload, self.platform, self.prices, scales=scales)

    # ---- as JSON ----

    def to_json(self) -> str:
        """Workload, platform and what was learnt; the prices are not in it."""
        parts = {
            "workload": json.loads(self.workload.to_json()),
            "platform": json.loads(self.platform.to_json()),
            "scales": asdict(self.scales),
        }
        return json.dumps(parts, indent=1)

    @classmethod
    def from_json(cls, text: str, prices: Prices = PRICES) -> CostModel:
        """The inverse of `to_json`. ConfigError when it is no such thing."""
        try:
            value = json.loads(text)
            scales = Scales(**{field.name: float(value["scales"][field.name]) for field in fields(Scales)})
            workload, platform = json.dumps(value["workload"]), json.dumps(value["platform"])
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"cost model: {error}") from error
        return cls(Workload.from_json(workload), Platform.from_json(platform), prices, scales=scales)


def shadow_bill(choice: Choice, seconds: float, prices: Prices = PRICES) -> Bill:
    """What local workers would cost as functions of one vCPU each: nothing is paid, but fewer worker-seconds are better."""
    made = estimate(choice.workers, LOCAL_MEMORY_MB, seconds, prices=prices)
    return replace(made, items=tuple(item for item in made.items if item.unit == "GB-s"))


def memory_sizes() -> tuple[int, ...]:
    """Memory by quarters of a vCPU up to one, by halves above: 442 MB to 10,240 MB."""
    quarters = [round(MB_PER_VCPU * Fraction(part, 4)) for part in (1, 2, 3)]
    halves = [round(MB_PER_VCPU * Fraction(part, 2)) for part in range(2, 12)]
    return (*quarters, *halves, MEMORY_MB_MAX)


def _counts(most: int) -> tuple[int, ...]:
    """1 to 16, then about an eighth more each."""
    counts = list(range(1, min(most, 16) + 1))
    while counts[-1] < most:
        counts.append(min(most, counts[-1] + max(1, counts[-1] // 8)))
    return tuple(counts)
