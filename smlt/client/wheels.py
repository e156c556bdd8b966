"""Wheels for another machine: which one fits, which are needed, what of them goes into a layer."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.parser import BytesParser
from functools import cached_property
from pathlib import Path, PurePosixPath

from smlt.client.layer_check import ARCHITECTURES, GLIBC
from smlt.errors import ConfigError, DeployError

try:
    from packaging.markers import default_environment
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.tags import Tag, compatible_tags, cpython_tags
    from packaging.utils import InvalidWheelFilename, NormalizedName, canonicalize_name, parse_wheel_filename
except ImportError as error:
    raise ConfigError("packaging is not installed: pip install 'smlt[aws]'") from error


_ROUNDS = 8
#: manylinux tags that were named before their numbers.
_LEGACY = {(2, 17): "manylinux2014", (2, 12): "manylinux2010", (2, 5): "manylinux1"}
_KEPT = re.compile(r"(^|[/._-])(licen[cs]es?|copying|notice|authors)([/._-]|$)", re.IGNORECASE)
_BUILT_AGAINST = (".pyi", ".pxd", ".pyx", ".pyc", ".h", ".hpp", ".c", ".cpp", ".a")


@dataclass(frozen=True)
class Target:
    """A Lambda runtime: `arch` is "x86_64" or "arm64", `python` "3.12"."""

    arch: str
    python: str

    @cached_property
    def platforms(self) -> list[str]:
        """The platform tags whose wheels load there, best first."""
        machine, tags = ARCHITECTURES[self.arch], []
        oldest = 5 if machine == "x86_64" else 17  # manylinux has had aarch64 since glibc 2.17
        for minor in range(GLIBC[self.python][1], oldest - 1, -1):
            tags.append(f"manylinux_2_{minor}_{machine}")
            if (2, minor) in _LEGACY:
                tags.append(f"{_LEGACY[2, minor]}_{machine}")
        return tags

    @cached_property
    def tags(self) -> list[Tag]:
        """What a wheel may be tagged with, best first."""
        version = tuple(map(int, self.python.split(".")))
        every = cpython_tags(python_version=version, platforms=self.platforms)
        return [*every, *compatible_tags(version, f"cp{version[0]}{version[1]}", self.platforms)]

    @cached_property
    def environment(self) -> dict[str, str]:
        """What the markers of requirements are compared with."""
        own = {name: str(value) for name, value in default_environment().items()}
        return own | {
            "python_version": self.python,
            "python_full_version": f"{self.python}.99",  # Lambda keeps to the last patch release
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.99",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": ARCHITECTURES[self.arch],
        }


@dataclass(frozen=True)
class Wheel:
    """A wheel file. DeployError when it is none."""

    path: Path
    name: str = field(init=False)
    version: str = field(init=False)
    tags: frozenset[Tag] = field(init=False)

    def __post_init__(self) -> None:
        try:
            name, version, _, tags = parse_wheel_filename(self.path.name)
            zipfile.ZipFile(self.path).close()
        except (InvalidWheelFilename, zipfile.BadZipFile, OSError) as error:
            raise DeployError(f"{self.path} is no wheel: {error}") from error
        for key, value in (("name", str(name)), ("version", str(version)), ("tags", tags)):
            object.__setattr__(self, key, value)

    def fit(self, target: Target) -> int | None:
        """How well it fits, 0 best; None when it cannot be used there."""
        return min((number for number, tag in enumerate(target.tags) if tag in self.tags), default=None)

    def requirements(self, target: Target, extras: Iterable[str] = ()) -> list[Requirement]:
        """What it needs on the target."""
        with zipfile.ZipFile(self.path) as file:
            (metadata,) = [one for one in file.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one)]
            lines = BytesParser().parsebytes(file.read(metadata)).get_all("Requires-Dist") or []
        asked = [Requirement(str(line)) for line in lines]
        wanted = ["", *extras]
        return [
            one
            for one in asked
            if one.marker is None or any(one.marker.evaluate({**target.environment, "extra": extra}) for extra in wanted)
        ]

    def contents(self) -> dict[str, zipfile.ZipInfo]:
        """What of it a function needs, by the path below site-packages.

        Left out: programs, and what is for tests, type checkers and compilers. Licences always stay.
        """
        kept = {}
        with zipfile.ZipFile(self.path) as file:
            for entry in file.infolist():
                place = _place(entry.filename)
                if place is not None and not entry.is_dir():
                    kept[place] = entry
        return kept


def _place(name: str) -> str | None:
    """Where a wheel's file lies below site-packages, None when a function has no use for it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DeployError(f"a wheel holds the file name {name!r}, which leads out of it")
    parts = path.parts
    if parts[0].endswith(".data"):
        if len(parts) < 3 or parts[1] not in ("purelib", "platlib"):
            return None
        parts = parts[2:]
    place = "/".join(parts)
    if parts[0].endswith(".dist-info"):
        return place if len(parts) > 2 or parts[-1] != "RECORD" else None
    if _KEPT.search(parts[-1]) and not place.endswith((".py", ".so")):
        return place
    # Not all in a folder of tests is one: numpy.testing imports numpy._core.tests._natype.
    if "tests" in parts[1:-1] and (not place.endswith(".py") or parts[-1].startswith(("test_", "conftest."))):
        return None
    if "__pycache__" in parts or place.endswith(_BUILT_AGAINST):
        return None
    return place


def parsed(requirement: str) -> Requirement:
    """ConfigError when it is no requirement such as "scikit-learn>=1.3"."""
    try:
        return Requirement(requirement)
    except InvalidRequirement as error:
        raise ConfigError(f"--with {requirement!r} is no package: {str(error).splitlines()[0]}") from error


def collect(target: Target, roots: list[Requirement], folder: Path, links: Path | None = None) -> list[Wheel]:
    """The wheels of `roots` and all that they need on the target, from pip's index (and the folder `links`), by name.

    pip chooses versions, but evaluates markers such as `python_version < "3.12"` for the Python that it runs on. So what it
    brings is compared with what the target needs: what is missing is asked for too, what is not needed is left out.
    `folder` is one to work in. DeployError when pip finds no wheel that fits, or there is no pip.
    """
    asked = {canonicalize_name(root.name): root for root in roots}
    for number in range(_ROUNDS):
        into = folder / f"round-{number}"
        _download(target, [*asked.values()], into, links)
        wheels = {canonicalize_name(one.name): one for one in map(Wheel, sorted(into.glob("*.whl")))}
        needed, missing = _closure(target, roots, wheels)
        if not missing:
            return [wheels[name] for name in sorted(needed)]
        asked |= missing
    raise DeployError(f"pip does not bring {', '.join(map(str, missing.values()))}, asked for again and again")


def _closure(
    target: Target, roots: list[Requirement], wheels: Mapping[NormalizedName, Wheel]
) -> tuple[set[NormalizedName], dict[NormalizedName, Requirement]]:
    """(names that the roots lead to, requirements on the way for which there is no wheel)."""
    needed: set[NormalizedName] = set()
    missing: dict[NormalizedName, Requirement] = {}
    seen: set[tuple[NormalizedName, frozenset[str]]] = set()
    queue = list(roots)
    while queue:
        one = queue.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name not in wheels:
            one.marker = None  # it holds there; pip would look whether it holds here
            missing[name] = one
            continue
        needed.add(name)
        queue += wheels[name].requirements(target, extras)
    return needed, missing


def _download(target: Target, requirements: list[Requirement], into: Path, links: Path | None) -> None:
    """`pip download`; not `pip install --target`, which chooses releases by the Python that it runs on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--only-binary=:all:", "--implementation=cp", f"--python-version={target.python}"]
    command += [f"--platform={platform}" for platform in target.platforms]
    command += [] if links is None else [f"--find-links={links.resolve()}"]
    done = subprocess.run([*command, "--dest", str(into), *map(str, requirements)], capture_output=True, text=True)
    if done.returncode:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        if "No module named pip" in done.stderr:
            raise DeployError(f"{sys.executable} has no pip, which fetches the wheels: {sys.executable} -m ensurepip")
        said = errors[-1] if errors else (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeployError(
            f"pip finds no wheels for Lambda's python{target.python} on {target.arch}: {said}. "
            "A package without a wheel for Linux cannot go into a layer: smlt layer dockerfile"
        )
