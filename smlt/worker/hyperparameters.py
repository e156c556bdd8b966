"""Hyper-parameters: class attributes of a task that a run may set to other values, as `smlt train --set lr=0.05` does."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from smlt.errors import ConfigError

#: What a hyper-parameter may be: what JSON knows, for it travels in configurations.
Value: TypeAlias = bool | int | float | str | None

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z", re.ASCII)
_PYTHON = {"True": True, "False": False, "None": None}


def parse_value(text: str) -> Value:
    """What a person has written: a number, true, false, null (or True, False, None), else text; in "..." it is text."""
    text = text.strip()
    if text in _PYTHON:
        return _PYTHON[text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and isinstance(value, (bool, int, float, str, type(None))) else text


def parse_assignment(text: str, option: str) -> tuple[str, str]:
    """(name, what stands behind "="). ConfigError, which names the `option`, when `text` is nothing of the kind."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not _NAME.match(name) or not value.strip():
        raise ConfigError(f"{option} {text!r}: write NAME=VALUE, the name that of a class attribute of the task")
    return name, value.strip()


def parse_assignments(texts: Iterable[str], option: str = "--set") -> dict[str, Value]:
    """The values of several `--set NAME=VALUE`. ConfigError for what is none, and for a name that comes twice."""
    values: dict[str, Value] = {}
    for text in texts:
        name, value = parse_assignment(text, option)
        if name in values:
            raise ConfigError(f"{option} gives {name} twice")
        values[name] = parse_value(value)
    return values


def set_hyperparameters(task: type, values: Mapping[str, Any]) -> None:
    """Set class attributes of `task`, before it is instantiated.

    Each must be there already: the value that it has is its default, and says of which type it is; an int will do for a float.
    ConfigError names what the task has when a name is not among it, and what fits when a value does not.
    """
    known = declared(task)
    for name, value in values.items():
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise ConfigError(
                f"class {task.__name__} has no hyper-parameter {name} ({has}): give it a class attribute, such as `{name} = 1`"
            )
        setattr(task, name, _fitting(name, value, known[name]))


def declared(task: type) -> dict[str, Any]:
    """The hyper-parameters of a task and their defaults: its public class attributes, and those of the classes above it."""
    from smlt.worker.task import Task

    found: dict[str, Any] = {}
    for cls in reversed(task.__mro__):
        if cls is not object and cls is not Task:
            found |= {name: value for name, value in vars(cls).items() if _is_plain(name, value)}
    return {name: value for name, value in found.items() if not hasattr(Task, name)}


def _is_plain(name: str, value: Any) -> bool:
    return (
        not name.startswith("_")
        and not callable(value)
        and not inspect.isdatadescriptor(value)
        and not isinstance(value, (staticmethod, classmethod))
    )


def _fitting(name: str, value: Any, default: Any) -> Any:
    """`value` as the type that `default` has."""
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(default) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(type(default))
    if kind is None:
        raise ConfigError(f"{name} is a {type(default).__name__} in the task: only numbers, text, true and false can be set")
    raise ConfigError(f"{name}={value!r}: the task has {default!r} there, so it must be {kind}")
