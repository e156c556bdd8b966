"""Training in this process: one worker and no store, for debugging a task."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from smlt.collective.communicator import Communicator
from smlt.worker.config import WorkerConfig
from smlt.worker.task import Task
from smlt.worker.trainer import Trainer


def train_alone(task: Task, epochs: int, global_batch_size: int, seed: int) -> Trainer:
    """Train in this process with one worker and no store; a line an epoch on stdout."""
    losses: list[float] = []

    def report(row: dict[str, Any]) -> str:
        if "loss" in row:
            losses.append(row["loss"])
        if row.get("kind") == "epoch":
            metrics = "".join(f", {name} {value:.4f}" for name, value in row["metrics"].items())
            print(f"epoch {row['epoch'] + 1}/{epochs}: loss {np.mean(losses):.4f}{metrics}", flush=True)
            losses.clear()
        return ""

    config = WorkerConfig(
        run="alone",
        job="alone",
        rank=0,
        world_size=1,
        object_store_url="",
        script=sys.argv[0],
        epochs=epochs,
        global_batch_size=global_batch_size,
        seed=seed,
        bucket_mb=0,  # alone there is nothing to hide
    )
    trainer = Trainer(config, task, None, report)
    with Communicator() as comm:
        trainer.attach(comm)
        trainer.begin(resume=False)
        trainer.run()
    return trainer
