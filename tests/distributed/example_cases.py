"""What a worker does in the tests of the examples: runs their functions, with the default group formed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ddp(path: str) -> dict[str, Any]:
    """What examples/ddp.py leaves in its checkpoint."""
    example = load("ddp")
    with contextlib.redirect_stdout(io.StringIO()):
        example.run(example.parse(["--epochs", "2", "--save-every", "2", "--save", path]))
        first_loss, first_model = example.demo_basic(dist.get_rank())
    return {"first": [first_loss, first_model], "trained": torch.load(path) if dist.get_rank() == 0 else {}}


def lightning(*options: str, as_nodes: bool = False) -> dict[str, Any]:
    """The model that examples/lightning_digits.py trains. `as_nodes`: each worker is a machine of its own, as a function is."""
    example = load("lightning_digits")
    settings = {"MASTER_ADDR": "", "MASTER_PORT": "1"}
    if as_nodes:
        settings |= {"LOCAL_RANK": "0", "NODE_RANK": str(dist.get_rank())}
        unpatched = example.lightning.Trainer

        def trainer(**arguments: Any) -> Any:
            return unpatched(**{**arguments, "devices": 1, "num_nodes": dist.get_world_size()})

        example.lightning = mock.Mock(wraps=example.lightning, Trainer=trainer)
    with mock.patch.dict(os.environ, settings), contextlib.redirect_stdout(io.StringIO()):
        model = example.fit(example.parse(["--backend", dist.get_backend(), "--epochs", "2", *options]))
    return dict(model.state_dict())


def lightning_nodes() -> dict[str, Any]:
    return lightning("--fp16", as_nodes=True)


def accelerate(*options: str) -> dict[str, Any]:
    """The model and the accuracy that examples/accelerate_digits.py comes to."""
    from accelerate.state import AcceleratorState

    example = load("accelerate_digits")
    AcceleratorState._reset_state(reset_partial_state=True)
    # Accelerate wants the address of a host to meet at, though all have met.
    with mock.patch.dict(os.environ, {"MASTER_ADDR": "unused"}), contextlib.redirect_stdout(io.StringIO()):
        model, accuracy = example.train(example.parse(["--epochs", "2", *options]))
    return {"model": dict(model.state_dict()), "accuracy": accuracy}


def accelerate_with_backend_named() -> list[str]:
    """What Accelerate says when its own settings name the backend."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="smlt")])
    except ValueError as error:
        return [str(error)]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return []


def transformers_trainer(folder: str) -> torch.Tensor:
    """The weights that Transformers' Trainer comes to, which forms its group by way of Accelerate."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.layer(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    data = [{"x": torch.randn(4), "labels": index % 2} for index in range(64)]
    with mock.patch.dict(os.environ, {"MASTER_ADDR": "unused"}), contextlib.redirect_stdout(io.StringIO()):
        settings = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=6,
            per_device_train_batch_size=4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(Classifier(), settings, train_dataset=data)
        trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return trainer.model.layer.weight
