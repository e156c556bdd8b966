"""`smlt launch`: the drop-in in somebody's own script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from smlt.store.embedded import EmbeddedStore

EXAMPLES = Path(__file__).parents[2] / "examples"


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smlt", "launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_example_averages_over_its_processes() -> None:
    done = launch("-n", 3, EXAMPLES / "allreduce.py")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] rank {rank} of 3: mean 1.0" for rank in range(3)]


def test_arguments_reach_the_script_and_no_key_is_left(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import sys, smlt\nsmlt.init()\nprint(sys.argv[1:], smlt.allgather(smlt.rank()).tolist())\n")
    with EmbeddedStore() as store:
        done = launch("-n", 2, "--store", store.url, script, "--epochs", "3", "-n")
        assert list(redis.Redis.from_url(store.url).scan_iter()) == []
    assert "[1] ['--epochs', '3', '-n'] [0, 1]" in done.stdout.splitlines()


def test_the_first_failure_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import sys, smlt\nsmlt.init()\nif smlt.rank() == 1:\n    sys.exit(7)\nsmlt.barrier()\nsmlt.barrier()\n")
    with EmbeddedStore() as store:
        assert launch("-n", 3, "--store", store.url, script).returncode == 7
        assert list(redis.Redis.from_url(store.url).scan_iter()) == []


def test_in_shared_memory_there_is_no_store_and_the_first_failure_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text(
        "import os, sys, smlt\nsmlt.init()\n"
        "print(smlt.allgather(smlt.rank()).tolist(), 'SMLT_STORE' in os.environ, flush=True)\n"
        "if smlt.rank() == 1:\n    sys.exit(7)\nsmlt.barrier()\nsmlt.barrier()\n"
    )
    done = launch("-n", 3, "--two-level", script)
    assert done.returncode == 7
    assert {f"[{rank}] [0, 1, 2] False" for rank in range(3)} <= set(done.stdout.splitlines())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ending_it_ends_its_processes(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "s.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "smlt", "launch", "-n", "2", str(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    process.send_signal(how)
    assert process.wait(20) in (130, 143)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_its_processes_end_when_it_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "smlt", "launch", "-n", "2", str(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_missing_script() -> None:
    failed = launch("none.py")
    assert (failed.returncode, failed.stderr) == (5, "smlt: there is no script none.py\n")
