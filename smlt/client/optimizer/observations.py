"""What was measured of a choice, in one round of training; a run's observations in `observations.jsonl`.

docs/goals.md says which steps count, and what is done with the ends of epochs.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from smlt.client.optimizer.space import Choice
from smlt.client.platforms import nodes_of
from smlt.client.rows import append_row
from smlt.errors import CheckpointError

FILE = "observations.jsonl"
#: Behind a change of the membership: caches, buffers and windows are new, and the first step waits for whoever comes last.
WARM_UP_STEPS = 1
#: A step that took so many times the median is a pause of the machine when it happens once; more often it is the choice's.
PAUSE_FACTOR = 5.0
PAUSES_MAX_PART = 0.02
#: A mean is never trusted further than this: minutes differ by more than their steps do.
NOISE_FLOOR = 0.005
#: A single step's relative scatter where there are too few to tell.
SCATTER = 0.3
#: What makes observations of two runs comparable, of what was asked for (config.json).
COMPARABLE = ("codec", "bucket_mb", "on", "function", "store_node")
#: Of earlier runs, as many of the newest observations are carried over.
CARRIED_MAX = 200


@dataclass(frozen=True)
class Observation:
    """The steps of a round under one choice.

    `step_s`: mean wall time of a step, in seconds, everything in it; `noise`: the relative standard error of that mean.
    `compute_s`, `communication_s`, `data_s`: of that, the slowest worker's means; 0 where they are not known. `at_step`: the
    global step behind which the round ended. `time`: epoch s.
    """

    choice: Choice
    step_s: float
    steps: int
    global_batch_size: int
    noise: float = 0.05
    compute_s: float = 0.0
    communication_s: float = 0.0
    data_s: float = 0.0
    rss_mb: float = 0.0
    at_step: int = 0
    time: float = 0.0


class EpochEnds:
    """What evaluation and checkpoint at the end of an epoch add to a step's mean time.

    A round may have none of them, or one among few steps, so they are measured by themselves and shared out over all of an
    epoch's steps. `model_share_s`: the same share as the cost model predicts it for a choice and a global batch size
    (`CostModel.step(...).epoch_end_s`); it is scaled to what was seen.
    """

    def __init__(
        self, steps_per_epoch: Callable[[int], float], model_share_s: Callable[[Choice, int], float] | None = None
    ) -> None:
        self._steps_per_epoch, self._model_share_s = steps_per_epoch, model_share_s
        self._seen: dict[Choice, list[float]] = {}  # seconds of each end
        self._ratios: list[float] = []  # observed over predicted share

    def saw(self, choice: Choice, global_batch_size: int, seconds: Sequence[float]) -> None:
        """Ends of epochs that took so many seconds each beside the step itself."""
        for one in seconds:
            self._seen.setdefault(choice, []).append(max(0.0, one))
            predicted = self._model_share_s(choice, global_batch_size) if self._model_share_s is not None else 0.0
            if predicted > 0:
                self._ratios.append(max(0.0, one) / self._steps_per_epoch(global_batch_size) / predicted)

    def share_s(self, choice: Choice, global_batch_size: int) -> float:
        """Seconds that the ends of epochs add to each step, 0 when nothing is known of them."""
        if choice in self._seen:
            return statistics.fmean(self._seen[choice]) / self._steps_per_epoch(global_batch_size)
        if self._model_share_s is not None:
            ratio = statistics.median(self._ratios) if self._ratios else 1.0
            return ratio * self._model_share_s(choice, global_batch_size)
        known = [one for ends in self._seen.values() for one in ends]
        return statistics.fmean(known) / self._steps_per_epoch(global_batch_size) if known else 0.0


@dataclass(frozen=True)
class _Step:
    """A step that counts: its wall time, the row of metrics.jsonl, and whether it holds the end of an epoch."""

    seconds: float
    row: Mapping[str, Any]
    behind_epoch: bool


def observe_round(rows: Iterable[Mapping[str, Any]], choice: Choice, epoch_ends: EpochEnds | None = None) -> Observation | None:
    """What the rows of metrics.jsonl (steps, epochs, changes of the membership) of a round say of its choice.

    The first step row is where the clock starts. Left out are steps in which the membership changed, the first behind that, and
    a single pause of the machine. None when fewer than two steps are left: a round that is not to be judged.
    """
    rows = list(rows)
    counted = _counted(rows, choice.workers)
    # an epoch's last batch may be smaller, and a schedule may change it within the round: the one that most steps had
    batch = statistics.mode(int(step.row["samples"]) for step in reversed(counted)) if counted else 0
    same = [step for step in counted if int(step.row["samples"]) == batch]
    plain = _without_pauses([step for step in same if not step.behind_epoch])
    if len(plain) < 2:
        return None
    seconds = [step.seconds for step in plain]
    mean, noise = statistics.fmean(seconds), relative_error(seconds)
    ends = [step.seconds - mean for step in same if step.behind_epoch]
    if epoch_ends is not None:
        epoch_ends.saw(choice, batch, ends)
        share = epoch_ends.share_s(choice, batch)
    else:  # as often as in this round; where there is one only, it may as well have been none, or two
        share = max(0.0, sum(ends)) / len(same)
        noise = math.hypot(noise, share / (mean + share) / math.sqrt(len(ends))) if ends else noise
    compute_s, communication_s, data_s, rss_mb = _parts([step.row for step in plain])
    last = plain[-1].row
    return Observation(
        choice=choice,
        step_s=mean + share,
        steps=len(plain),
        global_batch_size=batch,
        noise=noise,
        compute_s=compute_s,
        communication_s=communication_s,
        data_s=data_s,
        rss_mb=rss_mb,
        at_step=max(int(row["step"]) for row in rows if row.get("kind", "step") == "step"),
        time=float(last["time"]),
    )


def relative_error(seconds: Sequence[float]) -> float:
    """The standard error of the mean over the mean, for step times that may hang together from one to the next.

    As many independent steps are counted as an autoregressive process of first order has: n (1 - r) / (1 + r), r the lag-1
    autocorrelation (Bartlett 1946), taken as 0 when it is negative. Not below NOISE_FLOOR.
    """
    n = len(seconds)
    mean = statistics.fmean(seconds)
    if n < 4:
        return max(NOISE_FLOOR, SCATTER / math.sqrt(max(n, 1)))
    off = [one - mean for one in seconds]
    total = sum(one * one for one in off)
    r = sum(a * b for a, b in pairwise(off)) / total if total > 0 else 0.0
    r = min(max(r, 0.0), 0.95)
    effective = max(2.0, n * (1 - r) / (1 + r))
    few = math.sqrt((n - 1) / (n - 3))  # Student's distribution is wider than the normal one that is made of it
    return max(NOISE_FLOOR, few * math.sqrt(total / (n - 1) / effective) / mean)


def _counted(rows: Sequence[Mapping[str, Any]], workers: int) -> list[_Step]:
    """The steps of which the wall time is the choice's."""
    changes = [
        (float(row["noticed"]), float(row["noticed"]) + float(row["recovery_s"]))
        for row in rows
        if row.get("kind") == "membership" and "noticed" in row and "recovery_s" in row
    ]
    counted, before, warm_up = list[_Step](), None, 0
    for row in rows:
        if row.get("kind", "step") != "step":
            continue
        previous, before = before, row
        if len(row["ranks"]) != workers or (previous is not None and len(previous["ranks"]) != len(row["ranks"])):
            warm_up = WARM_UP_STEPS
            continue
        if previous is None or int(row["step"]) != int(previous["step"]) + 1:
            continue
        since, until = float(previous["time"]), float(row["time"])
        if any(began < until and ended > since for began, ended in changes):
            warm_up = WARM_UP_STEPS
        elif warm_up:
            warm_up -= 1
        elif 0 < until - since < math.inf:  # workers' clocks may differ where another one is the last
            counted.append(_Step(until - since, row, int(row["epoch"]) != int(previous["epoch"])))
    return counted


def _without_pauses(steps: list[_Step]) -> list[_Step]:
    if len(steps) < 4:
        return steps
    limit = PAUSE_FACTOR * statistics.median(step.seconds for step in steps)
    usual = [step for step in steps if step.seconds <= limit]
    return usual if len(steps) - len(usual) <= max(1, int(PAUSES_MAX_PART * len(steps))) else steps


def _parts(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float, float]:
    """Mean compute, communication and waiting for data of whoever takes longest over its own part; the largest RSS in MB."""
    workers = range(min(len(row["ranks"]) for row in rows))
    means = [
        tuple(statistics.fmean(float(row[name][i]) for row in rows) for name in ("compute_s", "communication_s", "data_s"))
        for i in workers
    ]
    slowest = max(means, key=lambda parts: parts[0] + parts[2])
    return slowest[0], slowest[1], slowest[2], max(float(max(row["rss_mb"])) for row in rows)


# ---- observations.jsonl ----


def comparable(config: Mapping[str, Any], machine: str = "") -> str:
    """A short name for what makes step times of two runs comparable: equal for runs of the same task in the same place.

    `config`: a run's config.json. `machine`: what the workers run on, such as its architecture and number of cores.
    """
    known = {name: config.get(name) for name in COMPARABLE}
    known |= {"script": Path(str(config.get("script", ""))).name, "machine": machine}
    if config.get("on") != "lambda":
        known["function"] = None
    if (nodes := config.get("store_nodes") or nodes_of(config.get("store"))) > 1:
        known["store_nodes"] = nodes
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def append_observation(run_path: Path, observation: Observation, task: str = "") -> None:
    """Add a row to a run's observations.jsonl; `task`: see `comparable`. CheckpointError when it cannot be written."""
    row = {**asdict(observation), **({"task": task} if task else {})}
    append_row(Path(run_path) / FILE, json.dumps(row))


def read_observations(run_path: Path, task: str = "") -> list[Observation]:
    """The rows of a run's observations.jsonl, [] when it has none; with `task`, those only that were made under it.

    A row that was cut short, or is no observation, is left out. CheckpointError when the file cannot be read.
    """
    path = Path(run_path) / FILE
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return [found for line in lines if (found := _observation(line, task)) is not None]


def carried_observations(run_path: Path, task: str = "", most: int = CARRIED_MAX) -> list[Observation]:
    """What a later run of the same task may begin with: the newest observations of an earlier one, oldest first."""
    return read_observations(run_path, task)[-most:]


_WHOLE = ("steps", "global_batch_size", "at_step")
_NUMBERS = tuple(field.name for field in fields(Observation) if field.name != "choice")


def _observation(line: bytes, task: str) -> Observation | None:
    try:
        row: Any = json.loads(line)
        if not isinstance(row, dict) or (task and row.get("task") != task):
            return None
        choice = Choice(_whole(row["choice"]["workers"]), _whole(row["choice"]["memory_mb"]))
        numbers = {name: (_whole if name in _WHOLE else _real)(row[name]) for name in _NUMBERS if name in row}
        found = Observation(**{**numbers, "choice": choice})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    usable = found.step_s > 0 and min(found.steps, found.global_batch_size, choice.workers, choice.memory_mb) >= 1
    return found if usable else None


def _real(value: Any) -> Any:
    """ValueError for what is no finite number at or above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(value)
    return value


def _whole(value: Any) -> Any:
    if not isinstance(_real(value), int):
        raise ValueError(value)
    return value
