"""MXNet 1.9 with Gluon: gradients averaged by a `Trainer`, or by hand.

>>> smlt.init()  # doctest: +SKIP
>>> trainer = smlt.mxnet.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})  # doctest: +SKIP
>>> ...  # with autograd.record(): loss = ...;  loss.backward()
>>> trainer.step(batch_size)  # doctest: +SKIP

MXNet is no longer developed. It needs NumPy before 1.24, so an environment of its own:
pip install mxnet==1.9.1 'numpy==1.23.5'.

`comm`: the `smlt.Communicator` to use; by default the process's, which `smlt.init` or `smlt launch` has joined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from smlt.collective.api import current
from smlt.collective.packing import reduce_arrays
from smlt.errors import ConfigError

if TYPE_CHECKING:
    from smlt.collective.two_level import AnyCommunicator

try:
    import mxnet
    from mxnet import gluon
except (ImportError, AttributeError) as error:  # AttributeError: np.bool, which NumPy 1.24 has not
    raise ConfigError(
        f"smlt.mxnet needs MXNet 1.9 and NumPy before 1.24 ({error}): pip install mxnet==1.9.1 'numpy==1.23.5'"
    ) from error

__all__ = ["Trainer", "allreduce", "broadcast"]


class _Capsule:
    """An NDArray as NumPy's from_dlpack takes it: MXNet is older than that protocol."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.to_dlpack_for_read()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def _read(array: Any) -> Any:
    if not isinstance(array, mxnet.nd.NDArray):
        raise ConfigError(f"cannot reduce a {type(array).__module__}.{type(array).__qualname__}: give NDArrays")
    if array.stype != "default":
        raise ConfigError(f"cannot reduce an NDArray of storage {array.stype}: make it dense first, by tostype('default')")
    if array.context.device_type != "cpu":
        raise ConfigError(f"the NDArray is on {array.context}; collectives take NDArrays on the CPU")
    array.wait_to_read()
    return np.from_dlpack(_Capsule(array))


def allreduce(arrays: Any, op: str = "mean", codec: str | None = None, comm: AnyCommunicator | None = None) -> Any:
    """Reduce an NDArray, or a list of them, over all workers; returns the same.

    One array is sent from MXNet's memory and comes back without a copy, several are copied once, to be one collective.
    Raises ConfigError for what is no dense NDArray on the CPU, and as `smlt.Communicator.allreduce` does.
    """
    many = isinstance(arrays, (list, tuple))
    sources = [_read(array) for array in (arrays if many else [arrays])]
    reduced = reduce_arrays(comm or current(), sources, op, codec)
    results = [mxnet.nd.from_numpy(array, zero_copy=True) for array in reduced]
    return results if many else results[0]


def broadcast(parameters: Any, root: int = 0, comm: AnyCommunicator | None = None) -> None:
    """Give a `ParameterDict` (or a dict of parameters) the values that it has on rank `root`. Copies them out and back.

    Raises ConfigError for parameters without values, and as `smlt.Communicator.broadcast` does.
    """
    found = list(dict(parameters).values())
    for parameter in found:
        if parameter._data is None:
            raise ConfigError(f"{parameter.name} has no value yet: give layers their input's size, and call initialize()")
    values = [parameter.data().asnumpy() for parameter in found]
    (comm or current()).broadcast(values, root, out=values)
    for parameter, value in zip(found, values, strict=True):
        parameter.set_data(mxnet.nd.array(value, dtype=value.dtype))


class Trainer(gluon.Trainer):  # type: ignore[misc]
    """A `gluon.Trainer` whose `step` averages the gradients over all workers first; `step(batch_size)`: this worker's batch.

    `params`, `optimizer`, `optimizer_params` as for `gluon.Trainer`. All workers must have begun with the same values: see
    `broadcast`. Gradients that a worker's loss did not reach are what they were: call `zero_grad` where that may be.
    """

    def __init__(
        self,
        params: Any,
        optimizer: Any,
        optimizer_params: Any = None,
        codec: str | None = None,
        comm: AnyCommunicator | None = None,
    ) -> None:
        super().__init__(params, optimizer, optimizer_params, kvstore=None)
        self._codec, self._comm = codec, comm

    def _allreduce_grads(self) -> None:
        gradients = [parameter.list_grad()[0] for parameter in self._params if parameter.grad_req != "null"]
        for gradient, reduced in zip(gradients, allreduce(gradients, codec=self._codec, comm=self._comm), strict=True):
            gradient[:] = reduced
