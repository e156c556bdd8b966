"""A task of middling weight for benchmarks: three convolutions on random images of 16x16 pixels, 0.3 M parameters.

smlt train bench/convolutions_task.py --workers 2 --epochs 2 --global-batch-size 128
"""

import torch
from torch import nn
from torch.nn import functional

import smlt


class Images(smlt.Task):
    def data(self):
        torch.manual_seed(0)
        return {name: (torch.randn(n, 3, 16, 16), torch.randint(10, (n,))) for name, n in (("train", 8192), ("test", 512))}

    def model(self):
        layers = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, model):
        return torch.optim.Adam(model.parameters(), lr=1e-3)

    def evaluate(self, model, batch):
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean().item()}
