"""Workers started by torchrun, or by hand with its variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import example_cases as cases
import torch
from ddp_pair import Pair
from test_ddp import assert_alike

from smlt.store.embedded import EmbeddedStore

DEADLINE_S = 100
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]

#: A worker as it would be on a machine that cannot be reached: it looks for sockets of its own that listen.
BY_HAND = """
import os, re
import torch, torch.distributed as dist
import smlt.torch

for run in ("first", "second"):  # as a warm sandbox is invoked again
    url = os.environ["SMLT_STORE"]
    dist.init_process_group("smlt", init_method=f"{url}{'&' if '?' in url else '?'}job={run}")
    total = torch.ones(3)
    dist.all_reduce(total)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
    model(torch.ones(1, 4)).sum().backward()
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, f"rank {dist.get_rank()}")
    if run == "first":
        dist.destroy_process_group()

own = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
listening = 0
for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
    for line in open(table).readlines()[1:]:
        fields = line.split()
        listening += fields[3] == "0A" and f"socket:[{fields[9]}]" in own
dist.destroy_process_group()
print(total.tolist(), gathered, f"{listening} sockets listen")
"""


def environment(store: EmbeddedStore, **more: str) -> dict[str, str]:
    return {**os.environ, "SMLT_STORE": store.url, "OMP_NUM_THREADS": "1", **more}


def test_the_tutorials_script_under_torchrun_trains_what_gloo_trains(pair: Pair, store: EmbeddedStore, tmp_path: Path) -> None:
    """Nothing but the backend's name differs; the rendezvous is torchrun's."""
    command = [*TORCHRUN, str(cases.EXAMPLES / "ddp.py"), "--epochs", "2", "--save-every", "2"]
    process = subprocess.Popen(
        [*command, "--backend", "smlt", "--save", str(tmp_path / "smlt.pt")],
        env=environment(store),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with_gloo = pair.run("gloo", cases.ddp, str(tmp_path / "gloo.pt"))
    with_smlt = pair.run("smlt", cases.ddp, str(tmp_path / "too.pt"))
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert "backend smlt" in output
    assert_alike(with_gloo, with_smlt)
    under_torchrun = torch.load(tmp_path / "smlt.pt")
    assert_alike(with_gloo[0]["trained"]["model"], {name: value.numpy() for name, value in under_torchrun["model"].items()})
    assert_alike(with_gloo[0]["trained"]["losses"], under_torchrun["losses"])
    assert len(under_torchrun["losses"]) == 2 * 29


@pytest.mark.skipif(sys.platform != "linux", reason="looks for sockets in /proc")
def test_workers_with_torchruns_variables_meet_in_the_store_and_none_listens(store: EmbeddedStore) -> None:
    processes = []
    for rank in range(2):
        variables = environment(store, RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2")
        variables = {name: value for name, value in variables.items() if not name.startswith("MASTER_")}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", BY_HAND], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for process in processes:
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, output
        assert "[2.0, 2.0, 2.0] ['rank 0', 'rank 1'] 0 sockets listen" in output
