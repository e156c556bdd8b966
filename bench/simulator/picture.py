"""Pictures of the simulator's rows, in the style of bench/plots.py."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TEXT = "#808080"
COLOURS = ("#d9480f", "#f08c00", "#1c7ed6", "#0ca678", "#ae3ec9", "#868e96")


def draw(rows: list[Row], path: Path) -> None:
    """Seconds of a step against workers: a line a store (study) or a system (comparison), a panel a model. SVG.

    ValueError for rows that are neither.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "smlt", "text.color": TEXT, "axes.edgecolor": TEXT})
    mpl.rcParams.update({"axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "font.family": "sans-serif"})
    from matplotlib.figure import Figure

    chosen = [row for row in rows if "step_s" in row and row.get("model")]
    if not chosen:
        raise ValueError("there is nothing to draw: pictures are of the study and of --compare")
    models = list(dict.fromkeys(row["model"] for row in chosen))
    figure = Figure(figsize=(4.2 * len(models), 4.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        lines = sorted((row for row in chosen if row["model"] == model), key=_line)
        for colour, (name, points) in zip(COLOURS * 2, groupby(lines, key=_line), strict=False):
            ordered = sorted(points, key=lambda row: row["workers"])
            x, y = [row["workers"] for row in ordered], [row["step_s"] for row in ordered]
            axes.plot(x, y, marker="o", markersize=4, color=colour, label=name)
        axes.set(xscale="log", yscale="log", title=f"{model}, simulated", xlabel="workers", ylabel="seconds a step")
        axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _line(row: Row) -> str:
    return str(row["name"]) if "name" in row else f"store of {row['nodes']}"
