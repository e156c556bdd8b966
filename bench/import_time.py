"""How long `import smlt` takes beyond NumPy and redis-py.

    python -m bench.import_time [--rounds 15]

Fresh interpreters, interleaved; also with every public name of the collective touched. The bar: 30 ms beyond.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

CASES = {
    "numpy, redis": "import numpy, redis",
    "numpy, redis, smlt": "import numpy, redis, smlt",
    "numpy, redis, smlt.allreduce": "import numpy, redis, smlt; smlt.allreduce",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(options.rounds):
        for name, code in CASES.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["numpy, redis"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:30} {median * 1e3:6.1f} ms  (+{(median - base) * 1e3:.1f} ms)")


if __name__ == "__main__":
    main()
