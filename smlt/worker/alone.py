"""Training in this process: one worker and no store, for debugging a task."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from smlt.collective.communicator import Communicator
from smlt.worker.config import WorkerConfig
from smlt.worker.early_stop import STOP_MODES
from smlt.worker.schedule import LR_RULES, BatchSchedule
from smlt.worker.task import Task
from smlt.worker.trainer import Trainer


def option_parser(task: str) -> argparse.ArgumentParser:
    """The options of `Task.main`, by the names of `train_alone`'s arguments; and `data`."""
    parser = argparse.ArgumentParser(description=f"Train {task} in this process, with one worker and no store.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training set (10)")
    parser.add_argument("--global-batch-size", type=int, help="samples a step (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the model and the sample order (0)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="files for the task (its data_dir)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter: a class attribute of the task"
    )
    parser.add_argument("--batch-schedule", metavar="EPOCH:SAMPLES,...", help="samples a step from which epoch on")
    parser.add_argument("--lr-rule", choices=tuple(LR_RULES), default="none", help="how the learning rate follows (none)")
    parser.add_argument("--target-accuracy", type=float, help='end when evaluate() gives this "accuracy"')
    parser.add_argument("--patience", type=int, metavar="K", help="end when K epochs have brought no better metric")
    parser.add_argument("--stop-metric", default="accuracy", metavar="NAME", help="which metric (accuracy)")
    parser.add_argument("--stop-mode", choices=STOP_MODES, default="max", help="whether more of it is better, or less (max)")
    return parser


def train_alone(task: Task, epochs: int, global_batch_size: int | None, seed: int, **more: Any) -> Trainer:
    """Train in this process with one worker and no store; a line an epoch on stdout.

    `global_batch_size` is 64, or what a batch schedule begins with, when None. `more`: fields of WorkerConfig.
    """
    losses: list[float] = []
    text = more.get("batch_schedule")
    if global_batch_size is None:
        global_batch_size = 64 if text is None else BatchSchedule.parse(text, 64).at(0)
    in_force = global_batch_size

    def report(row: dict[str, Any]) -> str:
        nonlocal in_force
        if "loss" in row:
            if row["global_batch_size"] != in_force:
                in_force = row["global_batch_size"]
                print(f"epoch {row['epoch'] + 1}/{epochs}: global batch {in_force}, learning rate x {row['lr_factor']:g}")
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
        **more,
    )
    trainer = Trainer(config, task, None, report)
    with Communicator() as comm:
        trainer.attach(comm)
        trainer.begin(resume=False)
        trainer.run()
    return trainer
