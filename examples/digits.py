"""Handwritten digits (scikit-learn's 1,797 images of 8x8 pixels) with PyTorch.

smlt train examples/digits.py --workers 4 --epochs 25
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import smlt


class Digits(smlt.Task):
    def data(self):
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        held_out = torch.arange(len(x)) % 5 == 0
        return {"train": (x[~held_out], y[~held_out]), "test": (x[held_out], y[held_out])}

    def model(self):
        return nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 10))

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)

    def evaluate(self, model, batch):
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean().item()}


if __name__ == "__main__":
    Digits.main()
