"""`--with PACKAGE`: packages from binary wheels for the function's machine, without what the layer already holds."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from smlt.client.wheels import Target
from smlt.errors import DeployError

#: What says where and how it was installed: it differs between machines, and no function reads it.
_TRACES = ("INSTALLER", "REQUESTED", "direct_url.json")


def install_extras(packages: Sequence[str], arch: str, python: str, layer: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Install the packages and what they need below `folder`; returns the files by their names in the zip.

    `layer`: distributions that the layer holds, with their versions: they are taken as they are, and not packed again.
    DeployError with pip's reason when there is no wheel that fits, or no version that gets along with the layer.
    """
    target, constraints = folder / "extras", folder / "layer.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in sorted(layer.items())))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-compile"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", f"--target={target}"]
    command += [f"--platform={platform}" for platform in Target(arch, python).platforms]
    done = subprocess.run([*command, "--constraint", constraints, "--", *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(f"--with {' '.join(packages)}: {_reason(done.stderr, bool(layer))}")
    for info in sorted(target.glob("*.dist-info")):
        name = re.sub(r"[-_.]+", "-", info.name.removesuffix(".dist-info").rpartition("-")[0]).lower()
        _drop(target, info, everything=name in layer)
    return {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}


def _reason(told: str, has_layer: bool) -> str:
    lines = [line.removeprefix("ERROR: ") for line in told.splitlines() if line.startswith("ERROR: ")]
    if "No module named pip" in told:
        return f"this Python has no pip: {sys.executable} -m ensurepip"
    beside = " beside the layer's packages" if has_layer else ""
    return f"pip cannot install it{beside}: {lines[0] if lines else 'see pip download'}"


def _drop(target: Path, info: Path, *, everything: bool) -> None:
    """Remove a distribution, or of one that stays its commands and traces; RECORD then names what is left."""
    record = info / "RECORD"
    kept = []
    for row in csv.reader(io.StringIO(record.read_text() if record.is_file() else "")):
        # --target puts commands into bin/, which RECORD still calls ../../bin/: their first line is this machine's Python.
        path = (target / row[0]).resolve()
        command = row[0].startswith("../") or not path.is_relative_to(target.resolve())
        trace = path.parent == info.resolve() and path.name in _TRACES
        if everything or trace:
            if not command:
                path.unlink(missing_ok=True)
        elif not command:
            kept.append(row)
    for script in (target / "bin").glob("*"):
        script.unlink()
    for name in _TRACES:
        (info / name).unlink(missing_ok=True)
    if everything:
        record.unlink(missing_ok=True)
    elif record.is_file():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(sorted(kept))
        record.write_text(text.getvalue())
