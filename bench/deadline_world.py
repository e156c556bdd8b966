"""The jobs of bench.deadlines: what the optimizer believes of one beforehand, what is true of it, and its course."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.observations import EpochEnds, Observation, relative_error
from smlt.client.optimizer.space import Choice, Space

Array = NDArray[np.float64]

WORKERS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96)
MEMORY_MB = (884, 1769, 2654, 3538, 5307, 7076, 10240)
BATCH = 512
STEP_NOISE = 0.1
#: Until a lost worker is noticed, in seconds.
NOTICED_S = 10.0


@dataclass(frozen=True)
class Analytic:
    """A step: `compute_s` with one vCPU for the whole batch, over the vCPUs of all; `fixed_s`; an all-reduce of `model_s` on
    one link and `hop_s` for each worker. `memory`: the exponent of what a vCPU more is worth. `ripple`: see draw_job.
    """

    compute_s: float
    fixed_s: float
    model_s: float
    hop_s: float
    memory: float
    start_s: float
    epoch_end_s: float
    steps_per_epoch: int
    ripple: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def plain_s(self, choice: Choice, global_batch_size: int = BATCH) -> float:
        """A step alone."""
        n, vcpus = choice.workers, choice.memory_mb / 1769
        speed = vcpus if vcpus < 1 else vcpus**self.memory
        compute = self.compute_s * global_batch_size / BATCH / n / speed + self.fixed_s / min(1.0, vcpus)
        communication = 0.0 if n == 1 else self.model_s * 2 * (n - 1) / n / min(1.0, vcpus) + self.hop_s * n
        size, a, b, shift = self.ripple
        return (compute + communication) * math.exp(size * math.sin(a * math.log(n) + b * math.log(choice.memory_mb) + shift))

    def end_s(self, choice: Choice) -> float:
        """The end of an epoch: evaluation by all, a checkpoint by one."""
        return self.epoch_end_s * (0.3 + 0.7 / choice.workers)

    def share_s(self, choice: Choice, global_batch_size: int = BATCH) -> float:
        """Of that, each step's part."""
        return self.end_s(choice) / self.steps_per_epoch

    # ---- as a StepModel ----

    def step_s(self, choice: Choice, global_batch_size: int) -> float:
        return self.plain_s(choice, global_batch_size) + self.share_s(choice)

    def usd_per_s(self, choice: Choice) -> float:
        return 1.66667e-5 * choice.workers * choice.memory_mb / 1024 + 0.06 / 3600

    def switch_s(self, before: Choice | None, after: Choice) -> float:
        if before == after:
            return 0.0
        if before is None or before.memory_mb != after.memory_mb:
            return self.start_s * (1.0 if after.memory_mb >= 1769 else 1769 / after.memory_mb) + (before is not None)
        return 0.5 + self.plain_s(after) + (1.0 if after.workers > before.workers else 0.0)

    def why_not(self, choice: Choice) -> str:
        return ""


@dataclass(frozen=True)
class Job:
    """`steps` of them; behind the part `drift_at` of them every step takes `drift` times as long."""

    space: Space
    model: Analytic
    truth: Analytic
    steps: int
    drift: float
    drift_at: float

    def totals(self, *, better: bool | None = None) -> tuple[Array, Array]:
        """Seconds and USD of every choice, started at once and kept, without noise and failures.

        `better`: as if the drift did not come, if that is better (True) or worse (False) than with it.
        """
        drift = self.drift if better is None else min(1.0, self.drift) if better else max(1.0, self.drift)
        stretched = self.drift_at + (1 - self.drift_at) * drift
        ends = self.steps // self.truth.steps_per_epoch
        seconds = np.array(
            [
                self.truth.switch_s(None, it) + self.steps * stretched * self.truth.plain_s(it) + ends * self.truth.end_s(it)
                for it in self.space
            ]
        )
        return seconds, seconds * np.array([self.truth.usd_per_s(it) for it in self.space])

    def efficient(self, seconds: Array, usd: Array) -> NDArray[np.bool_]:
        """Which choices no other one beats in both time and cost."""
        return np.array([not np.any((seconds < s) & (usd < u)) for s, u in zip(seconds, usd, strict=True)])

    def best(self, goal: Goal) -> tuple[float, float]:
        """Seconds and USD of the exhaustive best for the goal; of what comes nearest when none keeps it."""
        seconds, usd = self.totals()
        late = seconds / goal.deadline_s if goal.deadline_s is not None else np.zeros_like(seconds)
        dear = usd / goal.budget_usd if goal.budget_usd is not None else np.zeros_like(seconds)
        worst = np.maximum(late, dear)
        aim = usd if goal.deadline_s is not None else seconds
        at = int(np.where(worst <= 1, aim, np.inf).argmin()) if (worst <= 1).any() else int(worst.argmin())
        return float(seconds[at]), float(usd[at])


def draw_job(rng: np.random.Generator, *, drift: bool, least_s: float) -> Job:
    """A job of `least_s` to three hours more with its fastest choice, and a model that is off."""

    def off(std: float = 0.3) -> float:
        return math.exp(rng.normal(0, std))

    compute_s = math.exp(rng.uniform(math.log(2), math.log(60)))
    steps_per_epoch = int(rng.integers(50, 400))
    model = Analytic(
        compute_s=compute_s,
        fixed_s=compute_s * math.exp(rng.uniform(math.log(1e-4), math.log(1e-2))),
        model_s=compute_s * math.exp(rng.uniform(math.log(1e-3), math.log(3e-2))),
        hop_s=compute_s * math.exp(rng.uniform(math.log(1e-5), math.log(1e-3))),
        memory=0.85,
        start_s=float(rng.uniform(3, 12)),
        epoch_end_s=0.0,
        steps_per_epoch=steps_per_epoch,
    )
    model = Analytic(**{**vars(model), "epoch_end_s": float(rng.uniform(2, 15)) * model.plain_s(Choice(16, 1769))})
    truth = Analytic(
        compute_s=model.compute_s * off(),
        fixed_s=model.fixed_s * off(),
        model_s=model.model_s * off(),
        hop_s=model.hop_s * off(),
        memory=float(np.clip(model.memory + rng.normal(0, 0.08), 0.5, 1.0)),
        start_s=model.start_s * off(),
        epoch_end_s=model.epoch_end_s * off(),
        steps_per_epoch=steps_per_epoch,
        ripple=(0.08, float(rng.uniform(0.5, 2)), float(rng.uniform(0.5, 2)), float(rng.uniform(0, 2 * math.pi))),
    )
    space = Space(WORKERS, MEMORY_MB)
    fastest = min(truth.step_s(choice, BATCH) for choice in space)
    seconds = math.exp(rng.uniform(math.log(least_s), math.log(least_s + 3 * 3600)))
    factor = float(rng.uniform(0.8, 1.2)) if drift else 1.0
    return Job(space, model, truth, max(200, int(seconds / fastest)), factor, float(rng.uniform(0.2, 0.8)))


class World:
    """A job's course: time, money, one failure."""

    def __init__(self, job: Job, rng: np.random.Generator) -> None:
        self.job, self.rng = job, rng
        self.choice: Choice | None = None
        self.elapsed_s = self.spent_usd = 0.0
        self.done = 0
        self._fails_at = int(rng.integers(1, job.steps))  # the step in which a worker is lost
        self._slow = 0.0  # AR(1) over rounds, log
        self._ends = EpochEnds(lambda batch: float(job.truth.steps_per_epoch), job.model.share_s)

    def standing(self) -> Standing:
        left = self.job.steps - self.done
        return Standing(self.elapsed_s, self.spent_usd, (Phase(left, BATCH),) if left else ())

    def switch(self, choice: Choice) -> None:
        """Change over, or start."""
        rate = max(self.job.truth.usd_per_s(one) for one in (self.choice or choice, choice))
        self._pass(self.job.truth.switch_s(self.choice, choice) * math.exp(self.rng.normal(0, STEP_NOISE)), rate)
        self.choice = choice

    def round(self, is_over: Callable[[int, float, Standing], bool]) -> tuple[Observation | None, int, float]:
        """Train until it is over: what was observed, how many workers were lost, and the time that took."""
        job, choice, truth = self.job, self.choice, self.job.truth
        assert choice is not None
        self._slow = 0.7 * self._slow + self.rng.normal(0, 0.02 * math.sqrt(1 - 0.7**2)) if job.drift != 1.0 else 0.0
        rate, plain_s = truth.usd_per_s(choice), truth.plain_s(choice) * math.exp(self._slow)
        began, steps, failures, lost_s = self.elapsed_s, list[float](), 0, 0.0
        while self.done < job.steps:
            # a look every second, as it is in a run, or behind every step when they are longer
            count = min(max(1, int(1.0 / plain_s)), job.steps - self.done)
            for one in np.exp(self.rng.normal(-(STEP_NOISE**2) / 2, STEP_NOISE, count)):
                self.done += 1
                seconds = plain_s * float(one) * (job.drift if self.done > job.drift_at * job.steps else 1.0)
                self._pass(seconds, rate)
                steps.append(seconds)
                if self.done % truth.steps_per_epoch == 0:
                    end_s = truth.end_s(choice) * math.exp(self.rng.normal(0, STEP_NOISE))
                    self._pass(end_s, rate)
                    self._ends.saw(choice, BATCH, [end_s])
                if self.done == self._fails_at:  # that step is done again when another worker is there
                    recovery_s = NOTICED_S + truth.switch_s(None, choice) + seconds
                    self._pass(recovery_s, rate)
                    failures, lost_s = failures + 1, lost_s + recovery_s
                    steps.pop()
            if is_over(len(steps), self.elapsed_s - began, self.standing()):
                break
        return self._observation(steps, choice), failures, lost_s

    def _observation(self, steps: list[float], choice: Choice) -> Observation | None:
        """As `observe_round` makes it of rows; those of 100 workers would take longer to make than all else here."""
        if len(steps) < 2:
            return None
        step_s = float(np.mean(steps)) + self._ends.share_s(choice, BATCH)
        return Observation(choice, step_s, len(steps), BATCH, relative_error(steps), at_step=self.done)

    def _pass(self, seconds: float, usd_per_s: float) -> None:
        self.elapsed_s += seconds
        self.spent_usd += seconds * usd_per_s
