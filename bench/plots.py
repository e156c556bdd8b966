"""Pictures of what bench.compare measured: time against the size of the gradient and against the number of workers.

    python -m bench.compare --floats 1000 10000 100000 1000000 10000000 --workers 4 --json sizes.json
    python -m bench.compare --workers 2 4 8 --json workers.json
    python -m bench.plots sizes.json workers.json --out docs/images/

Writes, for each transport found in the files, size-<transport>.svg (for one n, the one with most sizes) and
workers-<transport>.svg (for one size, the one with most n): medians and quartiles on log axes. The background is
transparent and the text of a middle grey, so that they can be read on light and on dark pages.
Needs the extra "bench" (matplotlib).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Peers in the order of the legend, with colours that tell apart on white and on near-black, also for the colour-blind.
STYLES = {
    "smlt fp16": ("#d9480f", "o"),
    "smlt fp32": ("#f08c00", "s"),
    "redis-py float32": ("#1c7ed6", "^"),
    "redis-py float16": ("#4dabf7", "v"),
    "lambdaml float32": ("#ae3ec9", "D"),
    "central float32": ("#0ca678", "X"),
    "gloo float32": ("#868e96", "P"),
    "raw limit": ("#868e96", ""),
}
TEXT = "#808080"
AXES = {"floats": "float32 values in the gradient", "workers": "workers"}
NAMES = {"unix": "unix socket", "tcp": "loopback TCP", "links": "links of {} Mbit/s"}

Row = dict[str, Any]


def plot(rows: list[Row], axis: str, title: str, path: Path) -> None:
    """Median milliseconds of each peer against `axis` ("floats" or "workers"), quartiles as a band."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "smlt",  # the same data give the same file
            "font.family": "sans-serif",
            "text.color": TEXT,
            "axes.edgecolor": TEXT,
            "axes.labelcolor": TEXT,
            "xtick.color": TEXT,
            "ytick.color": TEXT,
        }
    )
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (colour, marker) in STYLES.items():
        points = sorted((row for row in rows if row["peer"] == name), key=lambda row: row[axis])
        if not points:
            continue
        x = [row[axis] for row in points]
        style: dict[str, Any] = {"color": colour, "marker": marker or None, "linestyle": "-" if marker else "--"}
        thick = 2.4 if name == "smlt fp16" else 1.4
        axes.plot(x, [row["median_ms"] for row in points], label=name, markersize=5, linewidth=thick, **style)
        low, high = zip(*(row["quartiles_ms"] for row in points), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if axis == "workers":
        axes.set_xticks(sorted({row[axis] for row in rows}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("milliseconds an all-reduce")
    axes.set_title(title, fontsize="medium")
    axes.grid(which="major", color=TEXT, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def richest(rows: Iterable[Row], fixed: str, axis: str) -> int:
    """The value of `fixed` for which most values of `axis` were measured; the largest of several."""
    pairs: set[tuple[int, int]] = {(row[fixed], row[axis]) for row in rows}
    counts = Counter(value for value, _ in pairs)
    return max(counts, key=lambda value: (counts[value], value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what bench.compare --json wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    rows: list[Row] = [row for file in options.files for row in json.loads(file.read_text())["rows"]]
    written = []
    for transport in dict.fromkeys(row["transport"] for row in rows):
        here = [row for row in rows if row["transport"] == transport]
        over = NAMES[transport].format(*{f"{row['rate_mbit']:g}" for row in here if row["rate_mbit"]})
        for axis, fixed, file in (("floats", "workers", "size"), ("workers", "floats", "workers")):
            value = richest(here, fixed, axis)
            chosen = [row for row in here if row[fixed] == value]
            if len({row[axis] for row in chosen}) < 2:
                continue
            what = f"{value} workers" if fixed == "workers" else f"{value:,} floats"
            written.append(options.out / f"{file}-{transport}.svg")
            plot(chosen, axis, f"All-reduce, {what}, {over}", written[-1])
    if not written:
        sys.exit("nothing to draw: a picture needs two sizes or two numbers of workers on one transport")
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
