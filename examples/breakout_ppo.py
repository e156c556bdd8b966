"""Proximal Policy Optimization for `breakout.py`: the network, advantages, the loss, and the step that all workers make alike.

Schulman et al., "Proximal Policy Optimization Algorithms" (https://arxiv.org/abs/1707.06347); advantages by Schulman et al.,
"High-Dimensional Continuous Control Using Generalized Advantage Estimation" (https://arxiv.org/abs/1506.02438).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

#: (channels, kernel, stride) of the convolutions and the width of the layer behind them.
NETWORKS: dict[str, tuple[tuple[tuple[int, int, int], ...], int]] = {
    # Mnih et al. 2013 (https://arxiv.org/abs/1312.5602): 0.7 M parameters, five times as fast as the other.
    "small": (((16, 8, 4), (32, 4, 2)), 256),
    # Mnih et al. 2015 (https://doi.org/10.1038/nature14236): 1.7 M parameters.
    "nature": (((32, 8, 4), (64, 4, 2), (64, 3, 1)), 512),
}


class ActorCritic(nn.Module):
    """Logits of the actions and the value of observations, from one trunk.

    `autocast`: convolutions and the wide layer compute in bfloat16; parameters, heads and gradients are float32.
    """

    def __init__(
        self,
        network: str = "small",
        observation: tuple[int, int] = (84, 4),  # pixels a side, pictures
        actions: int = 4,
        autocast: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        convolutions, width = NETWORKS[network]
        layers: list[nn.Module] = []
        side, channels = observation
        for out, kernel, stride in convolutions:
            layers += [nn.Conv2d(channels, out, kernel, stride), nn.ReLU()]
            channels, side = out, (side - kernel) // stride + 1
        layers += [nn.Flatten(), nn.Linear(channels * side * side, width), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.policy = nn.Linear(width, actions)
        self.value = nn.Linear(width, 1)
        self.autocast = autocast
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gain = {self.policy: 0.01, self.value: 1.0}.get(module, 2**0.5)
                nn.init.orthogonal_(module.weight, gain, generator)
                nn.init.zeros_(module.bias)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 of (batch, 84, 84, 4) to logits, float32 of (batch, actions), and values, float32 of (batch,)."""
        pixels = observations.to(torch.bfloat16 if self.autocast else torch.float32).mul_(1 / 255)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            seen = self.trunk(pixels.permute(0, 3, 1, 2))
        seen = seen.float()
        return self.policy(seen), self.value(seen).squeeze(1)


@dataclass
class Rollout:
    """What `envs` games gave in `steps` steps: tensors of (steps, envs), but for what is said."""

    observations: torch.Tensor  # uint8 of (steps, envs, 84, 84, 4)
    actions: torch.Tensor  # int64
    log_probs: torch.Tensor  # float32, of the actions when they were taken
    values: torch.Tensor  # float32, as they were estimated then
    rewards: torch.Tensor  # float32
    ended: torch.Tensor  # float32, 1 where the step was an episode's last
    last_values: torch.Tensor  # float32 of (envs,), of the observations behind the last step


def advantages(rollout: Rollout, discount: float, trace: float) -> torch.Tensor:
    """Generalized advantage estimates, float32 of (steps, envs): sums of (discount * trace)^k times the TD errors to come.

    `trace` is the paper's lambda. Nothing is carried over an episode's end.
    """
    found = torch.zeros_like(rollout.rewards)
    following, next_values = torch.zeros_like(rollout.last_values), rollout.last_values
    for step in reversed(range(len(found))):
        goes_on = 1 - rollout.ended[step]
        error = rollout.rewards[step] + discount * goes_on * next_values - rollout.values[step]
        following = error + discount * trace * goes_on * following
        found[step] = following
        next_values = rollout.values[step]
    return found


def ppo_loss(
    logits: torch.Tensor,
    values: torch.Tensor,
    actions: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantage: torch.Tensor,
    targets: torch.Tensor,
    clip: float,
    value_weight: float,
    entropy_weight: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The clipped surrogate objective to be minimised, a scalar, and its parts.

    logits (batch, actions); all others (batch,). `targets`: what the values should be.
    """
    log_probs = functional.log_softmax(logits, 1)
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()
    ratio = (log_probs.gather(1, actions.unsqueeze(1)).squeeze(1) - old_log_probs).exp()
    policy = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    value = 0.5 * (values - targets).square().mean()
    loss = policy + value_weight * value - entropy_weight * entropy
    clipped = ((ratio - 1).abs() > clip).float().mean()
    parts = {"policy_loss": policy, "value_loss": value, "entropy": entropy, "clipped": clipped}
    return loss, {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}


class Learner:
    """A model whose parameters lie in one flat float32 tensor, so that a step is one all-reduce and one Adam update.

    `parameters_flat`, `gradient`: float32 of (parameters,); the model's tensors are views of them.
    """

    def __init__(self, model: nn.Module, learning_rate: float, max_gradient_norm: float) -> None:
        self.model, self.max_gradient_norm = model, max_gradient_norm
        tensors = list(model.parameters())
        self.flat = nn.Parameter(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))
        self.gradient = torch.zeros_like(self.flat)
        self.flat.grad = self.gradient
        at = 0
        for tensor in tensors:
            here = slice(at, at := at + tensor.numel())
            tensor.data = self.flat.data[here].view_as(tensor)
            tensor.grad = self.gradient[here].view_as(tensor)
        self.optimizer = torch.optim.Adam([self.flat], lr=learning_rate, eps=1e-5, fused=True)

    def step(self, loss: torch.Tensor, average: Callable[[np.ndarray], bool]) -> bool:
        """Backward, average the gradient over the workers, clip it, step. False, and no step, when `average` says so."""
        self.gradient.zero_()
        loss.backward()
        if not average(self.gradient.numpy()):
            return False
        # After the mean, so that all clip by the same norm.
        nn.utils.clip_grad_norm_([self.flat], self.max_gradient_norm)
        self.optimizer.step()
        return True

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the steps to come."""
        self.optimizer.param_groups[0]["lr"] = learning_rate

    def checksum(self) -> int:
        """63 bits of the parameters' SHA-256: equal where they are equal to the bit."""
        digest = hashlib.sha256(memoryview(self.flat.detach().numpy()).cast("B")).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def tensors(self) -> dict[str, np.ndarray]:
        """Parameters by name and Adam's moments: what `load` takes. Views, not copies."""
        found = {f"model.{name}": tensor.detach().numpy() for name, tensor in self.model.named_parameters()}
        state: dict[str, Any] = self.optimizer.state.get(self.flat, {})
        return found | {f"adam.{name}": tensor.numpy() for name, tensor in state.items()}

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Put a checkpoint's tensors in place. ValueError when they are not those of such a model."""
        wanted = {f"model.{name}": tensor for name, tensor in self.model.named_parameters()}
        found = {name: array.shape for name, array in tensors.items() if name.startswith("model.")}
        if found != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
            raise ValueError("the checkpoint is of another network")
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(torch.from_numpy(tensors[name].copy()))
        moments = {name[5:]: torch.from_numpy(array.copy()) for name, array in tensors.items() if name.startswith("adam.")}
        if moments:
            self.optimizer.state[self.flat] = moments
