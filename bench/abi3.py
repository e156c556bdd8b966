"""What the stable ABI costs: the extension built for every Python from 3.11 on against the one for this Python alone.

    python -m bench.abi3 [--workers 4] [--floats 1000] [--rounds 3000]

Both are built from this checkout by the same compiler. n worker processes of each kind hold a communicator of their own on
one store; the kinds take turns, a burst of 20 all-reduces each, which comes first alternates. Printed: medians of rank
0's microseconds, the median of the ratios of neighbouring bursts, and milliseconds of `import smlt.collective._native`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.burst_worker import BurstWorker
from smlt.store.embedded import EmbeddedStore

ROOT = Path(__file__).parents[1]
WARM_UP = 50

#: What the extension itself takes to be imported: NumPy is there already.
IMPORT = "import time, numpy, smlt; b = time.perf_counter(); import smlt.collective._native; print(time.perf_counter() - b)"
BURST = 20


def build(abi3: bool, into: Path) -> Path:
    """A folder that holds the package with its extension built one way."""
    shutil.copytree(
        ROOT / "smlt", into / "smlt", ignore=shutil.ignore_patterns("__pycache__", "*.so", "_native.c", "_shared.c")
    )
    shutil.copytree(ROOT / "csrc", into / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, into)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=into, check=True, env={**os.environ, "SMLT_ABI3": str(int(abi3))}, stdout=subprocess.DEVNULL)
    return into


class Workers:
    """The workers of one kind."""

    def __init__(self, package: Path, n: int, floats: int, url: str) -> None:
        self.workers = [BurstWorker(package, rank, n, floats, url, package.name) for rank in range(n)]
        for worker in self.workers:
            worker.ready()

    def allreduce(self, times: int) -> list[float]:
        """Rank 0's seconds of each."""
        for worker in self.workers:
            worker.start(times)
        rows = [worker.seconds() for worker in self.workers]
        return rows[0]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def import_ms(package: Path) -> float:
    """One import in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        check=True,
    )
    return float(done.stdout) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--floats", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, EmbeddedStore() as store:
        packages = {name: build(name == "abi3", Path(scratch, name)) for name in ("this", "abi3")}
        workers = {name: Workers(at, options.workers, options.floats, store.url) for name, at in packages.items()}
        seconds: dict[str, list[float]] = {"this": [], "abi3": []}
        for one in workers.values():
            one.allreduce(WARM_UP)
        for number in range(max(1, options.rounds // BURST)):
            for name in ("this", "abi3") if number % 2 else ("abi3", "this"):
                seconds[name] += workers[name].allreduce(BURST)
        for one in workers.values():
            one.close()
        imports: dict[str, list[float]] = {"this": [], "abi3": []}
        for number in range(30):
            for name in ("this", "abi3") if number % 2 else ("abi3", "this"):
                imports[name].append(import_ms(packages[name]))
    bursts = {
        name: [statistics.median(all_of[i : i + BURST]) for i in range(0, len(all_of), BURST)]
        for name, all_of in seconds.items()
    }
    ratios = [abi3 / this for this, abi3 in zip(bursts["this"], bursts["abi3"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    for name in seconds:
        print(
            f"{name}: {statistics.median(seconds[name]) * 1e6:8.1f} us an all-reduce of {options.floats} floats,"
            f" {statistics.median(imports[name]):5.2f} ms to import the extension"
        )
    print(f"abi3 / this: median {statistics.median(ratios):.4f} (quartiles {quartiles[0]:.4f} to {quartiles[2]:.4f})")


if __name__ == "__main__":
    main()
