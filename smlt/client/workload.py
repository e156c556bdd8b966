"""What one training task asks of whoever computes it: measured once (`smlt.client.profiling`), kept as JSON."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from smlt.collective.codecs import check_codec, wire_size
from smlt.errors import ConfigError
from smlt.worker.buckets import BUCKET_MB, FIRST_BUCKET_MB

#: (samples, seconds), ascending.
Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Workload:
    """A task, a data set and how they are trained, in numbers. Seconds are those of one core of the profiled machine.

    `compute`: forward and backward of local batches; `evaluate`: the task's evaluate() of batches. `gradients`: (dtype,
    elements), and `buckets` the same of each collective, in the order in which they leave. `tail_fraction`: the part of
    `compute` that is left when the first bucket of gradients is ready to travel; 0 when none leaves before backward has ended.
    `parallel_fraction`: Amdahl's, of `compute`; below 0 where threads make it slower. How many times as long `compute` takes:
    with a thread for each core (`all_cores`), and while every core does the same (`crowding`). `load_sample_s`: taking a
    sample and making a batch of it. `base_mb`: resident with model, data, gradients and optimizer; `sample_mb`: what a
    sample of the local batch adds. `import_s`, `load_s`: the script with its framework; data() and model(); `exit_s`: the
    process's end.
    """

    script: str
    samples: int
    epochs: int
    global_batch_size: int
    compute: Points
    gradients: tuple[tuple[str, int], ...]
    buckets: tuple[tuple[str, int], ...] = ()
    codec: str = "fp16"
    bucket_mb: float = BUCKET_MB
    optimizer_s: float = 0.0
    tail_fraction: float = 0.0
    parallel_fraction: float = 0.9
    crowding: float = 1.0
    all_cores: float = 1.0
    load_sample_s: float = 0.0
    evaluate: Points = ()
    test_samples: int = 0
    model_bytes: int = 0
    checkpoint_bytes: int = 0
    checkpoint_s: float = 0.0
    checkpoint_every_epochs: int = 1
    code_bytes: int = 0
    data_bytes: int = 0
    data_files: int = 0
    import_s: float = 0.0
    load_s: float = 0.0
    exit_s: float = 0.0
    base_mb: float = 100.0
    sample_mb: float = 0.0
    cores: int = 1  # of the profiled machine
    processor: str = ""
    queued: float = 0.0  # the part of the time that the profiled process waited for a core: others were busy
    noise: float = 0.0  # the spread of the profiled steps: half the distance of their quartiles over their median

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "global_batch_size", "cores", "checkpoint_every_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"workload: {name} {getattr(self, name)} is not positive")
        if not self.compute or any(batch < 1 or not 0 <= s < math.inf for batch, s in self.compute):
            raise ConfigError(f"workload: compute {self.compute} is no list of (samples, seconds)")
        check_codec(self.codec)

    # ---- what follows from it ----

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.steps_of(self.global_batch_size)

    def steps_of(self, global_batch_size: int) -> int:
        """Steps an epoch with this global batch."""
        return -(-self.samples // global_batch_size)

    def compute_s(self, local_batch: float) -> float:
        """Forward and backward of so many samples on one core, in seconds: straight lines between what was measured."""
        return _between(self.compute, local_batch)

    def evaluate_s(self, samples: int, batch: int = 256) -> float:
        """The task's evaluate() over so many samples, in batches, on one core."""
        if not self.evaluate or samples < 1:
            return 0.0
        full, rest = divmod(samples, batch)
        return full * _between(self.evaluate, batch) + (_between(self.evaluate, rest) if rest else 0.0)

    @property
    def parameters(self) -> int:
        """Elements of the gradient."""
        return sum(count for _, count in self.gradients)

    def bucket_bytes(self) -> tuple[int, ...]:
        """Encoded bytes of a step's collectives, in the order in which they leave; the last one waits for backward's end."""
        if self.buckets:
            return tuple(wire_size(_wire(dtype), self.codec, count) for dtype, count in self.buckets)
        sizes: list[int] = []  # not profiled: as if the parameters could be cut anywhere
        for dtype, count in self.gradients:
            item, done = _item_bytes(dtype), 0
            while done < count and self.tail_fraction > 0 and self.bucket_mb > 0:
                limit = (self.bucket_mb if sizes else min(FIRST_BUCKET_MB, self.bucket_mb)) * 2**20
                if (count - done) * item <= limit * 1.5:
                    break
                piece = max(1, int(limit) // item)
                sizes.append(wire_size(_wire(dtype), self.codec, piece))
                done += piece
            sizes.append(wire_size(_wire(dtype), self.codec, count - done))
        return tuple(sizes)

    def resident_mb(self, local_batch: int, workers: int) -> float:
        """What a worker holds, in MB of 10^6 bytes."""
        buffers = 2 * sum(self.bucket_bytes()) / 1e6 if workers > 1 else 0.0
        return self.base_mb + self.sample_mb * local_batch + buffers

    # ---- as JSON ----

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """The inverse of `to_json`. ConfigError when it is no such thing."""
        try:
            values = json.loads(text)
            known = {field.name for field in fields(cls)}
            if not isinstance(values, dict) or (unknown := sorted(set(values) - known)):
                raise ConfigError(f"workload: unknown {unknown if isinstance(values, dict) else 'form'}")
            for name in ("compute", "evaluate", "gradients", "buckets"):
                values[name] = tuple((first, second) for first, second in values.get(name, ()))
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"workload: {error}") from error

    def save(self, path: Path) -> None:
        """Write it to a file. ConfigError when it cannot be."""
        try:
            path.write_text(self.to_json() + "\n")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Workload:
        """Read what `save` wrote. ConfigError naming the file when it cannot be."""
        try:
            return cls.from_json(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def changed(self, **values: Any) -> Workload:
        """The same with other epochs, another codec, ..."""
        return replace(self, **values)


def _between(points: Sequence[tuple[int, float]], at: float) -> float:
    """Linear between points; beyond them by the last slope, below no less than a tenth of the first, above than the last."""
    if len(points) == 1:
        batch, seconds = points[0]
        return seconds * max(0.1, at / batch)
    place = min(max(1, bisect_left([batch for batch, _ in points], at)), len(points) - 1)
    (low, low_s), (high, high_s) = points[place - 1], points[place]
    value = low_s + (high_s - low_s) * (at - low) / (high - low)
    if low <= at <= high:
        return value
    return max(value, 0.1 * low_s if at < low else high_s)


def _wire(dtype: str) -> str:
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def _item_bytes(dtype: str) -> int:
    return {"float64": 8, "float16": 2, "bfloat16": 2}.get(dtype, 4)
