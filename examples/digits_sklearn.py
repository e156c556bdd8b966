"""The same digits with scikit-learn's multi-layer perceptron: each worker's partial_fit, then the mean of where it led.

smlt train examples/digits_sklearn.py --workers 4 --epochs 25 --codec fp32
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier

import smlt


class DigitsSklearn(smlt.Task):
    def data(self):
        images, labels = load_digits(return_X_y=True)
        x, held_out = (images / 16).astype(np.float32), np.arange(len(images)) % 5 == 0
        return {"train": (x[~held_out], labels[~held_out]), "test": (x[held_out], labels[held_out])}

    def model(self):
        model = MLPClassifier(hidden_layer_sizes=128, solver="sgd", learning_rate_init=0.1, momentum=0.9, alpha=0)
        return model.partial_fit(np.zeros((1, 64), np.float32), [0], classes=np.arange(10))  # makes the parameters

    def loss(self, model, batch):
        loss = log_loss(batch[1], model.predict_proba(batch[0]), labels=model.classes_)
        model.partial_fit(*batch)
        return loss

    def optimizer(self, model):
        return None  # partial_fit takes the steps

    def evaluate(self, model, batch):
        return {"accuracy": model.score(*batch)}


if __name__ == "__main__":
    DigitsSklearn.main()
