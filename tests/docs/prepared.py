"""A folder in which the documents' blocks find what they take for granted: examples, a task, data, runs of the past."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from commandline import REPOSITORY, TASK
from documented import Block, blocks, written_files

#: Names that documents give to a run that there is.
RUNS = ("RUN", "20260102-153000-digits")
LIMIT_S = 100


def prepare(folder: Path, page: str, wanted: list[Block]) -> dict[str, str]:
    """Fill the folder with what a page's blocks need; returns the environment to run them in."""
    shutil.copytree(REPOSITORY / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("task.py", "train.py", "script.py"):
        (folder / name).write_text(TASK)
    (folder / "images").mkdir()
    np.savez(folder / "images" / "test.npz", x=np.zeros((4, 3), "f4"), y=np.zeros(4, "i8"))
    for name, text in written_files(page).items():
        (folder / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SMLT_", "AWS_"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(folder / "examples"), str(folder)]),
        "BROWSER": "true",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
    }
    text = "\n".join(block.text for block in wanted)
    for name in RUNS:
        if name in text:
            shell(f"smlt train task.py --workers 1 --epochs 2 --name {name}", folder, environment)
    return environment


def shell(line: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command line as the reader of a page would; it must end well."""
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{line}\nended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def of_page(page: str, *languages: str) -> list[Block]:
    """A page's blocks of these languages that are run."""
    return [block for block in blocks(page) if block.language in languages and block.runs]
