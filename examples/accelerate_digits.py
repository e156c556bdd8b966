"""Handwritten digits with Hugging Face Accelerate, with SMLT's backend.

SMLT_STORE=redis://localhost:6379 torchrun --nproc-per-node 2 examples/accelerate_digits.py

Accelerate knows only gloo, MPI and their like for CPUs, and takes a process group that is there already: form it first.
"""

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import smlt.torch


def loaders(batch_size):
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    held_out = torch.arange(len(x)) % 5 == 0
    train, test = TensorDataset(x[~held_out], y[~held_out]), TensorDataset(x[held_out], y[held_out])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def train(options):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, *loaders(options.batch_size))
    if options.fp16:
        model.register_comm_hook(None, smlt.torch.fp16_hook)
    for _ in range(options.epochs):
        for x, y in train_loader:
            optimizer.zero_grad()
            accelerator.backward(functional.cross_entropy(model(x), y))
            optimizer.step()
    right = []
    with torch.no_grad():
        for x, y in test_loader:
            right.append(accelerator.gather_for_metrics(model(x).argmax(1) == y))
    accuracy = torch.cat(right).float().mean().item()
    accelerator.print(f"{accelerator.num_processes} workers, {dist.get_backend()}: accuracy {accuracy:.4f}")
    return accelerator.unwrap_model(model), accuracy


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="smlt")
    parser.add_argument("--init-method", help="e.g. redis://host:6379: the workers meet in the store, and none listens")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="samples a worker and step")
    parser.add_argument("--fp16", action="store_true", help="send gradients in half the bits")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    dist.init_process_group(options.backend, init_method=options.init_method)
    train(options)
    dist.destroy_process_group()
