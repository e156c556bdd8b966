"""How well and how fast examples/breakout.py learns: random play, a run of some minutes, where n workers spend their time.

    python -m bench.breakout --minutes 10 --json breakout.json
    python -m bench.breakout --cpu-minutes 20 --throughput
    python -m bench.breakout --draw breakout.json

Three parts. Random play: the mean score of --games whole games (five lives) under random actions, in the same environment.
Learning: `smlt launch -n 2 examples/breakout.py` with an embedded store, ended so that the whole command, from the first
process' start to the last one's end, takes --minutes; the mean score of the last 100 games that were finished in training,
and that of --games games which the checkpoint then plays. Throughput: for each n of --throughput a short run, without its
first update; seconds are means over the workers. `wait` is how long a worker waits for the slowest one after acting,
`communicate` all other time in collectives, waiting included.

--cpu-minutes ends the run by processor time instead, all workers together (without the store's): on a machine that others
use too, twice the minutes stand for so many on two free cores.
The picture of the curve goes to --picture. Needs the extras atari, torch and bench.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "breakout.py"
PARTS = ("act", "learn", "communicate", "wait")
#: Of --minutes, for starting the processes and writing the checkpoint.
START_MINUTES = 0.4
TEXT = "#808080"


def random_play(games: int, seed: int = 0) -> dict[str, Any]:
    """Mean, standard error and best score of one whole game in each of `games` environments, actions drawn evenly."""
    sys.path.append(str(EXAMPLE.parent))
    import numpy as np
    from breakout_env import ACTIONS, Games

    made, draw, scores = Games(games, seed), np.random.default_rng(seed), dict[int, float]()
    while len(scores) < games:
        made.step(draw.integers(len(ACTIONS), size=games))
        for number, score in made.finished:
            scores.setdefault(number, score)
        made.finished.clear()
    values = np.array(list(scores.values()))
    error = float(values.std(ddof=1) / games**0.5)
    return {"games": games, "mean_return": float(values.mean()), "standard_error": error, "best": float(values.max())}


def launch(workers: int, folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], float]:
    """Train in `folder`; the rows of metrics.jsonl and the seconds that the whole command took."""
    command = [sys.executable, "-m", "smlt", "launch", "-n", str(workers), str(EXAMPLE), "--out", str(folder), *arguments]
    print("$ smlt", *command[3:], flush=True)
    began = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - began
    return rows_of(folder), seconds


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the run in `folder`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learning(options: argparse.Namespace) -> dict[str, Any]:
    """The run that the bar is about, and how its checkpoint plays."""
    limits = ["--seed", str(options.seed)]
    if options.minutes:
        limits += ["--minutes", f"{options.minutes - START_MINUTES:g}"]
    if options.cpu_minutes:
        limits += ["--cpu-minutes", f"{options.cpu_minutes:g}"]
    with tempfile.TemporaryDirectory() as scratch:
        folder, seconds = options.run, None
        if folder is not None:
            rows = rows_of(folder)
        else:
            folder = options.out or Path(scratch) / "run"
            rows, seconds = launch(options.workers, folder, *limits)
        command = [sys.executable, str(EXAMPLE), "--out", str(folder), "--evaluate", str(options.games), "--json"]
        played = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    keep = ("elapsed_s", "cpu_s", "frames", "episodes", "mean_return", "averaged")
    return {
        "workers": rows[-1]["world_size"],
        "command_s": seconds,
        "last": rows[-1],
        "played": played,
        "curve": [{name: row[name] for name in keep} for row in rows],
    }


def throughput(workers: int, seed: int) -> dict[str, Any]:
    """Frames a second of a short run with `workers` workers, and where an update's seconds go."""
    with tempfile.TemporaryDirectory() as scratch:
        # Six updates of 32 games * 64 actions * 4 frames a worker; the first one's costs are those of starting.
        rows, _ = launch(workers, Path(scratch) / "run", "--frames", str(6 * 32 * 64 * 4 * workers), "--seed", str(seed))
    first, last = rows[0], rows[-1]
    updates = last["updates"] - first["updates"]
    split = {f"{part}_s": (last[f"{part}_s"] - first[f"{part}_s"]) / updates for part in PARTS}
    frames, cpu_s = last["frames"] - first["frames"], last["cpu_s"] - first["cpu_s"]
    seconds = last["elapsed_s"] - first["elapsed_s"]
    return {"workers": workers, "frames_per_s": frames / seconds, "frames_per_cpu_s": frames / cpu_s, "update": split}


def draw(found: dict[str, Any], path: Path) -> None:
    """The mean return of the last 100 games against minutes and frames, with random play and three times that."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "smlt", "font.family": "sans-serif"})
    mpl.rcParams.update(dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT))
    from matplotlib.figure import Figure

    run, random = found["learning"], found["random"]["mean_return"]
    rows = [row for row in run["curve"] if row["mean_return"] is not None]
    # On a machine that is used by others too, what the clock says means little.
    by_cpu = found["options"]["cpu_minutes"] is not None
    minutes = [row["cpu_s"] / 60 if by_cpu else row["elapsed_s"] / 60 for row in rows]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(minutes, [row["mean_return"] for row in rows], color="#d9480f", linewidth=2, label=f"PPO, n = {run['workers']}")
    axes.axhline(3 * random, color="#1c7ed6", linestyle="--", linewidth=1.2, label=f"three times random: {3 * random:.1f}")
    axes.axhline(random, color=TEXT, linestyle=":", linewidth=1.2, label=f"random play: {random:.2f}")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes of processor time, all workers together" if by_cpu else "minutes")
    axes.set_ylabel("mean score of the last 100 games")
    axes.set_title(f"Breakout from pixels: {run['last']['frames'] / 1e6:.1f} million frames", fontsize="medium")
    axes.grid(color=TEXT, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    print(path)


def summary(found: dict[str, Any]) -> None:
    """Print what was found."""
    random = found["random"]
    print(f"random play: {random['mean_return']:.2f} +- {random['standard_error']:.2f} over {random['games']} games")
    if "learning" in found:
        run, last = found["learning"], found["learning"]["last"]
        print(
            f"n = {run['workers']}: {last['mean_return']:.2f} over the last {last['averaged']} of {last['episodes']:,} games, "
            f"{last['mean_return'] / random['mean_return']:.1f} times random play, after {last['frames']:,} frames, "
            f"{(run['command_s'] or last['elapsed_s']) / 60:.2f} minutes, {last['cpu_s'] / 60:.1f} minutes of processor time"
        )
        played = run["played"]
        print(f"the checkpoint: {played['mean_return']:.2f} over {played['episodes']} games, the best {played['best']:g}")
    if found["throughput"]:
        print("   n  frames/s  frames/CPU s   seconds an update: " + "  ".join(f"{part:>11}" for part in PARTS))
    for row in found["throughput"]:
        split = "  ".join(f"{row['update'][f'{part}_s']:11.2f}" for part in PARTS)
        print(f"{row['workers']:4} {row['frames_per_s']:9,.0f} {row['frames_per_cpu_s']:13,.0f}   {'':19}{split}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="that the learning command may take, by the clock")
    parser.add_argument("--cpu-minutes", type=float, help="that its workers may use")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--games", type=int, default=100, help="of random play, and of the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--throughput", type=int, nargs="*", default=[1, 2, 4], help="numbers of workers")
    parser.add_argument("--out", type=Path, help="keep the run in this new folder")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="do not train: take the run that is in this folder")
    parser.add_argument("--json", type=Path, help="write all of it there")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/breakout.svg"))
    parser.add_argument("--draw", type=Path, metavar="FILE", help="only draw what --json wrote")
    options = parser.parse_args()
    if options.draw:
        found = json.loads(options.draw.read_text())
        summary(found)
        draw(found, options.picture)
        return
    if options.minutes and options.minutes <= START_MINUTES:
        parser.error(f"--minutes must be above {START_MINUTES}")
    found = {
        "cores": os.cpu_count(),
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()},
    }
    found["random"] = random_play(options.games, options.seed)
    if options.minutes or options.cpu_minutes or options.run:
        found["learning"] = learning(options)
    found["throughput"] = [throughput(workers, options.seed) for workers in options.throughput]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    summary(found)
    if "learning" in found:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
