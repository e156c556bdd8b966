"""The drop-in for MXNet 1.9: NDArrays and a Gluon trainer; the workers are threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from groups import Group

from smlt import Communicator
from smlt.errors import ConfigError

mxnet = pytest.importorskip("mxnet")
from mxnet import autograd, gluon, init, nd  # noqa: E402

import smlt.mxnet as drop_in  # noqa: E402


def test_arrays_are_averaged(group: Callable[..., Group]) -> None:
    def run(comm: Communicator) -> Any:
        many = drop_in.allreduce([nd.full((30, 7), comm.rank), nd.full((2,), comm.rank, dtype="int32")], comm=comm)
        one = drop_in.allreduce(nd.full((500,), comm.rank), "sum", comm=comm)
        assert [array.shape for array in (*many, one)] == [(30, 7), (2,), (500,)]
        assert many[1].dtype == np.int32
        return [float(array.mean().asscalar()) for array in (*many, one)]

    assert group(3).run(run) == [[1, 1, 3]] * 3


def test_a_trainer_takes_the_step_of_the_whole_batch(group: Callable[..., Group]) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("f4")

    def step(trainer: Any, net: Any, part: Any) -> Any:
        with autograd.record():
            loss = (net(nd.array(part)) ** 2).sum()
        loss.backward()
        trainer.step(len(part))
        return net.weight.data().asnumpy()

    def net_of(value: float) -> Any:
        net = gluon.nn.Dense(1, in_units=3)
        net.initialize(init.Constant(value))
        return net

    def run(comm: Communicator) -> Any:
        net = net_of(1.0 + comm.rank)
        drop_in.broadcast(net.collect_params(), comm=comm)
        trainer = drop_in.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1}, codec="fp32", comm=comm)
        return step(trainer, net, x[comm.rank :: comm.world_size])

    net = net_of(1.0)
    expected = step(gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1}), net, x)
    for weight in group(2).run(run):
        np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_what_cannot_be_reduced_is_told() -> None:
    net = gluon.nn.Dense(1)
    net.initialize()
    with Communicator() as comm:
        for value, message in (
            (np.zeros(3), "give NDArrays"),
            (nd.zeros((3, 2)).tostype("row_sparse"), "storage row_sparse"),
        ):
            with pytest.raises(ConfigError, match=message):
                drop_in.allreduce(value, comm=comm)
        with pytest.raises(ConfigError, match="has no value yet"):
            drop_in.broadcast(net.collect_params(), comm=comm)
