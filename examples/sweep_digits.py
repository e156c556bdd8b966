"""Handwritten digits with hyper-parameters to look for: class attributes, which `smlt sweep` and `smlt train --set` set.

smlt sweep examples/sweep_digits.py --random lr=log:1e-3..3 --random width=logint:16..256 --trials 9 --halving 3 --epochs 9
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import smlt


class SweepDigits(smlt.Task):
    lr = 0.2
    width = 512
    activation = "gelu"

    def data(self):
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        held_out = torch.arange(len(x)) % 5 == 0
        return {"train": (x[~held_out], y[~held_out]), "test": (x[held_out], y[held_out])}

    def model(self):
        activation = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}[self.activation]
        return nn.Sequential(nn.Linear(64, self.width), activation(), nn.Linear(self.width, 10))

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)

    def evaluate(self, model, batch):
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean().item()}


if __name__ == "__main__":
    SweepDigits.main()
