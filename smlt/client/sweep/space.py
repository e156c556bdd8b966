"""What a sweep may try: a grid of values, random draws, or both. Pure: the same space and seed give the same trials."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smlt.errors import ConfigError
from smlt.worker.hyperparameters import Value, parse_assignment, parse_value

#: Options of the run itself that may be searched like hyper-parameters of the task.
RUN_OPTIONS = ("global_batch_size", "batch_schedule", "lr_rule", "codec", "seed")
#: More would be no sweep but a mistake in a grid.
TRIALS_MAX = 10_000

_SCALES = ("uniform", "log", "int", "logint")
_RANGE = re.compile(r"(?:(?P<scale>[a-z]+):)?(?P<low>[^:]+?)\.\.(?P<high>[^:]+)\Z")


@dataclass(frozen=True)
class Range:
    """An interval, both ends included. `scale`: "uniform", "log" (uniform in the logarithm), "int", "logint"."""

    scale: str
    low: float
    high: float

    def draw(self, rng: random.Random) -> Value:
        """A value from it."""
        if self.scale == "int":
            return rng.randint(int(self.low), int(self.high))
        if self.scale == "uniform":
            return self._within(rng.uniform(self.low, self.high))
        if self.scale == "log":
            return self._within(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        # Each whole number owns the interval of half a unit around it, so that both ends have their share.
        return round(self._within(math.exp(rng.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5)))))

    def _within(self, value: float) -> float:
        """Five digits of it: a person will type it again. Rounding must not lead out of the interval."""
        return min(max(float(f"{value:.5g}"), self.low), self.high)

    def __str__(self) -> str:
        whole = self.scale in ("int", "logint")
        low, high = (str(int(end)) if whole else repr(float(end)) for end in (self.low, self.high))
        return f"{self.scale}:{low}..{high}"


@dataclass(frozen=True)
class Choices:
    """One of several values."""

    values: tuple[Value, ...]

    def draw(self, rng: random.Random) -> Value:
        """One of them, each as likely."""
        return rng.choice(self.values)

    def __str__(self) -> str:
        return ",".join(value if isinstance(value, str) else json.dumps(value) for value in self.values)


@dataclass(frozen=True)
class Space:
    """`grid`: every combination is tried. `drawn`: so many draws as are asked for, each at every point of the grid."""

    grid: Mapping[str, Choices] = field(default_factory=dict)
    drawn: Mapping[str, Range | Choices] = field(default_factory=dict)

    def points(self, trials: int | None, seed: int) -> list[dict[str, Value]]:
        """The hyper-parameters of every trial, in the order in which they are begun. No point comes twice.

        `trials`: how many draws; ConfigError when it is missing or of no use, or when there would be too many trials.
        """
        if self.drawn and trials is None:
            raise ConfigError("--random needs --trials K: how many draws")
        if not self.drawn and trials is not None:
            raise ConfigError("--trials is how many draws of --random are tried: a grid has its own number")
        if trials is not None and trials < 1:
            raise ConfigError(f"--trials {trials} is not positive")
        corners = math.prod(len(choices.values) for choices in self.grid.values())
        if corners * (trials or 1) > TRIALS_MAX:
            raise ConfigError(f"that would be {corners * (trials or 1)} trials: {TRIALS_MAX} is the most")
        corner_points = [
            dict(zip(self.grid, values, strict=True))
            for values in itertools.product(*(choices.values for choices in self.grid.values()))
        ]
        rng = random.Random(f"smlt sweep {seed}")
        draws = [{name: one.draw(rng) for name, one in self.drawn.items()} for _ in range(trials or 1)]
        points = [{**corner, **draw} for draw in draws for corner in corner_points]
        return list({json.dumps(point): point for point in points}.values())

    def as_json(self) -> dict[str, dict[str, str | list[Value]]]:
        """What `from_json` reads, and a --space file holds."""

        def written(one: Range | Choices) -> str | list[Value]:
            return str(one) if isinstance(one, Range) else list(one.values)

        return {
            "grid": {name: written(choices) for name, choices in self.grid.items()},
            "random": {name: written(one) for name, one in self.drawn.items()},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any], where: str) -> Space:
        """A space from {"grid": {name: [value, ...]}, "random": {name: [value, ...] or "log:1e-4..1e-1"}}.

        ConfigError, which names `where`, for anything else.
        """
        unknown = sorted(set(found) - {"grid", "random"})
        if unknown:
            raise ConfigError(f"{where}: {', '.join(unknown)}: it may hold [grid] and [random], and nothing else")
        grid, drawn = dict[str, Range | Choices](), dict[str, Range | Choices]()
        for kind, into in (("grid", grid), ("random", drawn)):
            table = found.get(kind, {})
            if not isinstance(table, Mapping):
                raise ConfigError(f"{where}: {kind} must be a table of names and values")
            into |= {name: _from_file(name, value, f"{where}, {kind}") for name, value in table.items()}
        return _checked(grid, drawn, where)


def parse_space(grid: Sequence[str], drawn: Sequence[str], file: Path | None = None) -> Space:
    """The space of `--grid NAME=a,b,c`, `--random NAME=log:1e-4..1e-1` and `--space FILE` together.

    ConfigError for what cannot be read, a name that comes twice, and a space that holds nothing.
    """
    found = Space() if file is None else Space.from_json(_read(file), str(file))
    grids, draws = dict[str, Range | Choices](found.grid), dict(found.drawn)
    for option, texts, into in (("--grid", grid, grids), ("--random", drawn, draws)):
        for text in texts:
            name, value = parse_assignment(text, option)
            if name in grids or name in draws:
                raise ConfigError(f"{option} {text}: {name} is given twice")
            into[name] = _parse(name, value, option)
    if not grids and not draws:
        raise ConfigError("nothing to try: give --grid NAME=a,b,c, --random NAME=log:1e-4..1e-1 or --space FILE")
    return _checked(grids, draws, "--grid")


def _checked(grid: Mapping[str, Range | Choices], drawn: Mapping[str, Range | Choices], where: str) -> Space:
    twice = sorted(set(grid) & set(drawn))
    if twice:
        raise ConfigError(f"{where}: {', '.join(twice)} cannot be both on the grid and drawn")
    corners: dict[str, Choices] = {}
    for name, one in grid.items():
        if isinstance(one, Range):
            raise ConfigError(f"{where}: {name}={one}: a grid needs its values, a,b,c; an interval is for --random")
        corners[name] = one
    return Space(corners, dict(drawn))


def _parse(name: str, text: str, where: str) -> Range | Choices:
    """`a,b,c`, or `a..b` with or without a scale before it."""
    found = _RANGE.match(text) if "," not in text else None
    if found is not None:
        return _range(found["scale"] or "uniform", found["low"], found["high"], f"{where} {name}={text}")
    return _choices([parse_value(value) for value in text.split(",")], f"{where} {name}={text}")


def _from_file(name: str, value: Any, where: str) -> Range | Choices:
    if isinstance(value, str) and _RANGE.match(value):
        return _parse(name, value, where)
    if isinstance(value, list):
        return _choices(value, f"{where}: {name}")
    raise ConfigError(f'{where}: {name} = {value!r}: write a list of values, or an interval such as "log:1e-4..1e-1"')


def _choices(values: Sequence[Any], where: str) -> Choices:
    if not values or "" in values:
        raise ConfigError(f"{where}: a value is missing")
    for value in values:
        if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"{where}: {value!r} is no number, text, true or false")
    if len({json.dumps(value) for value in values}) < len(values):
        raise ConfigError(f"{where}: a value comes twice")
    return Choices(tuple(values))


def _range(scale: str, low: str, high: str, where: str) -> Range:
    if scale not in _SCALES:
        raise ConfigError(f"{where}: {scale!r}: choose one of {', '.join(_SCALES)}")
    try:
        ends = float(low), float(high)
    except ValueError:
        raise ConfigError(f"{where}: the ends of an interval must be numbers, as in log:1e-4..1e-1") from None
    if not all(map(math.isfinite, ends)) or ends[0] >= ends[1]:
        raise ConfigError(f"{where}: the interval must begin below its end")
    if scale in ("int", "logint") and not all(end.is_integer() for end in ends):
        raise ConfigError(f"{where}: the ends must be whole numbers")
    if scale in ("log", "logint") and ends[0] <= 0:
        raise ConfigError(f"{where}: on a logarithmic scale the interval must be above 0")
    return Range(scale, *ends)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
        found = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--space {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--space {file}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--space {file}: it must hold an object with grid and random")
    return found
