"""Try what is to be released as whoever installs it: in empty environments, from the files alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from contents import names_of
from wheels import Refused

#: Three processes average through the embedded store; a script as any user's.
HANDLER = """
import importlib.resources, smlt
smlt.init()
assert smlt.allreduce(smlt.rank(), op="sum") == 3
assert importlib.resources.files("smlt").joinpath("py.typed").is_file()
"""
#: The extras that bring no framework along: pip finds versions of everything that fit together. `--dry-run` installs nothing.
EXTRAS = ("aws", "lambda-local", "optimize", "prometheus", "report", "train", "worker")


def run(sdist: Path, wheels: list[Path]) -> None:
    """Install this machine's wheel, and one built from the source distribution; Refused when one does not work."""
    with tempfile.TemporaryDirectory(prefix="smlt-trial-") as scratch:
        own = [wheel for wheel in wheels if platform.machine() in wheel.name and sys.platform == "linux"]
        for wheel in own:
            python = works(wheel, Path(scratch) / "wheel")
            said(python, "-m", "pip", "install", "-q", "--dry-run", *(f"{wheel}[{extra}]" for extra in EXTRAS))
        built = Path(scratch) / "built"
        said(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, sdist)
        (again,) = built.glob("*.whl")
        works(again, Path(scratch) / "sdist")
        for wheel in wheels:
            if names_of(wheel) != names_of(again):
                differ = sorted(names_of(wheel) ^ names_of(again))
                raise Refused(f"{wheel.name} and a wheel of {sdist.name} differ in {', '.join(differ)}")


def works(wheel: Path, folder: Path) -> Path:
    """Install a wheel in an environment of its own and let three processes average; returns its Python."""
    said(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    said(python, "-m", "pip", "install", "-q", f"{wheel}[train]")
    script = folder / "average.py"
    script.write_text(HANDLER)
    said(folder / "bin/smlt", "doctor", cwd=folder)
    said(folder / "bin/smlt", "launch", "-n", "3", script, cwd=folder)
    shown = said(folder / "bin/smlt", "--version", cwd=folder)
    if shown.split()[1] != wheel.name.split("-")[1]:
        raise Refused(f"{wheel.name} says that it is {shown.strip()}")
    return python


def said(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command as outside of this checkout; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("SMLT_")}
    ran = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise Refused(f"{' '.join(map(str, command))} ended with {ran.returncode}:\n{(ran.stdout + ran.stderr)[-4000:]}")
    return ran.stdout
