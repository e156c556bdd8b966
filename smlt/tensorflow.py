"""TensorFlow and Keras 3: gradients averaged in a training step of one's own, by an optimizer's wrapper, or in `fit`.

>>> smlt.init()  # doctest: +SKIP
>>> optimizer = smlt.tensorflow.DistributedOptimizer(keras.optimizers.Adam(1e-3))  # doctest: +SKIP
>>> model.compile(optimizer, "sparse_categorical_crossentropy")  # doctest: +SKIP
>>> model.fit(*smlt.tensorflow.shard((x, y)), callbacks=[smlt.tensorflow.DistributedCallback()])  # doctest: +SKIP

`comm`: the `smlt.Communicator` to use; by default the process's, which `smlt.init` or `smlt launch` has joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smlt.collective.api import current
from smlt.collective.packing import is_aligned, reduce_arrays
from smlt.errors import ConfigError

if TYPE_CHECKING:
    from smlt.collective.two_level import AnyCommunicator

try:
    import keras
    import tensorflow as tf
except ImportError as error:
    raise ConfigError(f"smlt.tensorflow needs TensorFlow with Keras 3 ({error}): pip install 'smlt[tensorflow]'") from error

__all__ = ["DistributedCallback", "DistributedOptimizer", "allreduce", "broadcast", "shard"]


def as_tensor(array: Any) -> Any:
    """A NumPy array as a tensor: the same memory when it is aligned and of a dtype that DLPack has, else a copy."""
    if array.size and array.dtype.kind in "fiu" and array.dtype.isnative and array.flags.writeable and is_aligned(array):
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.constant(array)


def value_of(variable: Any) -> Any:
    """A copy of a variable's value as an array."""
    return np.array(array_of(tf.convert_to_tensor(variable)))


def array_of(tensor: Any) -> Any:
    """An eager tensor as an array: its memory, read-only; a copy of a bfloat16 one, which NumPy has no type of its own for."""
    return tensor.numpy() if tensor.dtype == tf.bfloat16 else np.asarray(tensor)


def allreduce(grads: Any, op: str = "mean", codec: str | None = None, comm: AnyCommunicator | None = None) -> Any:
    """Reduce tensors over all workers, eagerly or inside `tf.function`.

    Parameters
    ----------
    grads
        A tensor, or a list, tuple or dict of tensors, nested as one likes; None stays None. `tf.IndexedSlices`, the
        gradients of embeddings, are made dense.
    op, codec
        As for `smlt.Communicator.allreduce`.

    Returns tensors of the same structure. One tensor is sent from TensorFlow's memory and comes back without a copy; several
    are copied once, to be one collective. In a `tf.function` it is a `tf.numpy_function`: it keeps its place among the
    function's other effects, and cannot be compiled by XLA (jit_compile=True).

    Raises ConfigError for what is not a tensor of numbers, and as `smlt.Communicator.allreduce` does; inside `tf.function`
    TensorFlow raises its own error, whose message holds SMLT's.
    """
    leaves = tf.nest.flatten(grads)
    tensors = [_dense(leaf) for leaf in leaves if leaf is not None]
    reduced = iter(_reduce(tensors, op, codec, comm))
    return tf.nest.pack_sequence_as(grads, [None if leaf is None else next(reduced) for leaf in leaves])


def _dense(leaf: Any) -> Any:
    if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        raise ConfigError(f"cannot reduce a {type(leaf).__name__}: make it dense first")
    try:
        tensor = tf.convert_to_tensor(leaf)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot reduce a {type(leaf).__module__}.{type(leaf).__qualname__}: give tensors") from error
    if tensor.dtype not in _DTYPES:
        raise ConfigError(f"cannot reduce a tensor of {tensor.dtype.name}: floats, integers and booleans only")
    return tensor


_DTYPES = {
    *(tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.bool),
    *(tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64),
}


def _reduce(tensors: list[Any], op: str, codec: str | None, comm: AnyCommunicator | None) -> Sequence[Any]:
    if not tensors:
        return []
    if all(isinstance(tensor, tf.__internal__.EagerTensor) for tensor in tensors):
        arrays = [array_of(tensor) for tensor in tensors]  # the tensors' memory, read-only
        return [as_tensor(array) for array in reduce_arrays(comm or current(), arrays, op, codec)]

    def call(*arrays: Any) -> Any:
        return reduce_arrays(comm or current(), arrays, op, codec)

    results = tf.numpy_function(call, tensors, [tensor.dtype for tensor in tensors], stateful=True)
    for result, tensor in zip(results, tensors, strict=True):
        result.set_shape(tensor.shape)
    return list(results)


def broadcast(variables: Any, root: int = 0, comm: AnyCommunicator | None = None) -> None:
    """Give `variables` (Keras or TensorFlow variables, in a list or nested) the values that they have on rank `root`.

    Eagerly only. The values are copied out of TensorFlow and back. Errors as for `smlt.Communicator.broadcast`.
    """
    found = list(tf.nest.flatten(variables))
    for variable in found:
        if not hasattr(variable, "assign"):
            raise ConfigError(f"broadcast gives variables their values; a {type(variable).__name__} cannot be assigned to")
    values = [value_of(variable) for variable in found]
    (comm or current()).broadcast(values, root, out=values)
    for variable, value in zip(found, values, strict=True):
        variable.assign(value)


class _Averaging:
    """Goes before an optimizer's class, whose `apply` then takes the workers' mean gradients."""

    _smlt_reduce: Callable[[Any], Any]

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        return super().apply(self._smlt_reduce(list(grads)), trainable_variables)  # type: ignore[misc]


def DistributedOptimizer(  # noqa: N802 - it makes an optimizer
    optimizer: Any, codec: str | None = None, comm: AnyCommunicator | None = None
) -> Any:
    """A Keras 3 optimizer like `optimizer` that averages the gradients over all workers before it applies them.

    For `apply_gradients` in a training step of one's own, and for `model.fit`. It is of a subclass of the optimizer's class
    and saved as that class, so that a saved model loads without SMLT. With gradient_accumulation_steps the gradients are
    averaged in each of the small steps.

    Raises ConfigError for what is no Keras optimizer, or one that has already been used.
    """
    if keras.backend.backend() != "tensorflow":
        raise ConfigError(
            f"Keras computes with {keras.backend.backend()}; here with tensorflow only: set KERAS_BACKEND=tensorflow"
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"a keras.optimizers.Optimizer is wanted, not a {type(optimizer).__name__}")
    if isinstance(optimizer, _Averaging):
        raise ConfigError("the optimizer is a DistributedOptimizer already")
    if optimizer.built:
        raise ConfigError("the optimizer has already been used, and its state would be lost: wrap it before")
    kind = type(optimizer)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    averaging: Any = type(kind.__name__, (_Averaging, kind), names)
    made = averaging.from_config(optimizer.get_config())
    made._smlt_reduce = lambda grads: allreduce(grads, codec=codec, comm=comm)
    return made


class DistributedCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """For `model.fit`: all workers begin with rank 0's weights and optimizer, and see the mean of their metrics.

    Put it first among the callbacks: those behind it (EarlyStopping, ReduceLROnPlateau, History) then decide alike on every
    worker. It turns off XLA for the model, which cannot compile an all-reduce.
    """

    def __init__(self, comm: AnyCommunicator | None = None) -> None:
        super().__init__()
        self._comm = comm

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        if getattr(model, "jit_compile", False):
            model.jit_compile, model.train_function = False, None

    def on_train_begin(self, logs: Any = None) -> None:
        """Take over rank 0's variables."""
        model = self.model
        if not model.built:
            raise ConfigError("the model has no variables yet: begin it with keras.Input(shape), or call build() before fit()")
        optimizer = getattr(model, "optimizer", None)
        broadcast([*model.weights, *(optimizer.variables if optimizer is not None else [])], comm=self._comm)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Put the workers' means in place of this worker's metrics."""
        if logs:
            numbers = {name: float(value) for name, value in logs.items()}
            logs.update((self._comm or current()).allreduce(numbers, codec="fp32"))


def shard(data: Any, comm: AnyCommunicator | None = None) -> Any:
    """This worker's part of a data set, as long as every other's, so that all take the same number of steps.

    An array, a tuple, list or dict of arrays (all of one length): every world_size-th row from rank on, without what is
    left over. A `tf.data.Dataset` of known size, before `batch`: likewise, by element. Raises ConfigError when the size is
    not known, or the parts would be empty.
    """
    comm = comm or current()
    n, rank = comm.world_size, comm.rank
    if isinstance(data, tf.data.Dataset):
        size = int(data.cardinality())
        if size < 0:
            raise ConfigError("the size of the tf.data.Dataset is not known: apply assert_cardinality, or shard it yourself")
        _check_parts(size, n)
        return data.take(size // n * n).shard(n, rank)
    sizes = {len(column) for column in tf.nest.flatten(data)}
    if len(sizes) != 1:
        raise ConfigError(f"the data set's parts have different lengths: {sorted(sizes)}")
    size = sizes.pop()
    _check_parts(size, n)
    return tf.nest.map_structure(lambda column: column[rank : size // n * n : n], data)


def _check_parts(size: int, world_size: int) -> None:
    if size < world_size:
        raise ConfigError(f"{size} samples cannot be shared out among {world_size} workers")
