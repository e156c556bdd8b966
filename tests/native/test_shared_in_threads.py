"""The memory that a machine's workers share, without Python, under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

CC = (sysconfig.get_config_var("CC") or "cc").split()[0]
CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [*sorted(CSRC.glob("shared*.c")), CSRC / "codec_feedback.c", CSRC / "codec_raw.c"]


@pytest.mark.skipif(shutil.which(CC) is None, reason=f"no compiler {CC}")
def test_no_worker_reads_what_another_is_writing(tmp_path: Path) -> None:
    program = tmp_path / "threads"
    flags = ["-g", "-O1", "-std=gnu11", "-ffp-contract=off", f"-I{CSRC}", "-fsanitize=thread"]
    command = [CC, *flags, Path(__file__).with_name("shared_in_threads.c"), *SOURCES, "-lm", "-lpthread", "-o", program]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{CC} has no ThreadSanitizer here")
    ran = subprocess.run([program], capture_output=True, text=True, timeout=100)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert (ran.returncode, ran.stderr) == (0, "")
