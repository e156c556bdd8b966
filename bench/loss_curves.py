"""Loss curves of the digits example with 1, 2 and 4 workers beside a plain PyTorch loop without SMLT.

    python -m bench.loss_curves [--epochs 25] [--json]

Same seed, same global batches. Prints, for each codec and number of workers, the largest relative difference of a step's
loss from the plain loop's, over all steps; and whether two runs of the same job gave identical bits. The bars: 1e-5 with
fp32, 1e-3 with fp16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "digits.py"


def plain_loop(epochs: int, batch_size: int, seed: int) -> list[float]:
    """The same training in PyTorch alone, one process. It shares nothing with SMLT but the order of the samples."""
    import importlib.util

    import torch

    from smlt.worker.data import DataIterator

    spec = importlib.util.spec_from_file_location("digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = module.Digits()
    x, y = task.data()["train"]
    order = DataIterator(len(x), lambda epoch: batch_size, seed, 0, 1)
    torch.manual_seed(seed)
    model = task.model()
    optimizer = task.optimizer(model)
    losses = []
    for epoch in range(epochs):
        for step in range(order.steps_in(epoch)):
            indices = torch.from_numpy(order.global_indices(epoch, step))
            optimizer.zero_grad()
            loss = task.loss(model, (x[indices], y[indices]))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def smlt_run(workers: int, codec: str, epochs: int, batch_size: int, seed: int, folder: str) -> tuple[list[float], float, str]:
    """A run of `smlt train`: losses by step, final accuracy, SHA-256 of the final model and optimizer."""
    command = [sys.executable, "-m", "smlt", "train", str(SCRIPT), "--workers", str(workers), "--epochs", str(epochs)]
    command += ["--global-batch-size", str(batch_size), "--seed", str(seed), "--codec", codec, "--runs-dir", folder, "--json"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    final = sorted(Path(events[0]["folder"]).glob("checkpoints/*/tensors.safetensors"))[-1]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    return losses, events[-1]["metrics"]["accuracy"], sha256(final.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    setting = (options.epochs, options.global_batch_size, options.seed)
    plain = plain_loop(*setting)
    rows = []
    for codec in ("fp32", "fp16"):
        for workers in (1, 2, 4):
            with tempfile.TemporaryDirectory() as folder:
                losses, accuracy, digest = smlt_run(workers, codec, *setting, folder)
                again = smlt_run(workers, codec, *setting, folder) if workers == 4 else (losses, accuracy, digest)
            assert len(losses) == len(plain)
            difference = max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True))
            rows.append(
                {
                    "codec": codec,
                    "workers": workers,
                    "largest_relative_difference": difference,
                    "accuracy": accuracy,
                    "two_runs_identical": (losses, digest) == (again[0], again[2]) if workers == 4 else None,
                }
            )
            if not options.json:
                same = "" if workers != 4 else f", two runs identical to the bit: {rows[-1]['two_runs_identical']}"
                print(
                    f"{codec}, {workers} workers: largest relative difference {difference:.2e}, accuracy {accuracy:.4f}{same}",
                    flush=True,
                )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
