"""The simulator's tables, as text."""

from __future__ import annotations

import statistics
from itertools import groupby
from typing import Any

from bench.links import RATE_MBIT
from bench.simulator.calibration import FIT_WORKERS, TEST_WORKERS, Calibration
from bench.simulator.study import MEASURED_FLOATS, Setting

Row = dict[str, Any]


def show_validation(rows: list[Row], fitted: Calibration) -> None:
    """Simulated beside measured, a line a cell, and the worst."""
    print(f"constants of {fitted.machine}, fitted to {fitted.fitted}\n")
    print(f"  {'cell':44} {'measured':>12} {'simulated':>12} {'error':>7}  {'':9} others")
    for row in rows:
        known = "fitted" if row["fitted"] else "predicted"
        print(
            f"  {row['cell']:44} {row['measured_s'] * 1e3:9.3f} ms {row['simulated_s'] * 1e3:9.3f} ms {row['error']:+7.1%}"
            f"  {known:9} {row['others']:.0%}"
        )
    for name, chosen in (
        ("all", rows),
        (f"n = {', '.join(map(str, TEST_WORKERS))}, never fitted", [r for r in rows if not r["fitted"]]),
    ):
        worst = max(chosen, key=lambda row: abs(row["error"]))
        middle = statistics.median(abs(row["error"]) for row in chosen)
        print(f"\n{name}: {len(chosen)} cells, median error {middle:.1%}, worst {worst['error']:+.1%} ({worst['cell']})")
    print(f"fitted on n = {', '.join(map(str, FIT_WORKERS))}; 'others': their share of the processors while it was measured")


def _place(setting: Setting) -> str:
    return (
        f"functions of {setting.memory_mb} MB, links of 600 Mbit/s, store nodes c6gn.2xlarge, {setting.local_batch} samples a "
        f"worker and step, a vCPU {setting.core_speed:g} times a core here"
    )


def show_scaling(rows: list[Row], setting: Setting) -> None:
    """Simulated, all of it: n down, k across."""
    print(f"all simulated: {_place(setting)}; fp16\n")
    for model, of_model in groupby(rows, key=lambda row: row["model"]):
        chosen = list(of_model)
        nodes = sorted({row["nodes"] for row in chosen})
        print(f"{model}: a step without hazards (efficiency); an epoch with them in USD")
        print("  workers  " + "".join(f"{f'k = {k}':>28}" for k in nodes))
        for n, of_n in groupby(chosen, key=lambda row: row["workers"]):
            cells = {row["nodes"]: row for row in of_n}
            line = f"  {n:7}  "
            for k in nodes:
                row = cells.get(k)
                text = f"{row['step_s']:.2f} s ({row['efficiency']:.0%}) ${row['epoch_usd']:.2f}" if row else ""
                line += f"{text:>28}"
            print(line)
        print()


def show_nodes(rows: list[Row]) -> None:
    """An all-reduce by workers and store nodes, and how many nodes it takes."""
    first = rows[0]
    counts = sorted({row["nodes"] for row in rows})
    print(
        f"SIMULATED: an all-reduce of {first['floats']:,} floats, fp16, in ms (times the bound of the workers' links of "
        f"{RATE_MBIT:.0f} Mbit/s); nodes of {first['node_gbit']:g} Gbit/s each way"
    )
    print("  workers " + "".join(f"{f'k = {k}':>16}" for k in counts) + "   k needed")
    for n, of_n in groupby(rows, key=lambda row: row["workers"]):
        cells = list(of_n)
        line = "".join(f"{row['allreduce_s'] * 1e3:8.0f} ({row['allreduce_s'] / row['link_bound_s']:4.1f}x)" for row in cells)
        needed = cells[0]["needed"] or f"> {counts[-2]}"
        print(f"  {n:7} {line}   {needed}")


def show_comparison(rows: list[Row], setting: Setting) -> None:
    """What is measured, then what is simulated; every column says which."""
    measured = [row for row in rows if row["kind"] == "measured"]
    print(
        f"MEASURED here (bench/peers.py, links of 600 Mbit/s, {MEASURED_FLOATS:,} floats): an all-reduce, and times smlt fp16"
    )
    for name, of_name in groupby(sorted(measured, key=lambda row: row["peer"]), key=lambda row: (row["name"], row["peer"])):
        cells = "".join(
            f"   n = {row['workers']}: {row['allreduce_s'] * 1e3:7.0f} ms {row['ratio_allreduce_s']:5.2f}x" for row in of_name
        )
        note = (
            ""
            if name[1].startswith("smlt")
            else f" ({name[1]} over the store, standing in)"
            if "S3" in name[0]
            else f" ({name[1]})"
        )
        print(f"  {name[0] + note:62}{cells}")
    if not measured:
        print("  nothing yet: python -m bench.simulate --measure")
    simulated = [row for row in rows if row["kind"] == "simulated"]
    print(f"\nSIMULATED: {_place(setting)}; an epoch with hazards; times smlt fp16")
    for (model, n), of_cell in groupby(simulated, key=lambda row: (row["model"], row["workers"])):
        cell = list(of_cell)
        print(f"\n{model}, n = {n}, store or servers of {cell[0]['nodes']} nodes")
        print(f"  {'':28} {'all-reduce':>18} {'step':>18} {'epoch':>19} {'epoch, USD':>18}")
        for row in cell:
            print(
                f"  {row['name']:28} {row['allreduce_s']:9.2f} s {row['ratio_allreduce_s']:6.1f}x {row['step_s']:9.2f} s "
                f"{row['ratio_step_s']:5.1f}x {row['epoch_s']:9.0f} s {row['ratio_epoch_s']:6.1f}x {row['epoch_usd']:10.3f} "
                f"{row['ratio_epoch_usd']:6.1f}x"
            )
    _show_headline(simulated)


def _show_headline(rows: list[Row]) -> None:
    """Where the published 8x and 3x are reached."""
    others = [row for row in rows if not row["name"].startswith("smlt")]
    print("\nHEADLINE (published by SMLT's authors: up to 8x faster, 3x cheaper), over the simulated rows above")
    for name in dict.fromkeys(row["name"] for row in others):
        mine = [row for row in others if row["name"] == name]
        speed, cost = (max(mine, key=lambda row: row[key]) for key in ("ratio_step_s", "ratio_epoch_usd"))
        middle_speed, middle_cost = (statistics.median(row[key] for row in mine) for key in ("ratio_step_s", "ratio_epoch_usd"))
        step = f"a step up to {speed['ratio_step_s']:5.1f}x as long ({speed['model']}, n = {speed['workers']}), median"
        epoch = f"an epoch up to {cost['ratio_epoch_usd']:5.1f}x the cost ({cost['model']}, n = {cost['workers']}), median"
        print(f"  {name:28} {step} {middle_speed:.1f}x; {epoch} {middle_cost:.1f}x")


def show_run(row: Row) -> None:
    """One run, where its time went."""
    print(f"{row['model']}, n = {row['workers']}, k = {row['nodes']}, {row['epochs']} epochs, seed {row['seed']}: simulated")
    for name, text in (
        ("compute_s", "compute"),
        ("waiting_s", "waiting for stragglers"),
        ("communication_s", "all-reduce"),
        ("starts_s", "starts and re-invocations"),
        ("recovery_s", "failures"),
    ):
        print(f"  {text:28} {row[name]:10.1f} s  {row[name] / row['seconds']:6.1%}")
    happened = f"{row['failures']} failures, {row['pauses']} re-invocations"
    print(f"  {'all':28} {row['seconds']:10.1f} s, {row['usd']:.3f} USD; {happened}")
