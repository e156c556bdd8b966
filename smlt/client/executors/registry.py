"""Which executors there are: entry points of the group `smlt.executors`, this package's own and those of others."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

import smlt
from smlt.client.executors import Executor
from smlt.errors import ConfigError

GROUP = "smlt.executors"
#: As pyproject.toml registers them: a source tree that nobody has installed has no entry points.
BUILT_IN = {
    "local": "smlt.client.executors.local:LocalExecutor",
    "lambda": "smlt.client.executors.aws_lambda:LambdaExecutor",
    "lithops": "smlt.client.executors.lithops:LithopsExecutor",
    "ray": "smlt.client.executors.ray:RayExecutor",
}


@dataclass(frozen=True)
class Registered:
    """An executor's name, where its class is ("module:class"), and which package it is from, with its version."""

    name: str
    where: str
    package: str

    def load(self) -> type[Executor]:
        """Its class. ConfigError when that cannot be had."""
        module, _, name = self.where.partition(":")
        try:
            found: type[Executor] = getattr(importlib.import_module(module), name)
        except Exception as error:  # the package's own code runs here
            raise ConfigError(
                f"executor {self.name} of {self.package} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        if not (isinstance(found, type) and callable(getattr(found, "open", None)) and callable(getattr(found, "start", None))):
            raise ConfigError(f"executor {self.name} of {self.package}: {self.where} is no smlt.client.executors.Executor")
        return found


def installed() -> dict[str, Registered]:
    """All executors by name, this package's own first. Two of one name, of other packages, are one that cannot be loaded."""
    found = {name: Registered(name, where, f"smlt {smlt.__version__}") for name, where in BUILT_IN.items()}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "a package without a name"
        before = found.get(point.name)
        if before is None:
            found[point.name] = Registered(point.name, point.value, package)
        elif point.name not in BUILT_IN and (before.where, before.package) != (point.value, package):
            found[point.name] = Registered(point.name, before.where, f"{before.package} and {package}")
    return found


def find(name: str) -> type[Executor]:
    """The class of the executor `name`. ConfigError, with those that there are, when it is not one."""
    known = installed()
    if name not in known:
        raise ConfigError(f"--on {name!r}: choose one of {', '.join(known)} (`smlt executors` says what they are)")
    if " and " in known[name].package:
        raise ConfigError(f"--on {name}: {known[name].package} both have an executor of that name: uninstall one")
    return known[name].load()


def check_executor(name: str, options: Mapping[str, str]) -> None:
    """ConfigError when there is no executor `name`, it cannot be used here, or it has not these options."""
    executor = find(name)
    if lack := executor.lacks():
        raise ConfigError(f"--on {name}: {lack}")
    for key in options:
        if key not in executor.options:
            known = ", ".join(executor.options) or "none"
            raise ConfigError(f"--on-option {key}: --on {name} has no such option; those it has: {known}")


def parse_options(given: Sequence[str]) -> dict[str, str]:
    """What --on-option has said, "key=value" each. ConfigError for what is not, and for a key that comes twice."""
    found: dict[str, str] = {}
    for text in given:
        key, mark, value = text.partition("=")
        if not (key and mark):
            raise ConfigError(f"--on-option {text!r}: give KEY=VALUE")
        if key in found:
            raise ConfigError(f"--on-option {key}: given twice")
        found[key] = value
    return found
