"""`smlt launch`: a script of torch.distributed whose backend's name is all that is SMLT's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment, keys_left

from smlt.store.embedded import EmbeddedStore

SCRIPT = """
import sys, torch, torch.distributed as dist
import smlt.torch
dist.init_process_group("smlt")
dist.all_reduce(x := torch.ones(100_000))
print("sum", int(x[0]))
sys.exit(int(sys.argv[1]) if dist.get_rank() == 1 else 0)
"""


@pytest.mark.parametrize("code", [0, 3])
def test_its_processes_find_each_other_and_leave_nothing(store: EmbeddedStore, tmp_path: Path, code: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "smlt", "launch", "--workers", "2", "--store", store.url, str(script), str(code)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment())
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.count("sum 2") == 2
    assert keys_left(store, "launch-") == []
