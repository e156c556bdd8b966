"""PyTorch tensors in collectives: dtypes, views, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from groups import Group

from smlt import Communicator
from smlt.errors import ConfigError


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
    ],
)
@pytest.mark.parametrize("codec", ["fp32", "fp16"])
def test_every_dtype_comes_back_as_itself(group: Callable[..., Group], dtype: torch.dtype, codec: str) -> None:
    def call(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        x = (torch.arange(100).reshape(4, 25) % 7 * (comm.rank + 1)).to(dtype)
        in_place = x.clone()
        assert comm.allreduce(in_place, op="sum", codec=codec, out=in_place) is in_place
        return comm.allreduce(x, op="sum", codec=codec), in_place

    expected = (torch.arange(100).reshape(4, 25) % 7 * 3).to(dtype)
    for result, in_place in group(2).run(call):
        assert result.dtype == dtype
        assert torch.equal(result, expected)  # small integers are exact in every format
        assert torch.equal(in_place, expected)


def test_a_parameter_and_a_transposed_view(group: Callable[..., Group]) -> None:
    def call(comm: Communicator) -> list[torch.Tensor]:
        parameter = torch.nn.Parameter(torch.full((3, 5), float(comm.rank)))
        return comm.allreduce([parameter, torch.ones(5, 3).t() * comm.rank])

    for parameter, view in group(3).run(call):
        assert not parameter.requires_grad
        assert torch.equal(parameter, torch.ones(3, 5))
        assert torch.equal(view, torch.ones(3, 5))


def test_a_module_s_state_is_broadcast_in_place(group: Callable[..., Group]) -> None:
    def call(comm: Communicator) -> torch.Tensor:
        module = torch.nn.BatchNorm1d(3)
        with torch.no_grad():
            module.weight.fill_(comm.rank + 5)
        state = module.state_dict()
        comm.broadcast(state, root=1, out=state)
        return module.weight.detach()

    for weight in group(2).run(call):
        assert torch.equal(weight, torch.full((3,), 6.0))


def test_a_sparse_tensor_is_refused() -> None:
    with Communicator() as comm, pytest.raises(ConfigError, match="sparse"):
        comm.allreduce(torch.ones(3).to_sparse())
    with Communicator() as comm, pytest.raises(ConfigError, match="the tensor is on meta"):
        comm.allreduce(torch.ones(3, device="meta"))
