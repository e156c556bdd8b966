"""Workers on other machines: which stores they can be given, whether they reach them, and who may read a password."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smlt._version import __version__
from smlt.client.lambda_runs import through
from smlt.errors import ConfigError, SmltError
from smlt.store.parameter import redact
from smlt.store.secrets import resolve_store_url

if TYPE_CHECKING:
    from smlt.client.executors import RunContext
    from smlt.client.request import RunRequest


def place_elsewhere(request: RunRequest, store: str | None, where: str) -> tuple[RunRequest, str | None]:
    """The request with the store as workers are given it, and the store as this machine reaches it.

    `where` names the place in a message: "Lithops on gcp_cloudrun". ConfigError for a store or an object store that workers
    on other machines cannot reach, and for a password, which would be written where the engine keeps its calls.
    """
    reference = store or request.store
    if reference is None:
        raise ConfigError(f"{where}: workers there cannot reach this machine's embedded store: give --store")
    if "unix://" in reference:  # one of several nodes, or the only one
        raise ConfigError(f"store {redact(reference)}: {where} reaches a store over the network only: redis:// or rediss://")
    if "@" in reference or "password=" in reference:
        raise ConfigError(
            f"store {redact(reference)}: {where} is not given a password, it would be written down there: leave it to "
            "?password_secret=, ?password_env= or ?password_file=, which workers look up where they run"
        )
    if request.object_store is None:
        raise ConfigError(
            f"{where}: workers there do not have this machine's runs folder: give --object-store s3://bucket/prefix, or a "
            "directory that all machines have"
        )
    reached = through(reference, request.store_tunnel) if request.store_tunnel is not None else reference
    return replace(request, store=reference), resolve_store_url(reached)


def check_reach(
    call: Callable[[Callable[..., Any], dict[str, str]], Mapping[str, Any]], where: str, context: RunContext
) -> None:
    """Have one `call` look for the stores at `where` itself. ConfigError when no worker can work there."""
    from smlt.worker.handler import probe

    found = call(probe, {"store_url": context.store_url, "object_store_url": context.object_store_url})
    if found["smlt"] != __version__:
        raise ConfigError(f"{where} has smlt {found['smlt']}, not {__version__}: install the same there")
    if found["store"]:
        raise ConfigError(f"{where} cannot use the store; it says: {found['store']}")
    if found["objects"]:
        raise ConfigError(f"{where} cannot use {context.object_store_url}; it says: {found['objects']}")


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """An engine's own errors as ConfigErrors, behind `what` could not be done."""
    try:
        yield
    except SmltError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {type(error).__name__}: {error}") from error


@contextmanager
def private_url(url: str) -> Iterator[str]:
    """A secret URL that leads workers on this machine to `url`, password and all, by a file that only this user can read.

    Engines write down what they are called with where others may read it.
    """
    folder = Path(tempfile.mkdtemp(prefix="smlt-store-"))
    try:
        file = folder / "url"
        file.touch(0o600)
        file.write_text(url)
        yield file.as_uri()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def number(options: Mapping[str, str], key: str, default: float) -> float:
    """The option as a number, at least 0. ConfigError when it is none."""
    try:
        value = float(options.get(key, default))
        if not 0 <= value < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--on-option {key}={options[key]}: give a number, not below 0") from None
    return value


def is_installed(module: str) -> bool:
    """Whether a package is here, without importing it."""
    return find_spec(module) is not None


@contextmanager
def logged_to(path: Path, name: str) -> Iterator[None]:
    """Let the logger `name` write to a file: stdout and stderr are the run's own."""
    logger, handler = logging.getLogger(name), logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level, before = logger.level, (logger.propagate, logger.handlers)
    logger.propagate, logger.handlers = False, [handler]
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.propagate, logger.handlers = before
        logger.setLevel(level)
        handler.close()
