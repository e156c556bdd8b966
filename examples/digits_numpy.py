"""The same digits with plain NumPy: softmax regression on one hidden layer, gradients by hand.

smlt train examples/digits_numpy.py --workers 4 --epochs 25
"""

import numpy as np
from sklearn.datasets import load_digits

import smlt
from smlt.worker.frameworks.numpy import SGD


class DigitsNumpy(smlt.Task):
    def data(self):
        images, labels = load_digits(return_X_y=True)
        x, held_out = (images / 16).astype(np.float32), np.arange(len(images)) % 5 == 0
        return {"train": (x[~held_out], labels[~held_out]), "test": (x[held_out], labels[held_out])}

    def model(self):
        rng = np.random.default_rng(0)
        w1, w2 = rng.normal(0, 0.15, (64, 128)), rng.normal(0, 0.1, (128, 10))
        return {"w1": w1.astype("f4"), "b1": np.zeros(128, "f4"), "w2": w2.astype("f4"), "b2": np.zeros(10, "f4")}

    def forward(self, model, x):
        hidden = np.tanh(x @ model["w1"] + model["b1"])
        scores = hidden @ model["w2"] + model["b2"]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return hidden, scores / scores.sum(axis=1, keepdims=True)

    def loss(self, model, batch):
        x, y = batch
        hidden, p = self.forward(model, x)
        rows = np.arange(len(y))
        loss = -np.log(p[rows, y]).mean()
        p[rows, y] -= 1
        d_scores = p / len(y)
        d_hidden = d_scores @ model["w2"].T * (1 - hidden**2)
        gradients = {"w1": x.T @ d_hidden, "b1": d_hidden.sum(0), "w2": hidden.T @ d_scores, "b2": d_scores.sum(0)}
        return loss, gradients

    def optimizer(self, model):
        return SGD(model, lr=0.1, momentum=0.9)

    def evaluate(self, model, batch):
        return {"accuracy": (self.forward(model, batch[0])[1].argmax(axis=1) == batch[1]).mean()}


if __name__ == "__main__":
    DigitsNumpy.main()
