"""Draws the pictures of the concepts: python docs/_build/pictures.py

Each is an SVG file that follows the reader's colour scheme by itself. On the site it is put into the page (see inline.py),
where it follows the palette's switch.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "images"

#: Of a picture that stands alone; in a page, stylesheets/site.css says the same by the palette.
STYLE = """
svg { --ink: #24292f; --soft: #57606a; --line: #8c959f; --plain: #f6f8fa; --paper: #ffffff;
      --a: #0b7285; --b: #a14a00; --c: #6741a8; --d: #2b7a35; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --soft: #adb7c2; --line: #768390; --plain: #2a2f37; --paper: #1e2129;
        --a: #4fc3d8; --b: #f0a35e; --c: #b89cf0; --d: #7fd18a; --bad: #ff8a80; } }
""".strip()
FIGURE = """
.figure text { font: 14px system-ui, sans-serif; fill: var(--ink); }
.figure .soft { fill: var(--soft); font-size: 12.5px; } .figure .head { font-weight: 600; }
.figure .mono { font-family: ui-monospace, monospace; font-size: 12px; }
.figure .mid { text-anchor: middle; } .figure .end { text-anchor: end; }
.figure .box { fill: var(--plain); stroke: var(--line); stroke-width: 1.2; }
.figure .frame { fill: none; stroke: var(--line); stroke-width: 1.2; stroke-dasharray: 4 4; }
.figure .line { fill: none; stroke: var(--line); stroke-width: 1.4; }
.figure .a { fill: var(--a); } .figure .b { fill: var(--b); } .figure .c { fill: var(--c); } .figure .d { fill: var(--d); }
.figure .bad { fill: var(--bad); } .figure .on { fill: var(--paper); font-weight: 600; font-size: 12.5px; }
.figure .to { fill: none; stroke: var(--soft); stroke-width: 1.6; } .figure .dots { stroke-dasharray: 3 4; }
.figure .tip { fill: var(--soft); }
""".strip()


class Picture:
    """An SVG that is written from top to bottom. Sizes are in its own units, one of them a CSS pixel at full width."""

    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.name, self.title, self.width, self.height = name, title, width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, kind: str = "box", radius: float = 5) -> None:
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>')

    def named(self, x: float, y: float, w: float, h: float, words: str, kind: str = "box", below: str = "") -> None:
        """A box with its name in the middle, and a second line where there is one."""
        self.box(x, y, w, h, kind)
        colour = "mid head" if kind == "box" else "mid on"
        self.text(x + w / 2, y + h / 2 + (-3 if below else 5), words, colour)
        if below:
            self.text(x + w / 2, y + h / 2 + 15, below, "mid soft")

    def line(self, *points: tuple[float, float], kind: str = "line") -> None:
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M{path}"/>')

    def arrow(self, *points: tuple[float, float], dots: bool = False) -> None:
        """A line with a tip at its end; the last piece is level or upright."""
        (x0, y0), (x, y) = points[-2:]
        length = max(1.0, ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5)
        dx, dy = (x - x0) / length, (y - y0) / length
        self.line(*points[:-1], (x - 6 * dx, y - 6 * dy), kind="to dots" if dots else "to")
        left, right = (x - 9 * dx - 4.5 * dy, y - 9 * dy + 4.5 * dx), (x - 9 * dx + 4.5 * dy, y - 9 * dy - 4.5 * dx)
        corners = " L".join(f"{px:g} {py:g}" for px, py in ((x, y), left, right))
        self.parts.append(f'<path class="tip" d="M{corners}Z"/>')

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="0 0 {self.width} {self.height}" '
            f'role="img" aria-label="{escape(self.title)}">'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}\n{FIGURE}</style>", *self.parts, "</svg>\n"])


def overview() -> Picture:
    p = Picture("overview", "Client, workers and the two stores: workers connect to the stores, never to one another", 860, 330)
    p.box(10, 40, 190, 250, "frame", 8)
    p.text(22, 30, "your machine", "soft")
    p.named(28, 58, 154, 44, "smlt train", "a")
    p.named(28, 116, 154, 44, "Task Scheduler")
    p.named(28, 172, 154, 44, "Resource Manager")
    p.named(28, 228, 154, 44, "Optimizer")
    p.box(330, 40, 210, 250, "frame", 8)
    p.text(342, 30, "n workers: processes or functions", "soft")
    for rank, top in enumerate((58, 136, 214)):
        p.named(348, top, 174, 58, f"worker {rank}" if rank < 2 else "worker n-1", "box", "your task, a shard of data")
    for top, kind, name, what in ((58, "b", "parameter store", "Valkey, Redis"), (186, "c", "object store", "S3, a directory")):
        p.box(660, top, 180, 104, kind)
        p.text(750, top + 48, name, "mid on")
        p.text(750, top + 68, what, "mid on")
    p.arrow((200, 138), (330, 138))
    p.text(265, 128, "starts, replaces", "mid soft")
    for y, words, under in ((110, "gradients", "averages"), (238, "code, data", "checkpoints")):
        p.arrow((600, y), (660, y))
        p.arrow((600, y), (540, y))
        p.text(600, y - 9, words, "mid soft")
        p.text(600, y + 20, under, "mid soft")
    p.arrow((105, 290), (105, 314), (750, 314), (750, 290))
    p.text(430, 308, "roster, metadata, code, data", "mid soft")
    return p


def words() -> Picture:
    p = Picture("words", "A gradient is cut in one shard for each worker, a shard in chunks; each chunk has an owner", 860, 330)
    p.text(10, 26, "one worker's gradient: a flat float32 buffer", "head")
    p.box(10, 38, 840, 34, "box")
    for i, kind in enumerate("abcd"):
        p.box(10 + 210 * i, 38, 210, 34, kind, 0)
        p.text(10 + 210 * i + 105, 60, f"shard {i}", "mid on")
        p.line((10 + 210 * i + 105, 72), (10 + 210 * i + 105, 98))
        p.text(10 + 210 * i + 105, 114, f"owner: worker {i}", "mid soft")
    for i in range(6):
        w = 56 if i < 5 else 40
        p.box(150 + 62 * i, 158, w, 34, "b", 4)
        p.text(150 + 62 * i + w / 2, 180, f"{i}", "mid on")
    p.line((220, 72), (150, 158), kind="line dots")
    p.line((430, 72), (500, 158), kind="line dots")
    p.text(520, 172, "chunks: 256 KiB each on the wire,", "head")
    p.text(520, 191, "encoded one by one", "soft")
    p.text(10, 244, "what goes to the store for one chunk, from each worker but its owner", "head")
    p.box(10, 256, 400, 56, "box")
    p.text(22, 279, "SET smlt:{job.0}:g.s:step:u:chunk:rank", "mono")
    p.text(22, 299, "header, encoded elements", "soft")
    p.arrow((410, 284), (470, 284))
    p.box(470, 256, 380, 56, "box")
    p.text(482, 279, "XADD smlt:{job.0}:g.s:in:owner", "mono")
    p.text(482, 299, "the arrival token: a hint that wakes the owner", "soft")
    return p


def gradient() -> Picture:
    p = Picture("gradient", "The way of a gradient: contributions up, averages down, through the parameter store", 860, 420)
    tops = (60, 170, 280)
    for r, (kind, top) in enumerate(zip("abc", tops, strict=True)):
        p.box(10, top, 190, 84, "box", 6)
        p.text(22, top + 22, f"worker {r}", "head")
        p.text(22, top + 40, "its gradient", "soft")
        for i, one in enumerate("abc"):
            p.box(22 + 56 * i, top + 50, 54, 22, one, 3)
        p.box(660, top, 190, 84, "box", 6)
        p.text(672, top + 22, f"worker {r}", "head")
        p.text(672, top + 40, "the mean, the same bytes", "soft")
        for i, one in enumerate("abc"):
            p.box(672 + 56 * i, top + 50, 54, 22, one, 3)
        p.named(392, top + 22, 76, 40, "mean", kind)
        p.arrow((200, top + 42), (262, top + 42))
        p.arrow((322, top + 42), (392, top + 42))
        p.arrow((468, top + 42), (538, top + 42))
        p.arrow((598, top + 42), (660, top + 42))
        p.text(430, top + 78, f"worker {r} owns it", "mid soft")
    for x, name in ((262, "contributions"), (538, "aggregates")):
        p.box(x, 52, 60, 320, "frame", 8)
        p.text(x + 30, 42, name, "mid soft")
        for kind, top in zip("abc", tops, strict=True):
            for i in range(2 if x < 400 else 1):
                p.box(x + 12, top + 30 + 16 * i if x < 400 else top + 34, 36, 12 if x < 400 else 18, kind, 3)
    for x, number, label in ((105, "1", "encode, SET"), (430, "2, 3", "MGET, add in rank order, SET"), (755, "4", "MGET, decode in place")):
        p.text(x, 394, number, "mid head")
        p.text(x, 411, label, "mid soft")
    for x in (292, 568):
        p.text(x, 394, "store", "mid soft")
    return p


def duplex() -> Picture:
    p = Picture("duplex", "One worker's link: averages come down while later chunks still go up", 860, 250)
    rows = (("up", 50), ("tokens", 110), ("down", 170))
    for name, y in rows:
        p.text(10, y + 22, name, "head")
        p.line((80, y + 36), (840, y + 36))
    for i in range(10):
        kind = "bcd"[i % 3]
        p.box(84 + 44 * i, 56, 42, 26, kind, 3)
    for i in range(4):
        p.box(530 + 44 * i, 56, 42, 26, "a", 3)
    p.text(84, 44, "contributions to the others' shards, round by round", "soft")
    p.text(530, 44, "its own shard, averaged", "soft")
    for x in (160, 248, 336, 424, 512, 600, 688):
        p.parts.append(f'<circle class="tip" cx="{x}" cy="130" r="4"/>')
    p.text(700, 134, "one blocking XREAD", "soft")
    for i in range(6):
        p.box(196 + 60 * i, 176, 56, 26, "a", 3)
    for i in range(6):
        p.box(560 + 44 * i, 176, 42, 26, "bcd"[i % 3], 3)
    p.text(196, 226, "everybody's contributions to its own shard", "soft")
    p.text(560, 226, "the others' averages", "soft")
    p.arrow((80, 242), (840, 242))
    p.text(84, 22, "time runs to the right; the two directions of the link work at once", "soft")
    return p


def membership() -> Picture:
    p = Picture("membership", "Freeze, acknowledge, resume: what happens when a worker is lost", 860, 400)
    lanes = (("scheduler", 150), ("worker 0", 340), ("worker 1", 520), ("worker 2, new", 700))
    for name, x in lanes:
        p.named(x - 68, 12, 136, 32, name, "a" if name == "scheduler" else "box")
        if name != "worker 1":
            p.line((x, 44), (x, 392))
    p.line((520, 44), (520, 92))
    p.text(10, 74, "generation g", "head")
    for x in (340, 520):
        p.named(x - 46, 56, 92, 26, "step 41", "b")
    p.text(520, 108, "×", "mid bad head")
    p.text(534, 108, "dies", "soft")
    p.text(10, 144, "freeze", "head")
    p.arrow((150, 140), (332, 140))
    p.text(241, 132, "generation g + 1", "mid soft")
    p.arrow((150, 172), (692, 172), dots=True)
    p.text(560, 164, "starts a replacement", "mid soft")
    p.text(10, 212, "acknowledge", "head")
    p.arrow((340, 208), (158, 208))
    p.text(249, 200, "at step 41, not sent", "mid soft")
    p.arrow((700, 238), (158, 238))
    p.text(560, 230, "here, with no state", "mid soft")
    p.text(10, 278, "plan", "head")
    p.arrow((150, 274), (332, 274))
    p.text(241, 266, "ranks, step 41, donor 0", "mid soft")
    p.arrow((348, 274), (692, 274))
    p.arrow((340, 304), (692, 304))
    p.text(520, 296, "model and optimizer, by the object store", "mid soft")
    p.text(10, 352, "resume", "head")
    for x in (340, 700):
        p.named(x - 46, 334, 92, 26, "step 41", "b")
    p.text(520, 348, "computed again:", "mid soft")
    p.text(520, 364, "nothing counts twice", "mid soft")
    return p


def time_limit() -> Picture:
    p = Picture("time-limit", "Before the time limit all workers stop behind the same step, and are invoked anew", 860, 250)
    p.text(10, 24, "0", "soft")
    p.text(430, 24, "15 min", "mid soft")
    p.text(850, 24, "30 min", "end soft")
    p.line((10, 32), (850, 32))
    for x in (10, 430, 850):
        p.line((x, 26), (x, 38))
    for r, y in enumerate((52, 96, 140)):
        p.named(10, y, 376, 32, f"worker {r}, first invocation", "abc"[r])
        p.box(386, y, 22, 32, "d")
        p.box(424, y, 14, 32, "box")
        p.named(438, y, 374, 32, f"worker {r}, second invocation", "abc"[r])
    p.line((386, 44), (386, 196), kind="to dots")
    p.text(386, 212, "all stop behind step 1,204", "end soft")
    p.line((408, 172), (408, 196), kind="to dots")
    p.text(416, 212, "checkpoint, then a new start at step 1,205", "soft")
    p.text(10, 240, "The request to stop travels in the step's own all-reduce, so that nobody stops one step before another.", "soft")
    return p


PICTURES = (overview, words, gradient, duplex, membership, time_limit)


def main() -> None:
    for draw in PICTURES:
        picture = draw()
        (IMAGES / f"concept-{picture.name}.svg").write_text(picture.svg())


if __name__ == "__main__":
    main()
