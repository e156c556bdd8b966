"""The same digits with TensorFlow and Keras 3.

smlt train examples/digits_tensorflow.py --workers 4 --epochs 25
"""

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import smlt


class DigitsTensorflow(smlt.Task):
    def data(self):
        images, labels = load_digits(return_X_y=True)
        x, held_out = (images / 16).astype(np.float32), np.arange(len(images)) % 5 == 0
        return {"train": (x[~held_out], labels[~held_out]), "test": (x[held_out], labels[held_out])}

    def model(self):
        layers = [keras.layers.Dense(512, "gelu"), keras.layers.Dropout(0.1), keras.layers.Dense(10)]
        return keras.Sequential([keras.Input((64,)), *layers])

    def loss(self, model, batch):  # compiled with tf.function
        logits = model(batch[0], training=True)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits))

    def optimizer(self, model):
        return keras.optimizers.SGD(0.2, momentum=0.9)

    def evaluate(self, model, batch):
        return {"accuracy": np.mean(np.argmax(model(batch[0]), axis=1) == batch[1])}


if __name__ == "__main__":
    DigitsTensorflow.main()
