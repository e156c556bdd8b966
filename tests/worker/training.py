"""Small tasks, and their training by one worker in this process."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np

from smlt import Communicator, Task
from smlt.store.object import DirectoryObjectStore
from smlt.worker.config import WorkerConfig
from smlt.worker.frameworks.numpy import SGD
from smlt.worker.trainer import Trainer


class Line(Task):
    """Least squares in NumPy: 53 samples, so that parts and the last batch are uneven."""

    def data(self) -> dict[str, Any]:
        rng = np.random.default_rng(1)
        x = rng.standard_normal((53, 4)).astype(np.float32)
        y = (x @ np.array([1, -2, 3, 0.5], np.float32) + 0.1 * rng.standard_normal(53)).astype(np.float32)
        return {"train": (x, y), "test": (x[:5], y[:5])}

    def model(self) -> Any:
        return {"w": np.zeros(4, np.float32), "b": np.zeros((), np.float32)}

    def loss(self, model: Any, batch: Any) -> Any:
        x, y = batch
        error = x @ model["w"] + model["b"] - y
        return (error**2).mean(), {"w": 2 * x.T @ error / len(y), "b": 2 * error.mean()}

    def optimizer(self, model: Any) -> Any:
        return SGD(model, lr=0.02, momentum=0.5)

    def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
        return {"mse": float(self.loss(model, batch)[0])}


class Noisy(Line):
    """Draws from all generators that a NumPy task may draw from."""

    def loss(self, model: Any, batch: Any) -> Any:
        x, y = batch
        return super().loss(model, (x + 0.1 * random.random() * np.random.standard_normal(x.shape).astype(np.float32), y))


class Sequential(Line):
    """The same in PyTorch, with dropout and Adam."""

    def model(self) -> Any:
        from torch import nn

        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1), nn.Flatten(0))

    def loss(self, model: Any, batch: Any) -> Any:
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
        return {"mse": self.loss(model, batch).item()}

    def optimizer(self, model: Any) -> Any:
        import torch

        return torch.optim.Adam(model.parameters(), lr=0.01)


def configure(**values: Any) -> WorkerConfig:
    defaults: dict[str, Any] = {
        "run": "run",
        "job": "job",
        "rank": 0,
        "world_size": 1,
        "object_store_url": "",
        "script": "",
        "epochs": 3,
        "global_batch_size": 10,
        "codec": "fp32",
    }
    return WorkerConfig(**{**defaults, **values})


def train(
    comm: Communicator,
    config: WorkerConfig,
    objects: DirectoryObjectStore | None,
    task: Task | None = None,
    *,
    stop_at: int = 0,
    resume: bool = False,
) -> tuple[Trainer, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> str:
        rows.append(row)
        return "stop" if "loss" in row and row["step"] == stop_at and comm.rank == 0 else ""

    config = replace(config, rank=comm.rank, world_size=comm.world_size)
    trainer = Trainer(config, task or Line(), objects, report)
    trainer.attach(comm)
    trainer.begin(resume)
    trainer.run()
    return trainer, rows


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]
