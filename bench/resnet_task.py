"""A heavy task for benchmarks: ResNet-18 on random images of 32x32 pixels.

smlt train bench/resnet_task.py --workers 2 --epochs 1 --global-batch-size 32
"""

import torch
from models import resnet18  # beside this script, so it travels with it
from torch.nn import functional

import smlt


class Images(smlt.Task):
    def data(self):
        torch.manual_seed(0)
        return {name: (torch.randn(n, 3, 32, 32), torch.randint(10, (n,))) for name, n in (("train", 512), ("test", 64))}

    def model(self):
        return resnet18()

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def evaluate(self, model, batch):
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean().item()}
