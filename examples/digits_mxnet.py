"""The same digits with MXNet 1.9 and Gluon (needs NumPy before 1.24).

smlt train examples/digits_mxnet.py --workers 4 --epochs 25
"""

import numpy as np
from mxnet import gluon, init
from sklearn.datasets import load_digits

import smlt


class DigitsMxnet(smlt.Task):
    def data(self):
        images, labels = load_digits(return_X_y=True)
        x, held_out = (images / 16).astype(np.float32), np.arange(len(images)) % 5 == 0
        return {"train": (x[~held_out], labels[~held_out]), "test": (x[held_out], labels[held_out])}

    def model(self):
        net = gluon.nn.HybridSequential()
        net.add(gluon.nn.Dense(512, "relu", in_units=64), gluon.nn.Dropout(0.1), gluon.nn.Dense(10, in_units=512))
        net.initialize(init.Xavier())
        net.hybridize()
        return net

    def loss(self, model, batch):  # recorded by autograd
        return gluon.loss.SoftmaxCrossEntropyLoss()(model(batch[0]), batch[1]).mean()

    def optimizer(self, model):
        return gluon.Trainer(model.collect_params(), "sgd", {"learning_rate": 0.2, "momentum": 0.9}, kvstore=None)

    def evaluate(self, model, batch):
        return {"accuracy": (model(batch[0]).argmax(axis=1).asnumpy() == batch[1].asnumpy()).mean()}


if __name__ == "__main__":
    DigitsMxnet.main()
