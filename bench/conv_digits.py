"""A small convolutional network on handwritten digits: much computing for few parameters, so that more workers pay."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import smlt


class ConvDigits(smlt.Task):
    """0.37 M parameters, some 0.14 GFLOP a sample, forward and backward."""

    def data(self):
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
        held_out = torch.arange(len(x)) % 5 == 0
        return {"train": (x[~held_out], y[~held_out]), "test": (x[held_out], y[held_out])}

    def model(self):
        layers, inputs = [], 1
        for outputs in (64, 128, 128, 128):  # normalized, so that the loss falls at once and rounding does not grow
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.GELU()]
            inputs = outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def evaluate(self, model, batch):
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean().item()}
