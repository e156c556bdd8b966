"""Train digits while everything goes wrong, and compare with a run to which nothing happened.

    python -m bench.chaos --minutes 30 --seed 1
    python -m bench.chaos --faults 200 --kinds kill
    python -m bench.chaos --faults 20 --kinds restart-store

Faults (bench/chaos/faults.py) strike one after the other, at random moments; the next one comes when the run has completed a
step. Ends with status 1 when a fault was not survived, a byte of the result is another than undisturbed, a step is missing
or written twice, or a key, a process or a snapshot is left. What is printed of recovery is: from the fault to the next
completed step; of changes of the membership, from the fault to its being noticed, and from there to the next step.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from bench.chaos.faults import KINDS
from bench.chaos.run import LostRun, Run

STEPS_PER_EPOCH = 23
#: At most so many steps a second are done while faults happen; how long a fault takes with its recovery, about.
STEPS_PER_S, FAULT_S = 12, 4.0


def train(folder: Path, request: dict[str, Any], seed: int) -> tuple[Run, Any]:
    """An undisturbed run, to its end."""
    run = Run(folder, request, pace_s=0.0, seed=seed)
    try:
        run.start()
        assert run.process is not None
        code = run.process.wait()
        if code != 0:
            raise LostRun(f"the undisturbed run ended with exit code {code}: {run.errors()}")
        return run, run.result()
    finally:
        run.close()


def strike(run: Run, kinds: list[str], until: float, faults: int, verbose: bool) -> list[dict[str, Any]]:
    """Let faults happen until the time is up, so many have happened, or the run has ended."""
    struck: list[dict[str, Any]] = []
    chance = random.Random(run.chance.random())
    run.wait_for_progress(3, "start")
    while time.monotonic() < until and len(struck) < faults and run.ended() is None:
        time.sleep(chance.uniform(0, 0.6))
        if len(run.workers()) < run.request.workers:
            run.wait_for_progress(run.step(), "before a fault")
            if len(run.workers()) < run.request.workers:
                continue
        kind, step, at = chance.choice(kinds), run.step(), time.time()
        detail = KINDS[kind](run)
        run.wait_for_progress(step + 1, kind)
        row = {"kind": kind, "step": step, "at": at, "seconds": time.time() - at, "detail": detail}
        struck.append(row)
        if verbose:
            print(f"{len(struck):4} {kind:15} step {step:6} {row['seconds']:6.2f} s  {detail}", flush=True)
    return struck


def verdict(run: Run, whole: Any, steps: int) -> list[str]:
    """What is not as it must be when the run has ended."""
    losses, digest, _ = run.result()
    found = []
    numbers = [number for number, _ in losses]
    if numbers != list(range(1, steps + 1)):
        found.append(f"steps are missing or doubled: {len(numbers)} rows, {len(set(numbers))} steps of {steps}")
    if losses != whole[0]:
        odd = [a[0] for a, b in zip(losses, whole[0], strict=False) if a != b]
        found.append(f"{len(odd)} losses differ from the undisturbed run's, first at step {odd[:1]}")
    if digest != whole[1]:
        found.append("the last checkpoint's tensors differ from the undisturbed run's")
    found += [f"left behind: {what} {value}" for what, value in run.left_behind().items() if value]
    return found


def summary(struck: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Times by kind, and of the changes of the membership."""
    kinds = {}
    for kind in sorted({row["kind"] for row in struck}):
        seconds = [row["seconds"] for row in struck if row["kind"] == kind]
        kinds[kind] = {"faults": len(seconds), "median_s": median(seconds), "max_s": max(seconds)}
    changes = [row for row in rows if row["kind"] == "membership"]
    noticed = []
    for fault in struck:
        if fault["kind"] == "kill":
            after = [row for row in changes if 0 <= row["noticed"] - fault["at"] < 60]
            if after:
                first = min(after, key=lambda row: row["noticed"])
                noticed.append((first["noticed"] - fault["at"], first["recovery_s"]))
    return {"kinds": kinds, "changes": len(changes), "kills": noticed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=None, help="let faults happen for so long (2, or until --faults)")
    parser.add_argument("--faults", type=int, default=None, help="let so many happen")
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--liveness", type=float, default=2.0, help="seconds without a sign of life")
    parser.add_argument("--spares", type=int, default=0)
    parser.add_argument("--pace-ms", type=float, default=30.0, help="of a step, while faults happen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all that was measured")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this new folder, and leave it")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    limit_s = 60 * options.minutes if options.minutes else FAULT_S * options.faults if options.faults else 120.0
    epochs = int(limit_s * STEPS_PER_S / STEPS_PER_EPOCH) + 2
    request = {
        "workers": options.workers,
        "epochs": epochs,
        "codec": "fp32",
        "liveness_s": options.liveness,
        "spares": options.spares,
        "timeout_s": 60.0,
        "max_restarts": 20,
    }
    steps = epochs * STEPS_PER_EPOCH
    with tempfile.TemporaryDirectory(prefix="smlt-chaos-") if options.keep is None else nullcontext(options.keep) as scratch:
        began = time.monotonic()
        _, whole = train(Path(scratch) / "undisturbed", request, options.seed)
        print(
            f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s, accuracy {whole[2]['accuracy']:.4f}", flush=True
        )
        run = Run(Path(scratch) / "disturbed", request, pace_s=options.pace_ms / 1000, seed=options.seed)
        struck: list[dict[str, Any]] = []
        found: list[str] = []
        try:
            run.start()
            until = time.monotonic() + (60 * options.minutes if options.minutes else 1e9 if options.faults else limit_s)
            struck = strike(run, options.kinds, until, options.faults or 1 << 30, not options.quiet)
            run.set_pace(0.0)
            assert run.process is not None
            code = run.process.wait(1800)
            found = verdict(run, whole, steps) if code == 0 else [f"exit code {code}: {run.errors()}"]
        except LostRun as error:
            found = [f"lost: {error}"]
        finally:
            rows = run.rows()
            measured = {**summary(struck, rows), "found": found, "accuracy": run.result()[2] if not found else None}
            run.close()
    print(f"\n{len(struck)} faults of {len(measured['kinds'])} kinds, {measured['changes']} changes of the membership")
    print(f"{'fault':16}{'times':>6}{'median s':>10}{'max s':>8}   (to the next completed step)")
    for kind, row in measured["kinds"].items():
        print(f"{kind:16}{row['faults']:6}{row['median_s']:10.2f}{row['max_s']:8.2f}")
    if measured["kills"]:
        for name, values in zip(("noticed after", "went on after"), zip(*measured["kills"], strict=True), strict=True):
            ordered = sorted(values)
            far = ordered[int(0.95 * len(ordered))]
            print(f"kills {name}: median {median(ordered):.2f} s, 95 % {far:.2f} s, max {ordered[-1]:.2f} s")
    if not found:
        print(f"accuracy {measured['accuracy']['accuracy']:.4f}, undisturbed {whole[2]['accuracy']:.4f}: identical to the bit;")
        print("every step once, no key, no process, no snapshot left")
    for line in found:
        print(f"FOUND: {line}")
    if options.json:
        options.json.write_text(
            json.dumps({"options": {**vars(options), "json": str(options.json)}, "faults": struck, **measured})
        )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
