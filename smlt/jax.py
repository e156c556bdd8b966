"""JAX: pytrees of arrays reduced over all workers, eagerly or under `jit`.

>>> smlt.init()  # doctest: +SKIP
>>> loss, grads = jax.value_and_grad(loss_fn)(params, batch)  # doctest: +SKIP
>>> grads = smlt.jax.allreduce(grads)  # doctest: +SKIP

Under `jit` a collective is an ordered `jax.experimental.io_callback`: collectives run in the order of the program, on every
worker alike, though nothing depends on their results. From that follows what JAX says of such callbacks: `vmap`
raises (reduce the batched array outside of it), differentiating through one raises (take the gradient first, then
reduce it), and it runs on one device. In the branches of `lax.cond` all workers must take the same one.

`comm`: the `smlt.Communicator` to use; by default the process's, which `smlt.init` or `smlt launch` has joined. Under `jit`
it is looked up when the compiled function runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smlt.collective.api import current
from smlt.collective.codecs import check_codec, check_operation, wire_dtype
from smlt.collective.packing import aligned, reduce_arrays
from smlt.errors import ConfigError

if TYPE_CHECKING:
    from smlt.collective.two_level import AnyCommunicator

try:
    import jax
    from jax.experimental import io_callback
except ImportError as error:
    raise ConfigError(f"smlt.jax needs JAX ({error}): pip install 'smlt[jax]'") from error

__all__ = ["allreduce", "broadcast"]


def allreduce(tree: Any, op: str = "mean", codec: str | None = None, comm: AnyCommunicator | None = None) -> Any:
    """Reduce a pytree over all workers; returns one of the same structure, shapes and dtypes.

    Parameters
    ----------
    tree
        JAX arrays, NumPy arrays and numbers, in any registered pytree. Of the same structure on every worker.
    op, codec
        As for `smlt.Communicator.allreduce`.

    On CPU one array is sent from JAX's memory and comes back without a copy, several are copied once, to be one collective;
    under `jit` JAX copies both once more. Arrays on another device are fetched and put on JAX's default device.

    Raises ConfigError for leaves that are not numbers, and as `smlt.Communicator.allreduce` does; under `jit` JAX raises its
    own error, whose message holds SMLT's.
    """
    check_operation(op)
    if codec is not None:
        check_codec(codec)
    return _apply(lambda arrays: reduce_arrays(comm or current(), arrays, op, codec), tree)


def broadcast(tree: Any, root: int = 0, comm: AnyCommunicator | None = None) -> Any:
    """The pytree of rank `root`, eagerly or under `jit`. Each leaf is copied once. Errors as for `allreduce`."""

    def call(arrays: Sequence[Any]) -> list[Any]:
        values = [aligned(array.shape, array.dtype) for array in arrays]
        for value, array in zip(values, arrays, strict=True):
            value[...] = array
        (comm or current()).broadcast(values, root, out=values)
        return values

    return _apply(call, tree)


def _apply(call: Callable[[Sequence[Any]], list[Any]], tree: Any) -> Any:
    leaves, structure = jax.tree_util.tree_flatten(tree)
    arrays = [_checked(leaf) for leaf in leaves]
    if not arrays:
        return tree
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        results = io_callback(lambda *values: call([np.asarray(v) for v in values]), shapes, *arrays, ordered=True)
    else:
        results = [jax.device_put(array) for array in call([np.asarray(array) for array in arrays])]
    return jax.tree_util.tree_unflatten(structure, results)


def _checked(leaf: Any) -> Any:
    if isinstance(leaf, (bool, int, float)):
        leaf = jax.numpy.asarray(leaf)
    elif isinstance(leaf, np.generic):
        leaf = np.asarray(leaf)
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        raise ConfigError(f"cannot reduce a {type(leaf).__module__}.{type(leaf).__qualname__}: give a pytree of arrays")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) or wire_dtype(np.dtype(leaf.dtype)) is None:
        raise ConfigError(f"cannot reduce dtype {leaf.dtype}: floats, integers and booleans only")
    return leaf
