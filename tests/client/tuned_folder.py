"""A run folder as a run that tunes itself leaves it: real optimizer and cost model, simulated steps."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from smlt.client.cost import CostModel
from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.optimizer import PerformanceOptimizer
from smlt.client.optimizer.space import Choice, Space
from smlt.client.platforms import Platform
from smlt.client.records import json_line
from smlt.client.workload import Workload

WORKLOAD = Workload(
    "resnet.py",
    samples=50_000,
    epochs=10,
    global_batch_size=512,
    compute=((1, 0.02), (8, 0.12), (64, 0.9), (512, 7.0)),
    gradients=(("float32", 11_000_000),),
    optimizer_s=0.01,
    tail_fraction=0.6,
    evaluate=((1, 0.01), (256, 1.2)),
    test_samples=10_000,
    model_bytes=44_000_000,
    checkpoint_bytes=88_000_000,
    checkpoint_s=0.1,
    import_s=2.0,
    load_s=0.5,
    base_mb=600,
    sample_mb=3,
)
BEGAN = 1_800_000_000.0


def model_of(on: str) -> tuple[CostModel, Space]:
    """The cost model and the choices of a run on "lambda" or "local"."""
    if on == "lambda":
        model = CostModel(WORKLOAD, Platform.on_lambda())
        return model, model.space(64)
    model = CostModel(
        replace(WORKLOAD, compute=((1, 0.01), (64, 0.45), (512, 3.5)), gradients=(("float32", 1_000_000),)), Platform.local(8)
    )
    return model, model.space(16)


class Rounds:
    """Simulates round after round and writes what the run would."""

    def __init__(self, folder: Path, on: str, goal: Goal, seed: int = 1) -> None:
        self.folder, self.on, self.goal = folder, on, goal
        self.model, self.space = model_of(on)
        self.rng = np.random.default_rng(seed)
        self.optimizer = PerformanceOptimizer(self.space, self.model, goal)
        self.step, self.elapsed_s, self.spent_usd = 0, 20.0, 0.0
        self.choice = self.optimizer.suggest(None, self.standing, round_s=60).choice
        folder.mkdir(parents=True)
        (folder / "logs").mkdir()
        self.config = {"script": "resnet.py", "workers": self.choice.workers, "epochs": 10, "global_batch_size": 512}
        self.config |= {"on": on, "function": "resnet", "memory_mb": None, "seed": 0, "codec": "fp16"}
        self.status: dict[str, Any] = {"state": "running", "started": BEGAN, "epoch": 0, "step": 0}

    @property
    def standing(self) -> Standing:
        left = WORKLOAD.epochs * WORKLOAD.steps_of(512) - self.step
        return Standing(self.elapsed_s, self.spent_usd, (Phase(left, 512),) if left > 0 else ())

    def truth_s(self, choice: Choice) -> float:
        """What a step really takes: the model is wrong by a factor that grows with the workers."""
        return self.model.step_s(choice, 512) * (1.1 + 0.006 * choice.workers)

    def run(self, round_steps: int = 60) -> None:
        """To the end."""
        while self.standing.left:
            self._round(min(round_steps, self.standing.left[0].steps))
        self.status |= {"state": "done", "ended": BEGAN + self.elapsed_s + 5, "spent_usd": self.spent_usd}

    def _round(self, steps: int) -> None:
        seconds = self.truth_s(self.choice) * self.rng.lognormal(0, 0.1, steps)
        for one in seconds:
            self.step += 1
            self.elapsed_s += float(one)
            self._write("metrics.jsonl", self._row(float(one)))
            if self.step % WORKLOAD.steps_of(512) == 0:
                epoch = self.step // WORKLOAD.steps_of(512) - 1
                metrics = {"accuracy": 1 - 0.9 * 0.8**epoch}
                self._write("metrics.jsonl", {"kind": "epoch", "epoch": epoch, "step": self.step, "metrics": metrics})
        self.spent_usd += float(seconds.sum()) * self.model.usd_per_s(self.choice)
        noise = max(0.005, 0.1 / steps**0.5)
        time = BEGAN + self.elapsed_s
        seen = Observation(self.choice, float(seconds.mean()), steps, 512, noise, at_step=self.step, time=time)
        self._write("observations.jsonl", asdict(seen))
        self.optimizer.observe(seen)
        if self.standing.left:
            self._decide(float(seconds.sum()))

    def _decide(self, round_s: float) -> None:
        found = self.optimizer.suggest(self.choice, self.standing, round_s=round_s)
        believed = self.optimizer.belief(found.choice, 512)
        left = self.standing.left[0].steps
        usd_per_s = self.model.usd_per_s(found.choice)
        forecast: dict[str, float] = {"odds": 0.97}
        for end, q in (("_low", 0.05), ("", 0.5), ("_high", 0.95)):
            seconds = left * believed.quantile_s(q)
            forecast |= {f"seconds{end}": self.elapsed_s + seconds, f"usd{end}": self.spent_usd + seconds * usd_per_s}
        row = {
            "time": BEGAN + self.elapsed_s,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "spent_usd": self.spent_usd,
            "choice": asdict(self.choice),
            "chosen": asdict(found.choice),
            "action": "keep" if found.choice == self.choice else "switch",
            "kind": found.kind,
            "reason": found.reason,
            "forecast": forecast,
            "goal": {"deadline_s": self.goal.deadline_s, "budget_usd": self.goal.budget_usd},
        }
        self._write("decisions.jsonl", row)
        if found.choice != self.choice:
            stand_s = self.model.switch_s(self.choice, found.choice)
            change = {"kind": "membership", "generation": 2, "world_size": found.choice.workers, "step": self.step}
            change |= {"reasons": [f"{found.choice} instead of {self.choice}"], "lost_ranks": [], "recovery_s": stand_s}
            self._write("metrics.jsonl", {**change, "noticed": BEGAN + self.elapsed_s})
            self.elapsed_s += stand_s
            self.choice = found.choice

    def _row(self, seconds: float) -> dict[str, Any]:
        n = self.choice.workers
        each = {"compute_s": [0.6 * seconds] * n, "communication_s": [0.35 * seconds] * n}
        each |= {"communication_total_s": [0.6 * seconds] * n, "data_s": [0.001] * n, "rss_mb": [900.0 + i for i in range(n)]}
        loss = 2.3 / (1 + self.step / 100)
        common = {"kind": "step", "step": self.step, "epoch": 0, "loss": loss, "samples": 512, "samples_per_s": 512 / seconds}
        return {**common, "ranks": list(range(n)), **each, "time": BEGAN + self.elapsed_s}

    def _write(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json_line(row) + "\n")

    def save(self) -> None:
        """What is written at the beginning, and the status as it stands."""
        known = {**json.loads(self.model.to_json()), "space": asdict(self.space)}
        for name, value in (("workload.json", known), ("config.json", self.config), ("status.json", self.status)):
            (self.folder / name).write_text(json.dumps(value))
