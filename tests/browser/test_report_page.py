"""The report in a real browser: nothing in the console, nothing fetched, data in every chart, light, dark, on a phone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import PACED, Running, smlt, write_task
from tuned_folder import BEGAN, Rounds

from smlt.client.invocations import Invocation, append_invocation
from smlt.client.optimizer.goals import Goal
from smlt.client.report.contents import Section, contents_of
from smlt.client.report.data import gather
from smlt.client.report.page import page, write_page
from smlt.client.report.pictures import Picture, drawing, new_figure
from smlt.client.runs import Run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PAGE_BYTES_MAX = 5_000_000
#: Of each drawing: how many points its curves, bars, markers and images come to. Only data and grids are clipped to axes.
COUNT = """() => [...document.querySelectorAll('figure svg')].map(svg => {
    const data = [...svg.querySelectorAll('path, use, image')].filter(one => !one.closest('defs')
        && one.closest('[clip-path]') && !one.closest('[id*="matplotlib.axis"]'));
    const points = data.map(one => one.tagName === 'path' ? (one.getAttribute('d') || '').split(/[MLC]/).length - 1 : 2);
    return [svg.querySelector('title').textContent, points.reduce((a, b) => a + b, 0)];
})"""
#: What reaches out of the page on the right, and is not within something that scrolls by itself.
OVERFLOWS = """() => document.documentElement.scrollWidth > document.documentElement.clientWidth
    ? [...document.querySelectorAll('body *')].filter(one => !one.closest('.wide')
        && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.tagName) : []"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        yield found
        found.close()


class Opened:
    """A page as a reader has it, and everything that should not be."""

    def __init__(self, browser: Any, path: Path, colours: str, width: int) -> None:
        self.context = browser.new_context(color_scheme=colours, viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.console: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        kept = os.environ.get("SMLT_SCREENSHOTS")  # a folder: to look at them
        name = f"{path.parent.name}-{colours}-{width}.png"
        self.picture = self.page.screenshot(full_page=True, path=Path(kept) / name if kept else None)

    def fetched(self) -> list[str]:
        return [url for url in self.requests[1:] if not url.startswith("data:")]


def reported(folder: Path) -> Path:
    path = folder / "report.html"
    write_page(path, page(f"Run {folder.name}", contents_of(gather(Run.open(folder.parent, folder.name)))))
    return path


def event(time: float, name: str, **values: Any) -> str:
    return json.dumps({"time": BEGAN + time, "event": name, **values}) + "\n"


def lives(workers: int, seconds: float, generations: int) -> Iterator[str]:
    """In each generation a worker is lost or goes on in another invocation; every third is replaced by a spare."""

    def plan(time: float, number: int) -> str:
        ranks = {one: rank for rank, one in enumerate(ids)}
        return event(time, "plan", generation=number, world_size=workers, ranks=ranks)

    yield event(0, "begin", workers=workers)
    ids = [f"w{rank}" for rank in range(workers)]
    for rank, one in enumerate(ids):
        yield event(0.01, "started", worker_id=one, rank=rank)
        yield event(2 + rank / workers, "ready", worker_id=one)
    yield plan(3, 1)
    for number in range(1, generations + 1):
        at, rank, new = seconds * number / (generations + 1), number % workers, f"n{number}"
        more = {"spare": True} if number % 3 == 0 else {"before": ids[rank]} if number % 3 == 1 else {}
        yield event(at - 2, "started", worker_id=new, rank=workers if "spare" in more else rank, **more)
        yield event(at - 1, "ready", worker_id=new)
        how = "paused" if "before" in more else "was killed by signal 9"
        yield event(at, "ended", worker_id=ids[rank], rank=rank, how=how, code=0)
        yield event(at + 0.1, "freeze", generation=number + 1)
        ids[rank] = new
        yield plan(at + 0.5, number + 1)
    for rank, one in enumerate(ids):
        yield event(seconds, "ended", worker_id=one, rank=rank, how="done", code=0)
    yield event(seconds, "over", state="done", error=None)


def on_lambda(runs: Path) -> Path:
    """A run with a deadline, invocations, losses, spares."""
    made = Rounds(runs / "on-lambda", "lambda", Goal(deadline_s=2400))
    made.run(round_steps=140)
    made.save()
    (made.folder / "events.jsonl").write_text("".join(lives(8, made.elapsed_s, 6)))
    for rank in range(8):
        seen = Invocation(
            f"r-{rank}", f"w{rank}", rank, BEGAN, billed_ms=90_000, memory_mb=1769, max_memory_mb=900, outcome="done"
        )
        append_invocation(made.folder, seen)
    return made.folder


def disturbed(runs: Path) -> Path:
    """A run of this machine, one of whose workers was killed."""
    arguments = ("train", write_task(runs, PACED), "--workers", 2, "--global-batch-size", 16, "--epochs", 8, "--name", "here")
    with Running(*arguments, "--json", "--runs-dir", runs, cwd=runs, PACE="0.02") as run:
        run.wait_for(lambda one: one["event"] == "step" and one["step"] >= 3)
        dict(run.workers())[1].kill()
        run.wait_for(lambda one: one["event"] == "membership" and one["lost_ranks"])
        run.let_go()
        assert run.finish() == 0
    return runs / "here"


def failed(runs: Path) -> Path:
    script = write_task(runs, '\n        raise ValueError("no good")\n', name="bad.py")
    assert smlt("train", script, "--name", "failed", "--runs-dir", runs, cwd=runs).returncode != 0
    return runs / "failed"


def empty(runs: Path) -> Path:
    made = Rounds(runs / "empty", "local", Goal())
    made.status = {"state": "failed", "error": "the store did not start", "started": BEGAN, "ended": BEGAN + 1}
    made.save()
    return made.folder


def large(runs: Path) -> Path:
    """100,000 steps of 200 workers, 300 generations: the rows that are read as a whole have all of it."""
    folder = runs / "large"
    folder.mkdir()
    each = dict.fromkeys(("compute_s", "communication_s", "communication_total_s", "data_s"), [0.011] * 200)
    each = {**each, "data_s": [0.001] * 200, "communication_total_s": [0.02] * 200, "rss_mb": [900.0] * 200}
    whole = json.dumps({"samples": 512, "ranks": list(range(200)), **each})[1:-1]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            head = f'{{"kind": "step", "step": {step}, "epoch": {step // 1000}, "loss": {1 / step + 0.1 * (step % 7 == 0)}, '
            rest = whole if step % 64 == 1 or step == 100_000 else '"samples": 512, "ranks": []'
            file.write(f'{head}{rest}, "time": {BEGAN + step * 0.03}}}\n')
            if step % 1000 == 0:
                row = {"kind": "epoch", "epoch": step // 1000 - 1, "step": step, "metrics": {"accuracy": step / 1e5}}
                file.write(json.dumps(row) + "\n")
    (folder / "events.jsonl").write_text("".join(lives(200, 3000, 300)))
    config = {"script": "big.py", "workers": 200, "epochs": 100, "on": "lambda", "function": "big", "memory_mb": 1769}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "status.json").write_text(json.dumps({"state": "done", "started": BEGAN, "ended": BEGAN + 3001}))
    return folder


CHARTS = {
    on_lambda: 12,
    disturbed: 6,
    failed: 1,
    empty: 0,
    large: 7,
}


def test_a_chart_without_data_has_no_points(browser: Any, tmp_path: Path) -> None:
    with drawing():
        bare = Picture("bare", "Bare", "Axes and nothing else.", new_figure(2.0)[0])
    write_page(tmp_path / "bare.html", page("Bare", [Section("bare", "Bare", (bare,))]))
    opened = Opened(browser, tmp_path / "bare.html", "light", 1200)
    assert opened.page.evaluate(COUNT) == [["Bare", 0]]
    opened.context.close()


@pytest.mark.parametrize("make", CHARTS, ids=lambda make: make.__name__)
def test_a_report_is_whole_in_a_browser_light_dark_and_on_a_phone(make: Any, browser: Any, tmp_path: Path) -> None:
    path = reported(make(tmp_path))
    size = path.stat().st_size
    print(f"{make.__name__}: {size / 1e6:.2f} MB")
    assert size < PAGE_BYTES_MAX
    pictures = {}
    for colours, width in (("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)):
        opened = Opened(browser, path, colours, width)
        assert opened.console == []
        assert opened.fetched() == []
        charts = opened.page.evaluate(COUNT)
        assert len(charts) == CHARTS[make], [title for title, _ in charts]
        assert all(points >= 2 for _, points in charts), charts
        assert opened.page.evaluate(OVERFLOWS) == []
        for section in opened.page.query_selector_all("section"):  # every one has a chart, a table or a sentence
            assert section.query_selector("svg, table, p.note") is not None
        pictures[colours, width] = opened.picture
        opened.context.close()
    assert pictures["light", 1200] != pictures["dark", 1200]
    assert pictures["light", 390] != pictures["dark", 390]
