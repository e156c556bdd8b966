"""Handwritten digits with Lightning: the Trainer's DDP strategy, with SMLT's backend.

SMLT_STORE=redis://localhost:6379 python examples/lightning_digits.py --devices 2

Lightning starts the other processes itself. --backend gloo does the same without a store.
"""

import argparse

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import smlt.torch


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, index):
        loss = functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        accuracy = (self.layers(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, sync_dist=True, prog_bar=True)  # averaged over the workers

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loaders(batch_size):
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    held_out = torch.arange(len(x)) % 5 == 0
    train, test = TensorDataset(x[~held_out], y[~held_out]), TensorDataset(x[held_out], y[held_out])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


class Fp16Gradients(lightning.Callback):
    """Half the bits on the wire. DDPStrategy(ddp_comm_hook=...) is for GPUs: on CPUs Lightning passes over it."""

    def on_train_start(self, trainer, module):
        trainer.strategy.model.register_comm_hook(None, smlt.torch.fp16_hook)


def fit(options):
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        strategy=DDPStrategy(process_group_backend=options.backend),
        accelerator="cpu",
        devices=options.devices,
        max_epochs=options.epochs,
        callbacks=[Fp16Gradients()] if options.fp16 else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Digits()
    trainer.fit(model, *loaders(options.batch_size))
    accuracy = trainer.callback_metrics["accuracy"].item()
    print(f"rank {trainer.global_rank} of {trainer.world_size}: accuracy {accuracy:.4f}", flush=True)
    return model


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="smlt")
    parser.add_argument("--devices", type=int, default=2, help="processes on this machine")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="samples a worker and step")
    parser.add_argument("--fp16", action="store_true", help="send gradients in half the bits")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    fit(parse())
