"""The models of examples/ as benchmarks train them: the example's own task, small batches, plain SGD.

Plain SGD, for four workers with BERT-base are to fit on one machine: AdamW holds two more buffers of the model's size.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smlt.worker.buckets import BUCKET_MB
from smlt.worker.data import take

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Workload:
    """A script below examples/, what its task is told, samples a worker and step, and how large the model is."""

    script: str
    attributes: dict[str, Any]
    batch: int
    million_parameters: float

    @property
    def model_bytes(self) -> int:
        return int(self.million_parameters * 4e6)


#: ResNet on digits of 32x32 pixels (10 classes), BERT on samples of 64 tokens.
WORKLOADS = {
    "resnet18": Workload("resnet.py", {"depth": 18}, 8, 11.2),
    "resnet50": Workload("resnet.py", {"depth": 50}, 4, 23.5),
    "bert-small": Workload("bert.py", {"size": "small", "tokens": 64}, 2, 67.0),
    "bert-medium": Workload("bert.py", {"size": "medium", "tokens": 64}, 2, 109.5),
    "bert-large": Workload("bert.py", {"size": "large", "tokens": 64}, 1, 335.2),
}

#: A step on this worker's batch; whether its gradients are averaged with the others'.
Step = Callable[[bool], None]


class Replica:
    """One worker's model and batch. `step_of_smlt` or `step_of_gloo`, once, gives the function that makes a step.

    `own_optimizer`: the example's own, not plain SGD.
    """

    def __init__(self, workload: Workload, rank: int, batch: int, *, own_optimizer: bool = False) -> None:
        import torch

        from smlt.worker.task import load_task

        torch.manual_seed(0)
        self.task: Any = load_task(EXAMPLES / workload.script)
        for name, value in workload.attributes.items():
            setattr(self.task, name, value)
        if not own_optimizer:
            self.task.optimizer = lambda model: torch.optim.SGD(model.parameters(), lr=1e-3)
        with redirect_stdout(io.StringIO()):  # it tells what the data is
            train = self.task.data()["train"]
        self.model = self.task.model()
        self.batch = self._tensors(take(train, np.arange(rank * batch, (rank + 1) * batch)))

    def _tensors(self, value: Any) -> Any:
        import torch

        return tuple(map(self._tensors, value)) if isinstance(value, tuple) else torch.from_numpy(value)

    def step_of_smlt(self, comm: Any) -> Step:
        """As smlt.worker.trainer makes it: buckets leave while backward goes on."""
        from smlt.worker.frameworks.torch import TorchAdapter

        adapter = TorchAdapter(self.task, self.model, int(BUCKET_MB * 2**20))

        def step(communicate: bool) -> None:
            works: list[Any] = []
            if communicate:
                adapter.compute(self.batch, 1.0, lambda bucket: works.append(comm.allreduce_async(bucket, out=bucket)))
                comm.allreduce(adapter.gradient, out=adapter.gradient)
                for work in works:
                    work.wait()
            else:
                adapter.compute(self.batch, 1.0, lambda bucket: None)
            adapter.apply()

        return step

    def step_of_gloo(self) -> Step:
        """DistributedDataParallel as it is by default, over the process group that is open."""
        from torch.nn.parallel import DistributedDataParallel

        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of 1x1 convolutions
        parallel = DistributedDataParallel(self.model)
        optimizer = self.task.optimizer(parallel)

        def step(communicate: bool) -> None:
            optimizer.zero_grad()
            with nullcontext() if communicate else parallel.no_sync():
                self.task.loss(parallel, self.batch).backward()
            optimizer.step()

        return step
