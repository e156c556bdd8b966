"""SMLT simulated: collectives and training of up to a thousand workers, on constants measured here.

    python -m bench.simulate                        the study: n = 1 ... 1,000, stores of 1 to 8 nodes, four models
    python -m bench.simulate --compare              beside Siren, Cirrus and LambdaML, what is measured and what simulated
    python -m bench.simulate --store [--floats 11000000]   an all-reduce by workers and store nodes of 10 Gbit/s
    python -m bench.simulate --run resnet50 -n 100 -k 4   one training run with cold starts, stragglers and failures
    python -m bench.simulate --validate [--passes N]      simulated against measured here, n = 2 ... 8, shaped and not (root)
    python -m bench.simulate --calibrate [--passes N]     measure and fit anew (root); writes bench/simulator/calibration.json

`--json PATH` writes the rows, `--picture PATH` draws the study's or the comparison's (SVG). docs/simulator.md says what is
modelled, and how well.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from bench.links import links_available
from bench.simulator import calibration, study, tables, validation
from bench.simulator.models import MODELS

Row = dict[str, Any]


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that links, stores and workers are cleaned up
    if (options.calibrate or options.validate or options.measure) and (reason := links_available()):
        sys.exit(f"nothing was measured: {reason}")
    rows = _run(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.picture:
        from bench.simulator import picture

        picture.draw(rows, options.picture)


def _run(options: argparse.Namespace) -> list[Row]:
    if options.calibrate:
        rows, fitted = validation.calibrate(options.passes)
        tables.show_validation(rows, fitted)
        return rows
    fitted = calibration.load()
    if options.validate:
        rows = validation.validate(fitted, options.passes)
        tables.show_validation(rows, fitted)
        return rows
    if options.measure:
        return validation.measure_peers(options.passes)
    setting = study.Setting(fitted, core_speed=options.core_speed, local_batch=options.local_batch, memory_mb=options.memory)
    models = [MODELS[name] for name in options.models]
    if options.run:
        nodes = options.nodes[0] if options.nodes else 1
        rows = study.one_run(setting, MODELS[options.run], options.workers[0], nodes, options.epochs, options.seed)
        tables.show_run(rows[0])
    elif options.store:
        counts = options.nodes or study.NODES_COUNTS
        rows = study.nodes(setting, options.floats, options.workers or study.NODES_WORKERS, counts, options.gbit)
        tables.show_nodes(rows)
    elif options.compare:
        rows = study.comparison(setting, models, options.workers or study.COMPARED_WORKERS)
        tables.show_comparison(rows, setting)
    else:
        rows = study.scaling(setting, models, options.workers or study.STUDIED_WORKERS, options.nodes or study.STUDIED_NODES)
        tables.show_scaling(rows, setting)
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", action="store_true")
    what.add_argument("--store", action="store_true")
    what.add_argument("--run", metavar="MODEL", choices=list(MODELS))
    what.add_argument("--validate", action="store_true")
    what.add_argument("--calibrate", action="store_true")
    what.add_argument("--measure", action="store_true", help="measure what the comparison's measured columns show (root)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("-n", "--workers", type=int, nargs="+")
    parser.add_argument("-k", "--nodes", type=int, nargs="+", help="of the store")
    parser.add_argument("--floats", type=int, default=study.MEASURED_FLOATS, help="of --store")
    parser.add_argument("--gbit", type=float, default=study.NODE_GBIT, help="of --store: a node's interface, each way")
    parser.add_argument("--local-batch", type=int, default=study.LOCAL_BATCH, help="samples of a worker in a step")
    parser.add_argument("--memory", type=int, default=study.MEMORY_MB, help="MB of a function")
    parser.add_argument(
        "--core-speed", type=float, default=1.0, help="of Lambda's vCPU against a core of the calibrated machine"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of --run")
    parser.add_argument("--seed", type=int, default=0, help="of --run")
    parser.add_argument("--passes", type=int, default=1, help="over all cells to be measured")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--picture", type=Path, metavar="PATH")
    options = parser.parse_args()
    if options.run and not options.workers:
        parser.error("--run needs -n")
    return options


if __name__ == "__main__":
    main()
