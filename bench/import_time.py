"""How long `import smlt` takes beyond NumPy and redis-py.

    python -m bench.import_time [--rounds 15]

Fresh interpreters with `-X importtime`: the time of every module that NumPy and redis-py have not imported already,
median of the rounds; also with the collective touched. The bar: 30 ms.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

BASE = "import numpy, redis, redis.connection"
CASES = {"import smlt": "import smlt", "import smlt; smlt.allreduce": "import smlt; smlt.allreduce"}


def module_times(code: str) -> dict[str, int]:
    """Microseconds of each module's own import, by name."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line]
    return {name.strip(): int(own) for own, _, name in rows if own.strip().isdigit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    base = set(module_times(BASE))
    for name, code in CASES.items():
        totals = []
        for _ in range(options.rounds):
            times = module_times(f"{BASE}; {code}")
            totals.append(sum(own for module, own in times.items() if module not in base) / 1e3)
        print(f"{name:28} {statistics.median(totals):5.1f} ms beyond numpy and redis-py")


if __name__ == "__main__":
    main()
