"""Run the fuzzers, one process each, and keep what they find interesting.

    python tests/fuzz/fuzzers.py [--seconds 60] [--keep FOLDER] [engine resp shared wire]

Needs clang with libFuzzer. Inputs that crash are written to FOLDER (default: fuzz-findings) and end the run with status 1.
The corpus is made by `record.py`, that of `shared` by its fuzzer; `test_corpus.py` replays it under the sanitizers with any
compiler.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TARGETS = ("engine", "resp", "shared", "wire")
FLAGS = ["-g", "-O1", "-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off", f"-I{CSRC}", "-fno-sanitize-recover=all"]


def sources(target: str) -> list[Path]:
    """All of csrc that does no I/O, and has to do with the target."""
    shared = set(CSRC.glob("shared*.c"))
    if target == "shared":
        return sorted(shared | {CSRC / "codec_feedback.c", CSRC / "codec_raw.c"})
    return sorted({path for path in CSRC.glob("*.c") if path.stem not in ("progress", "transport")} - shared)


def build(compiler: str, target: str, program: Path, sanitizers: str, *extra: Path) -> None:
    """Without sanitizers when `sanitizers` is empty. CalledProcessError when the compiler cannot."""
    harness = HERE / f"fuzz_{target}.c"
    checks = [f"-fsanitize={sanitizers}"] if sanitizers else []
    command = [compiler, *FLAGS, *checks, harness, *extra, *sources(target), "-lm", "-o", program]
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    if unknown := [target for target in options.targets if target not in TARGETS]:
        parser.error(f"no fuzzer is called {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for target in options.targets:
            program, grown = Path(folder) / target, Path(folder) / f"{target}-corpus"
            build("clang", target, program, "fuzzer,address,undefined")
            grown.mkdir()
            limits = [f"-max_total_time={options.seconds}", "-max_len=6000", "-timeout=10", "-rss_limit_mb=2000"]
            command = [program, *limits, f"-artifact_prefix={options.keep}/{target}-", grown, HERE / "corpus" / target]
            with (Path(folder) / f"{target}.log").open("wb") as log:  # a pipe would fill up while another one is waited for
                running.append((target, subprocess.Popen(command, stderr=log)))
        failed = False
        for target, process in running:
            process.wait()
            lines = (Path(folder) / f"{target}.log").read_text(errors="replace").splitlines()
            if process.returncode:
                failed = True
                print("\n".join(line for line in lines if not line.startswith("#")))
            print(f"{target}: {lines[-1] if not process.returncode else 'failed, see above'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
