"""The fuzzers' corpus, real traffic and what once went wrong, replayed under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from fuzzers import HERE, TARGETS, build

CC = (sysconfig.get_config_var("CC") or "cc").split()[0]


def can_sanitize(folder: Path) -> bool:
    program = folder / "probe"
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    command = [CC, "-fsanitize=address,undefined", str(folder / "probe.c"), "-o", str(program)]
    return (
        subprocess.run(command, capture_output=True).returncode == 0
        and subprocess.run([program], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(shutil.which(CC) is None, reason=f"no compiler {CC}")
@pytest.mark.parametrize("target", TARGETS)
def test_replay(tmp_path: Path, target: str) -> None:
    if not can_sanitize(tmp_path):
        pytest.skip(f"{CC} has no sanitizers here")
    build(CC, target, tmp_path / target, "address,undefined", HERE / "replay.c")
    inputs = sorted((HERE / "corpus" / target).iterdir())
    assert inputs
    environment = {**os.environ, "LD_PRELOAD": ""}
    ran = subprocess.run([tmp_path / target, *inputs], capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert ran.stdout == f"{len(inputs)} inputs\n"


@pytest.mark.skipif(shutil.which("valgrind") is None or shutil.which(CC) is None, reason="no valgrind, or no compiler")
@pytest.mark.parametrize("target", TARGETS)
def test_valgrind_finds_nothing(tmp_path: Path, target: str) -> None:
    """Unlike the sanitizers it sees the use of memory that was never written, and what is never freed."""
    build(CC, target, tmp_path / target, "", HERE / "replay.c")
    inputs = sorted((HERE / "corpus" / target).iterdir())
    command = [
        "valgrind",
        "--quiet",
        "--error-exitcode=9",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite",
        tmp_path / target,
    ]
    ran = subprocess.run([*command, *inputs], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert ran.stdout == f"{len(inputs)} inputs\n"
