"""The drop-in in a Keras script of one's own: a wrapped optimizer, a callback, a part of the data.

smlt launch -n 2 examples/keras_fit.py
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

import smlt
import smlt.tensorflow

smlt.init()
images, labels = load_digits(return_X_y=True)
x, held_out = (images / 16).astype(np.float32), np.arange(len(images)) % 5 == 0

model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128, "relu"), keras.layers.Dense(10, "softmax")])
optimizer = smlt.tensorflow.DistributedOptimizer(keras.optimizers.Adam(2e-3))
model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
history = model.fit(
    *smlt.tensorflow.shard((x[~held_out], labels[~held_out])),
    batch_size=64 // smlt.world_size(),
    epochs=8,
    shuffle=True,
    verbose=0,
    callbacks=[smlt.tensorflow.DistributedCallback()],
)
accuracy = np.mean(model.predict(x[held_out], verbose=0).argmax(axis=1) == labels[held_out])
print(f"rank {smlt.rank()} of {smlt.world_size()}: loss {history.history['loss'][-1]:.6f}, accuracy {accuracy:.4f}")
