"""The same digits with JAX. The optimizer may be one of Optax's as well: return optax.adam(1e-3).

smlt train examples/digits_jax.py --workers 4 --epochs 25
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import smlt
from smlt.worker.frameworks.jax import SGD


class DigitsJax(smlt.Task):
    def data(self):
        images, labels = load_digits(return_X_y=True)
        x, held_out = (images / 16).astype(np.float32), np.arange(len(images)) % 5 == 0
        return {"train": (x[~held_out], labels[~held_out]), "test": (x[held_out], labels[held_out])}

    def model(self):
        one, two = jax.random.split(jax.random.key(0))
        w1, w2 = jax.random.normal(one, (64, 512)) / 8, jax.random.normal(two, (512, 10)) / 23
        return {"w1": w1, "b1": jnp.zeros(512), "w2": w2, "b2": jnp.zeros(10)}

    def logits(self, model, x):
        return jax.nn.gelu(x @ model["w1"] + model["b1"]) @ model["w2"] + model["b2"]

    def loss(self, model, batch):  # compiled with jax.jit
        log_p = jax.nn.log_softmax(self.logits(model, batch[0]))
        return -jnp.take_along_axis(log_p, batch[1][:, None], axis=1).mean()

    def optimizer(self, model):
        return SGD(lr=0.2, momentum=0.9)

    def evaluate(self, model, batch):
        return {"accuracy": float((self.logits(model, batch[0]).argmax(axis=1) == batch[1]).mean())}


if __name__ == "__main__":
    DigitsJax.main()
