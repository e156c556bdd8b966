"""A worker's life in `breakout.py`: act, agree, learn, report, save, in step with all others."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from breakout_env import ACTIONS, FRAME_SKIP, PIXELS, STACKED, Games
from breakout_ppo import NETWORKS, ActorCritic, Learner, Rollout, advantages, ppo_loss

import smlt
from smlt.errors import CheckpointError, CollectiveError, ConfigError
from smlt.store.object import ObjectStore
from smlt.worker import checkpoint

CHECKPOINTS = "checkpoints"
CHECKPOINT_EVERY_S = 60.0
#: Updates between two looks at whether all workers hold the same parameters.
CHECK_EVERY = 10
#: Games that the mean return is over.
AVERAGED = 100


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters. What is "a worker's" grows with n: the global batch is envs * steps * n."""

    envs: int = _setting(32, "games that a worker plays at once")
    steps: int = _setting(64, "actions in each game before the workers learn")
    minibatches: int = _setting(8, "parts that a worker's envs * steps observations are cut in, a step each")
    epochs: int = _setting(4, "times that they are gone through")
    learning_rate: float = _setting(5e-4, "of Adam at the start; it falls to a twentieth, with what is left of the budget")
    discount: float = _setting(0.99, "of the rewards to come, an action")
    trace: float = _setting(0.95, "lambda of the advantage estimates")
    clip: float = _setting(0.1, "how far from 1 the ratio of probabilities counts")
    value_weight: float = _setting(0.5, "of the values' loss")
    entropy_weight: float = _setting(0.01, "of the policy's entropy")
    max_gradient_norm: float = _setting(0.5, "what the averaged gradient is clipped to")
    network: str = _setting("small", "of Mnih et al. 2013, or nature: of 2015")
    precision: str = _setting("auto", "of the convolutions; auto: bf16 where the processor has it (AVX-512 BF16, AMX)")
    seed: int = _setting(0, "of parameters, games and actions")

    def __post_init__(self) -> None:
        for name in ("envs", "steps", "minibatches", "epochs", "learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("discount", "trace", "clip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.minibatches > self.envs * self.steps:
            raise ConfigError(f"{self.minibatches} minibatches of {self.envs} * {self.steps} observations: some would be empty")
        if self.network not in NETWORKS or self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"network is one of {', '.join(NETWORKS)}; precision one of auto, fp32, bf16")


@dataclass(frozen=True)
class Budget:
    """When training ends: whichever comes first."""

    frames: int | None = None  # of the game, all workers together
    minutes: float | None = None  # by the clock
    cpu_minutes: float | None = None  # of processor time, all workers together

    def __post_init__(self) -> None:
        given = [value for value in (self.frames, self.minutes, self.cpu_minutes) if value is not None]
        if not given:
            raise ConfigError("say when to end: minutes, cpu_minutes or frames")
        if not all(math.isfinite(value) and value > 0 for value in given):
            raise ConfigError("minutes, cpu_minutes and frames must be above 0")

    def progress(self, frames: float, elapsed_s: float, cpu_s: float) -> float:
        """How much of it is spent, from 0 to 1."""
        spent = [(frames, self.frames), (elapsed_s / 60, self.minutes), (cpu_s / 60, self.cpu_minutes)]
        return min(1.0, max(used / limit for used, limit in spent if limit is not None))


def make_model(settings: Settings) -> ActorCritic:
    """The network, its parameters drawn from the seed: alike on all workers."""
    autocast = settings.precision == "bf16" or (settings.precision == "auto" and _has_fast_bf16())
    return ActorCritic(settings.network, (PIXELS, STACKED), len(ACTIONS), autocast, settings.seed)


def _has_fast_bf16() -> bool:
    # Not public in PyTorch 2.13; without it, fp32 is right everywhere.
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def load_checkpoint(objects: ObjectStore) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and state of the newest checkpoint that is whole. CheckpointError when there is none."""
    found = checkpoint.load_latest(objects, CHECKPOINTS)
    if found is None:
        raise CheckpointError(f"there is no checkpoint in {objects.url}: train first, or look at --out")
    return found


class Run:
    """This worker's part of a training run, with the others of `communicator` (what `smlt.init` returns).

    `report` is called with a row of metrics after every update, `stop` before every step: when it returns true on any
    worker, all stop behind the same step, with a checkpoint. `resume`: go on from the newest checkpoint in `objects`, if
    there is one. ConfigError when there is one and `resume` is false.
    """

    def __init__(
        self, communicator: smlt.Communicator, settings: Settings, budget: Budget, objects: ObjectStore, resume: bool = False
    ) -> None:
        self.communicator, self.rank, self.world_size = communicator, communicator.rank, communicator.world_size
        self.settings, self.budget, self.objects = settings, budget, objects
        self.report: Callable[[dict[str, Any]], None] = lambda row: None
        self.stop: Callable[[], bool] = lambda: False
        self.model = make_model(settings)
        self.learner = Learner(self.model, settings.learning_rate, settings.max_gradient_norm)
        self.updates = self.frames = self.episodes = 0
        self.last: deque[float] = deque(maxlen=AVERAGED)
        self.seconds = {"act": 0.0, "wait": 0.0, "learn": 0.0, "communicate": 0.0}  # of this process
        self._mean_seconds = np.zeros(len(self.seconds))  # of all
        self._earlier = {"elapsed_s": 0.0, "cpu_s": 0.0}  # of the runs that this one goes on from
        self._started = time.monotonic()
        self._elapsed_s, self._cpu_s, self._frames_before = 0.0, 0.0, 0
        self._load(resume)
        # Another seed for each worker, and for each resumption: it begins new games.
        seed = ((settings.seed * 1_000_003 + self.updates) * 65_537 + self.rank) * settings.envs
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        self.games = Games(settings.envs, seed)

    def train(self) -> dict[str, Any]:
        """Train until the budget is spent ("status": "done") or a stop is asked for ("stopped"); the last row of metrics.

        Raises CollectiveError when the workers' parameters differ, and what `allreduce` raises, such as WorkerLostError.
        """
        # Other processors may have drawn other last bits.
        self.communicator.broadcast(self.learner.flat.data, out=self.learner.flat.data)
        self._check_alike()
        saved = time.monotonic()
        progress = self.budget.progress(self.frames, self._earlier["elapsed_s"], self._earlier["cpu_s"])
        status, losses = "done" if progress >= 1 else "", None
        while not status:
            self.learner.set_learning_rate(self.settings.learning_rate * max(0.05, 1 - progress))
            losses = self._update()
            self.updates += 1
            progress = self._meet()
            status = "stopped" if losses is None else "done" if progress >= 1 else ""
            if status:
                break
            self.report(self._row(losses))
            if self.updates % CHECK_EVERY == 0:
                self._check_alike()
            if self.rank == 0 and time.monotonic() > saved + CHECKPOINT_EVERY_S:
                self._save()
                saved = time.monotonic()
        self._check_alike()
        if self.rank == 0:
            self._save()
        row = {**self._row(losses), "status": status}
        self.report(row)
        self.games.close()
        return row

    def _update(self) -> dict[str, float] | None:
        """One rollout and what is learnt from it; the mean losses, None when all were asked to stop."""
        with self._clock("act"):
            rollout = self._act()
        with torch.no_grad():
            found = torch.zeros(1) if rollout is None else advantages(rollout, self.settings.discount, self.settings.trace)
        sums = [float(found.sum()), float(found.square().sum()), float(found.numel()), float(rollout is None)]
        with self._clock("wait"):  # the first to meet after acting, so it waits for the slowest
            total, squares, count, stop = self.communicator.allreduce(np.array(sums), op="sum")
        if stop or rollout is None:
            return None
        mean = total / count
        deviation = max(0.0, squares / count - mean**2) ** 0.5  # over all workers' observations
        return self._learn(rollout, found, (found - mean) / (deviation + 1e-8))

    def _act(self) -> Rollout | None:
        """Play `steps` actions in each game; None when a stop was asked for meanwhile."""
        settings, shape = self.settings, (self.settings.steps, self.settings.envs)
        numbers = [torch.empty(shape) for _ in range(4)]
        log_probs, values, rewards, ended = numbers
        observations = torch.empty((*shape, PIXELS, PIXELS, STACKED), dtype=torch.uint8)
        actions = torch.empty(shape, dtype=torch.int64)
        with torch.no_grad():
            for step in range(settings.steps):
                if self.stop():
                    return None
                observations[step] = torch.from_numpy(self.games.observations)
                logits, values[step] = self.model(observations[step])
                every = logits.log_softmax(1)
                chosen = torch.multinomial(every.exp(), 1, generator=self.generator)
                log_probs[step], actions[step] = every.gather(1, chosen).squeeze(1), chosen.squeeze(1)
                found = self.games.step(actions[step].numpy())
                rewards[step], ended[step] = (torch.from_numpy(array) for array in found)
            _, last_values = self.model(torch.from_numpy(self.games.observations))
        return Rollout(observations, actions, log_probs, values, rewards, ended, last_values)

    def _learn(self, rollout: Rollout, found: torch.Tensor, normalised: torch.Tensor) -> dict[str, float] | None:
        settings, total, steps = self.settings, {}, 0
        targets = (found + rollout.values).flatten()
        observations = rollout.observations.flatten(0, 1)
        others = [each.flatten() for each in (rollout.actions, rollout.log_probs, normalised)]
        for _ in range(settings.epochs):
            order = torch.randperm(len(targets), generator=self.generator)
            for part in order.chunk(settings.minibatches):
                began = time.perf_counter()
                communicated = self.seconds["communicate"]
                logits, values = self.model(observations[part])
                loss, parts = ppo_loss(
                    logits,
                    values,
                    *(each[part] for each in others),
                    targets[part],
                    settings.clip,
                    settings.value_weight,
                    settings.entropy_weight,
                )
                stepped = self.learner.step(loss, self._average)
                self.seconds["learn"] += time.perf_counter() - began - (self.seconds["communicate"] - communicated)
                if not stepped:
                    return None
                steps += 1
                total = {name: total.get(name, 0.0) + value for name, value in parts.items()}
        return {name: value / steps for name, value in total.items()}

    def _average(self, gradient: np.ndarray) -> bool:
        """The mean over all workers, in place; false when one of them was asked to stop: it travels along."""
        with self._clock("communicate"):
            stop = np.array([float(self.stop())])
            both = {"gradient": gradient, "stop": stop}
            self.communicator.allreduce(both, out=both)
        return not stop[0]

    def _meet(self) -> float:
        """Tell all others what this worker has done since the last time: finished games, frames, time. The progress."""
        scores = [score for _, score in self.games.finished]
        self.games.finished.clear()
        elapsed_s = time.monotonic() - self._started
        mine = [len(scores), self.games.actions, elapsed_s, time.process_time(), *self.seconds.values()]
        self.games.actions = 0
        with self._clock("communicate"):
            told = self.communicator.allgather(np.array(mine, np.float64))
            most = int(told[:, 0].max())
            padded = np.array(scores + [np.nan] * (most - len(scores)))
            everyone = self.communicator.allgather(padded) if most else np.empty((0, 0))
        new = everyone[~np.isnan(everyone)].tolist()  # by rank, so that all agree on which are the last hundred
        self.last.extend(new)
        self.episodes += len(new)
        self.frames += FRAME_SKIP * int(told[:, 1].sum())
        self._elapsed_s, self._cpu_s = float(told[:, 2].max()), float(told[:, 3].sum())
        self._mean_seconds = told[:, 4:].mean(0)
        return self.budget.progress(
            self.frames, self._earlier["elapsed_s"] + self._elapsed_s, self._earlier["cpu_s"] + self._cpu_s
        )

    def _row(self, losses: dict[str, float] | None) -> dict[str, Any]:
        """Metrics over all workers; act_s, wait_s, learn_s and communicate_s are means over them, since this start."""
        return {
            "updates": self.updates,
            "frames": self.frames,
            "episodes": self.episodes,
            "mean_return": float(np.mean(self.last)) if self.last else None,
            "averaged": len(self.last),
            "elapsed_s": self._earlier["elapsed_s"] + self._elapsed_s,
            "cpu_s": self._earlier["cpu_s"] + self._cpu_s,
            "frames_per_s": (self.frames - self._frames_before) / max(self._elapsed_s, 1e-9),
            **{f"{name}_s": float(value) for name, value in zip(self.seconds, self._mean_seconds, strict=True)},
            "world_size": self.world_size,
            "loss": None,
            **(losses or {}),
        }

    def _check_alike(self) -> None:
        mine = np.array([self.learner.checksum()], np.int64)
        with self._clock("communicate"):
            least, most = (int(self.communicator.allreduce(mine, op=op)[0]) for op in ("min", "max"))
        if least != most:
            raise CollectiveError(
                f"rank {self.rank}: after update {self.updates} the workers' parameters are not the same "
                f"(checksums from {least:x} to {most:x}); resume from the last checkpoint, with one version of PyTorch"
            )

    def _save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "updates": self.updates,
            "frames": self.frames,
            "episodes": self.episodes,
            "last_returns": list(self.last),
            "elapsed_s": self._earlier["elapsed_s"] + self._elapsed_s,
            "cpu_s": self._earlier["cpu_s"] + self._cpu_s,
            "world_size": self.world_size,
        }
        checkpoint.save(self.objects, CHECKPOINTS, self.updates, self.learner.tensors(), state)

    def _load(self, resume: bool) -> None:
        found = checkpoint.load_latest(self.objects, CHECKPOINTS)
        if found is None:
            return
        if not resume:
            raise ConfigError(f"{self.objects.url} holds a run already: go on with --resume, or give another --out")
        tensors, state = found
        try:
            self.learner.load(tensors)
        except ValueError as error:
            raise CheckpointError(f"{self.objects.url}: {error} ({json.dumps(state['settings'])})") from error
        self.updates, self.frames, self.episodes = state["updates"], state["frames"], state["episodes"]
        self.last.extend(state["last_returns"])
        self._earlier = {name: state[name] for name in self._earlier}
        self._frames_before = self.frames

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began
