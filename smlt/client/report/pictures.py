"""How pictures are drawn and written: their look, PNG and SVG files, and SVG within a page that is light or dark.

Nothing here touches matplotlib's global state or a display. Colours tell apart for the colour-blind too (after Okabe and Ito,
https://jfly.uni-koeln.de/color/), darkened to 3:1 on white, and never alone: lines differ by dashes or markers.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smlt.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
#: Dots an inch of a PNG: a picture of 7.6 inches has 1,140.
PNG_DPI = 150

#: Name -> colour on white, colour on near-black. In a page a colour is a variable of this name.
COLOURS = {
    "text": ("#24292f", "#e6edf3"),
    "faint": ("#7d8590", "#848d97"),
    "blue": ("#0072b2", "#56b4e9"),
    "red": ("#d55e00", "#ff9248"),
    "green": ("#00875f", "#3fd2a4"),
    "purple": ("#b5578b", "#e9a9cd"),
    "gold": ("#a87400", "#f0c350"),
}
TEXT, FAINT, BLUE, RED, GREEN, PURPLE, GOLD = (light for light, _ in COLOURS.values())
#: In this order, with the dashes that go with each.
SERIES = ((BLUE, "-"), (RED, "--"), (GREEN, "-."), (PURPLE, ":"), (GOLD, (0, (5, 1, 1, 1, 1, 1))))
#: Of maps: even in lightness, the same for most kinds of colour-blindness.
MAP, UNSURE_MAP = "viridis", "cividis"

_STYLE: Any = {  # matplotlib knows the names
    "svg.fonttype": "none",  # text stays text: it is read aloud, found and small
    "svg.hashsalt": "smlt",  # the same data give the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # all of them as wide as what the layout reckons with
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "text.color": TEXT,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": TEXT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "image.interpolation": "none",
}


@dataclass(frozen=True)
class Table:
    """Rows of text below a header; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A figure and what it says in words. `name`: of its file. `alt`: what is to be seen, for who does not see it."""

    name: str
    title: str
    alt: str
    figure: Figure
    caption: str = ""
    table: Table | None = None


@contextmanager
def drawing() -> Iterator[None]:
    """Figures are made and written within it. ConfigError when matplotlib is not installed."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ConfigError(f"pictures need {error.name}: pip install 'smlt[report]'") from error
    with rc_context(_STYLE):
        yield


def new_figure(height_in: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of 7.6 inches' width and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, height_in), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [one for row in axes for one in row]


def whole_numbers(axis: Axis) -> None:
    """No ticks at halves of workers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def legend(axes: Axes, **options: Any) -> None:
    """Where it hides no line: above the axes, on one line."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        where = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(labels), "borderaxespad": 0.2}
        axes.legend(handles, labels, **{**where, "handlelength": 2.2, "columnspacing": 1.2, **options})


def check_format(kind: str) -> None:
    """ConfigError when there is no such format."""
    if kind not in FORMATS:
        raise ConfigError(f"--format {kind}: {' or '.join(FORMATS)}, please")


def write(picture: Picture, folder: Path, kind: str) -> Path:
    """Write a picture as <name>.<kind>, on white. ConfigError for a kind that is none, StoreError when it cannot be written."""
    check_format(kind)
    path = folder / f"{picture.name}.{kind}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with drawing():
            if kind == "svg":
                path.write_text(_svg(picture, facecolor="white"), encoding="utf-8")
            else:
                about = {"Title": plain(picture.title), "Description": plain(picture.alt), "Software": None}
                picture.figure.savefig(path, format="png", dpi=PNG_DPI, facecolor="white", metadata=about)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    return path


def inline_svg(picture: Picture) -> str:
    """The picture as an element of a page: transparent, its colours variables of the page, its ids its own."""
    text = _svg(picture, transparent=True)
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    prefix = html.escape(picture.name, quote=True)
    text = text.replace('aria-labelledby="title desc"', f'aria-labelledby="{prefix}-title {prefix}-desc"')
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    return re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)


def _svg(picture: Picture, **options: Any) -> str:
    """With title and description, which are what is read aloud, and without what matplotlib says of itself."""
    buffer = io.StringIO()
    picture.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, **options)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r"<!DOCTYPE[^>]*>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace("<image ", '<image style="image-rendering: pixelated" ')
    title, alt = (html.escape(plain(words)) for words in (picture.title, picture.alt))
    words = f'<title id="title">{title}</title><desc id="desc">{alt}</desc>'
    return re.sub(r"(<svg [^>]*)>", lambda m: f'{m[1]} role="img" aria-labelledby="title desc">{words}', text, count=1)


def plain(text: str) -> str:
    """Without what no page and no picture can hold: control characters, halves of characters."""
    return "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in text)


def seconds_text(seconds: float) -> str:
    """A time for people: 0.0213 s, 12.3 s, 12 min 5 s, 2 h 3 min."""
    if not seconds < 1e15:
        return "?"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"


def usd_text(usd: float) -> str:
    """An amount for people."""
    if not abs(usd) < 1e15:
        return "?"
    return f"{usd:.2f} USD" if abs(usd) >= 10 else f"{usd:.3g} USD" if abs(usd) >= 0.001 else f"{usd:.6f} USD"


def number_text(value: float, digits: int = 4) -> str:
    """A number for people; "?" when it is not known."""
    if not abs(value) < 1e15:
        return "?"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.{digits}g}"


def time_unit(most_s: float) -> tuple[float, str]:
    """Seconds of the unit for an axis that ends there, and its name."""
    return (1.0, "s") if not most_s > 300 else (60.0, "min") if most_s < 3 * 3600 else (3600.0, "h")


def at_most(rows: Sequence[tuple[str, ...]], count: int) -> tuple[tuple[str, ...], ...]:
    """The first and last rows of a table that would be too long; what is left out is said in between."""
    if len(rows) <= count:
        return tuple(rows)
    half = count // 2
    left_out = ("…", f"{len(rows) - 2 * half} more") + ("",) * (len(rows[0]) - 2)
    return (*rows[:half], left_out, *rows[-half:])
