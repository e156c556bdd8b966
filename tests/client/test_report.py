"""A run's report: one page that needs nothing else, whatever the run has left behind; what its pictures are drawn from."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import environment, smlt, write_task
from tuned_folder import BEGAN, Rounds, model_of

from smlt.client.invocations import Invocation, append_invocation
from smlt.client.optimizer.goals import Goal, Phase, Standing
from smlt.client.optimizer.observations import Observation
from smlt.client.optimizer.space import Choice
from smlt.client.report.belief import eras_of, story_of, story_of_replay
from smlt.client.report.contents import Section, contents_of, pictures_of_search
from smlt.client.report.data import gather
from smlt.client.report.page import page
from smlt.client.report.pictures import COLOURS, write
from smlt.client.report.steps import POINTS_MAX, read_metrics
from smlt.client.runs import Run
from smlt.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's, of what is not a number

PAGE_BYTES_MAX = 5_000_000
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """A page as a strict reader sees it: every element closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.ids: Counter[str] = Counter()
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.append((name, value or ""))
            if name == "id":
                self.ids[value or ""] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def sections_of(folder: Path) -> dict[str, Section]:
    return {section.name: section for section in contents_of(gather(Run.open(folder.parent, folder.name)))}


def page_of(folder: Path) -> str:
    return page(f"Run {folder.name}", list(sections_of(folder).values()))


def names(section: Section) -> list[str]:
    return [picture.name for picture in section.pictures]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rounds]:
    """A run on Lambda with a deadline, and one on this machine without any goal."""
    runs = tmp_path_factory.mktemp("runs")
    made = {
        "lambda": Rounds(runs / "on-lambda", "lambda", Goal(deadline_s=2400)),
        "local": Rounds(runs / "here", "local", Goal()),
    }
    for one in made.values():
        one.run(round_steps=140)
        one.save()
    seen = Invocation("r-1", "w1", 0, BEGAN, billed_ms=90_000, memory_mb=1769, max_memory_mb=900, init_ms=300.0, outcome="done")
    append_invocation(made["lambda"].folder, seen)
    return made


def copied(run: Rounds, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.folder, tmp_path / run.folder.name))


# ---- the page ----


@pytest.mark.parametrize("on", ["lambda", "local"])
def test_a_page_parses_fetches_nothing_runs_nothing_and_is_small(tuned: dict[str, Rounds], on: str) -> None:
    text = page_of(tuned[on].folder)
    parsed = Page(text)
    assert len(text.encode()) < PAGE_BYTES_MAX
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in ("href", "src", "xlink:href", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), value[:80]
        assert not name.startswith("on")
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", text))
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in parsed.attributes


def test_every_picture_is_labelled_for_who_does_not_see_it_and_no_id_is_there_twice(tuned: dict[str, Rounds]) -> None:
    parsed = Page(page_of(tuned["lambda"].folder))
    assert parsed.tags["svg"] == parsed.tags["figure"] == 11
    assert max(parsed.ids.values()) == 1
    labels = [value.split() for name, value in parsed.attributes if name == "aria-labelledby"]
    assert {one for label in labels for one in label} <= set(parsed.ids)
    assert parsed.tags["desc"] == parsed.tags["svg"]
    for section in sections_of(tuned["lambda"].folder).values():
        for picture in section.pictures:
            assert len(picture.alt) > 30
            assert picture.table is None or all(len(row) == len(picture.table.header) for row in picture.table.rows)


def test_colours_stand_out_on_light_and_on_dark_pages_and_a_page_has_none_but_its_own(tuned: dict[str, Rounds]) -> None:
    def luminance(colour: str) -> float:  # WCAG 2.2
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for name, (light, dark) in COLOURS.items():
        assert contrast(light, "#ffffff") >= (4.5 if name == "text" else 3), name
        assert contrast(dark, "#0d1117") >= (4.5 if name == "text" else 3), name
    text = page_of(tuned["local"].folder)
    body = text[text.index("<body>") :]
    assert not [light for light, _ in COLOURS.values() if light in body]
    assert "prefers-color-scheme: dark" in text


def test_what_others_have_written_is_text_in_the_page_and_never_markup(tuned: dict[str, Rounds], tmp_path: Path) -> None:
    folder = copied(tuned["lambda"], tmp_path)
    evil = "</title></desc></svg><script>alert(1)</script><img src=x onerror=alert(1)>&'\"$\\frac{\x00\ud800"
    status = {"state": "failed", "error": evil, "metrics": {evil: 1.0}, "started": BEGAN, "ended": BEGAN + 9}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "config.json").write_text(json.dumps({"script": evil, "on": "lambda", "function": evil, "epochs": evil}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "epoch", "epoch": 10, "step": 980, "metrics": {evil: 0.5}}) + "\n")
        change = {
            "kind": "membership",
            "step": 980,
            "world_size": 3,
            "reasons": [evil],
            "noticed": BEGAN + 8,
            "recovery_s": 0.1,
        }
        file.write(json.dumps(change) + "\n")
    rows = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    (folder / "decisions.jsonl").write_text("".join(json.dumps({**row, "reason": evil, "action": evil}) + "\n" for row in rows))
    append_invocation(folder, Invocation("r-2", "w2", 1, BEGAN, billed_ms=9, memory_mb=128, max_memory_mb=9, outcome=evil[:70]))
    text = page_of(folder)
    parsed = Page(text)
    assert parsed.tags["script"] == parsed.tags["img"] == 0
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert "alert(1)" in "".join(parsed.words)
    assert "\x00" not in text
    text.encode()  # no half of a character is left


# ---- what is in it ----


def test_a_run_that_tuned_itself_has_forecasts_its_path_and_what_was_believed(tuned: dict[str, Rounds]) -> None:
    for on in ("lambda", "local"):
        sections = sections_of(tuned[on].folder)
        assert names(sections["training"]) == ["loss", "metrics"]
        assert names(sections["speed"]) == ["speed", "parts", "memory"]
        assert names(sections["goal"]) == ["forecasts"]
        assert names(sections["search"]) == ["path", "belief", "belief-history"]
        assert sections["search"].notes == ()
        assert ("functions" in sections) == (on == "lambda")
    belief = sections_of(tuned["lambda"].folder)["search"].pictures[1]
    assert "Maps over workers and memory" in belief.alt
    assert "Curves over the number of workers" in sections["search"].pictures[1].alt


def test_a_plain_run_has_its_curves_and_says_what_is_missing(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    assert smlt("train", script, "--workers", 2, "--epochs", 3, "--name", "plain", cwd=tmp_path).returncode == 0
    done = smlt("report", "--pictures", "figures", "--format", "png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report, *pictures = done.stdout.splitlines()
    assert [Path(one).stem for one in pictures] == ["loss", "metrics", "speed", "parts", "memory", "workers"]
    assert all((tmp_path / one).read_bytes().startswith(b"\x89PNG") for one in pictures)
    words = "".join(Page(Path(report).read_text()).words)
    assert "Run plain" in words
    assert "Nothing was forecast." in words
    assert "What the optimizer believed is not shown: workload.json is not there." in words
    done = smlt("report", "plain", "--json", "-o", "out/page.html", "--pictures", "svgs", cwd=tmp_path)
    row = json.loads(done.stdout)
    assert row["report"] == "out/page.html"
    assert (tmp_path / "out/page.html").is_file()
    assert any("decisions.jsonl" in one for one in row["missing"])
    svg = (tmp_path / "svgs/loss.svg").read_text()
    assert svg.count("<svg ") == 1
    assert "<metadata>" not in svg


def test_a_run_under_way_is_shown_as_far_as_it_has_come(tmp_path: Path) -> None:
    run = Rounds(tmp_path / "young", "lambda", Goal(budget_usd=1.0))
    run.save()
    with Run(tmp_path, "young").hold():
        sections = sections_of(run.folder)
        assert ("state", "under way: what follows is as far as it has come") in sections["summary"].tables[0][1].rows
        assert all(not section.pictures for section in sections.values())
        assert all(section.notes or section.tables for section in sections.values())
        run._round(50)
        sections = sections_of(run.folder)
        assert names(sections["training"]) == ["loss"]
        assert names(sections["search"]) == ["path", "belief", "belief-history"]
        (run.folder / "metrics.jsonl").open("a").write('{"kind": "step", "step": 51, "epoch": 0, "loss": 2.1, "sam')
        Page(page_of(run.folder))


FILES = (
    "metrics.jsonl",
    "events.jsonl",
    "decisions.jsonl",
    "observations.jsonl",
    "workload.json",
    "invocations.jsonl",
    "bill.json",
)
LEARNT_FROM = ("decisions.jsonl", "observations.jsonl", "workload.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "garbage", "numbers", "cut"])
def test_no_damaged_file_keeps_the_report_from_being_made(
    tuned: dict[str, Rounds], tmp_path: Path, file: str, damage: str
) -> None:
    path = copied(tuned["lambda"], tmp_path) / file
    if file not in LEARNT_FROM:  # the pictures of the search have nothing to do with it, and take the most time
        (path.parent / "workload.json").unlink()
    whole = path.read_bytes() if path.exists() else b"{}"
    path.write_bytes(
        {"empty": b"", "garbage": b"\xff\x00{[" * 50, "numbers": b"1\n[2]\n", "cut": whole[: len(whole) // 2]}.get(damage, b"")
    )
    if damage == "gone":
        path.unlink()
    sections = sections_of(path.parent)
    assert set(sections) == {"summary", "training", "speed", "workers", "cost", "goal", "search", "functions", "missing"}
    assert all(section.pictures or section.notes or section.tables for section in sections.values())


@pytest.mark.parametrize("file", ["metrics.jsonl", "decisions.jsonl", "observations.jsonl"])
def test_rows_without_a_field_or_with_another_kind_of_it_do_not_stop_the_report(
    tuned: dict[str, Rounds], tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smlt.client.report.belief.MOMENTS_MAX", 2)  # each is learnt anew, which takes the most time
    rows = [json.loads(line) for line in (tuned["lambda"].folder / file).read_text().splitlines()]
    rows = rows[::70] if len(rows) > 100 else rows
    folder = copied(tuned["lambda"], tmp_path)
    if file == "metrics.jsonl":  # the pictures of the search have nothing to do with it, and take the most time
        (folder / "workload.json").unlink()
    with monkeypatch.context() as patch:
        if file != "metrics.jsonl":  # learnt anew each time, but its maps are drawn in the second half only
            patch.setattr("smlt.client.report.contents.search_pictures", lambda story: [])
        for name in sorted({name for row in rows for name in row}):
            kept = [{k: v for k, v in row.items() if k != name} for row in rows]
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in kept))
            assert sections_of(folder)["missing"].notes
    strange = (None, "text", [], {"a": 1}, -1, 1e30)
    for shift in range(len(strange)):  # another field in each row
        lines = []
        for i, row in enumerate(rows):
            name = list(row)[(i + shift) % len(row)]
            lines.append(json.dumps({**row, name: strange[(i // len(row) + shift) % len(strange)]}) + "\n")
        (folder / file).write_text("".join(lines))
        assert sections_of(folder)["missing"].notes


def test_the_lives_of_workers_are_told_by_rank_with_who_was_lost_and_who_took_its_place(
    tuned: dict[str, Rounds], tmp_path: Path
) -> None:
    folder = copied(tuned["local"], tmp_path)
    happened: list[tuple[float, str, dict[str, Any]]] = [
        (0, "started", {"worker_id": "a", "rank": 0}),
        (0, "started", {"worker_id": "b", "rank": 1}),
        (1, "started", {"worker_id": "s", "rank": 2, "spare": True}),
        (2, "plan", {"generation": 1, "ranks": {"a": 0, "b": 1}}),
        (3, "ready", {"worker_id": "s"}),
        (10, "ended", {"worker_id": "b", "rank": 1, "how": "was killed by signal 9"}),
        (12, "plan", {"generation": 2, "ranks": {"a": 0, "s": 1}}),
        (20, "ended", {"worker_id": "a", "rank": 0, "how": "paused"}),
        (20, "started", {"worker_id": "c", "rank": 0, "before": "a"}),
        (22, "plan", {"generation": 3, "ranks": {"c": 0, "s": 1}}),
        (30, "ended", {"worker_id": "c", "rank": 0, "how": "done"}),
        (30, "ended", {"worker_id": "s", "rank": 1, "how": "done"}),
    ]
    lines = [json.dumps({"time": BEGAN + at, "event": event, **row}) + "\n" for at, event, row in happened]
    (folder / "events.jsonl").write_text("".join(lines))
    section = sections_of(folder)["workers"]
    (picture,) = section.pictures
    assert "4 workers' lives in 2 ranks over 30 s: 1 lost, 1 went on in another invocation, 1 started as spares" in picture.alt
    assert picture.table is not None
    assert picture.table.rows == (
        ("0", "2", "0", "1", "26.0", "0.0", "4.0", "0.0"),
        ("1", "2", "1", "0", "26.0", "0.0", "4.0", "9.0"),
    )
    assert section.tables[0][1].rows == (("b", "1", "10 s", "was killed by signal 9"),)


def test_a_million_steps_are_a_thousand_points_and_no_spike_is_lost(tmp_path: Path) -> None:
    count = 30_000
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, count + 1):
            loss: Any = 50.0 if step == 12_345 else None if step == 17 else 1 / step
            each = {
                name: [0.001, 0.002] for name in ("compute_s", "communication_s", "communication_total_s", "data_s", "rss_mb")
            }
            row = {"kind": "step", "step": step, "epoch": step // 10, "loss": loss, "samples": 64, "ranks": [0, 1], **each}
            file.write(json.dumps({**row, "time": BEGAN + step / 100}) + "\n")
            if step % 10 == 0:
                file.write(
                    json.dumps({"kind": "epoch", "epoch": step // 10, "step": step, "metrics": {"accuracy": 0.5}}) + "\n"
                )
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert steps.count == count
    assert steps.unread == 0
    assert steps.loss.size <= POINTS_MAX
    assert POINTS_MAX <= steps.step.size <= 2 * POINTS_MAX + 1
    assert len(steps.epochs) <= POINTS_MAX
    assert (steps.step[0], steps.step[-1]) == (1, count)
    assert steps.epochs[-1]["step"] == count
    assert np.nanmax(steps.loss_high) == 50
    assert np.nanmin(steps.loss_low) == pytest.approx(1 / count)
    assert np.median(steps.samples_per_s[1:]) == pytest.approx(6400)


# ---- what is drawn ----


@pytest.mark.parametrize("on", ["lambda", "local"])
def test_what_is_drawn_is_what_the_optimizer_believed(tuned: dict[str, Rounds], on: str) -> None:
    run = tuned[on]
    story, why = story_of(gather(Run.open(run.folder.parent, run.folder.name)))
    assert story is not None, why
    steps = run.step
    believed = run.optimizer.landscape(None, Standing(0.0, 0.0, (Phase(steps, 512),)))
    for name in ("step_s", "std_log", "seconds", "usd", "odds"):
        np.testing.assert_allclose(getattr(story.whole.landscape, name), getattr(believed, name), rtol=1e-3, atol=1e-6)
    assert story.path[-1] == run.choice
    assert len(story.moments) > 1
    assert [moment.observed for moment in story.moments] == sorted({moment.observed for moment in story.moments})
    rows = [json.loads(line) for line in (run.folder / "decisions.jsonl").read_text().splitlines()]
    assert story.moments[0].current == Choice(**rows[0]["choice"])
    assert story.moments[-1].observed == len(rows)


def test_an_era_begins_with_the_round_in_which_a_change_of_the_dynamics_was_noticed(
    tuned: dict[str, Rounds], tmp_path: Path
) -> None:
    folder = copied(tuned["lambda"], tmp_path)
    rows = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    rows[2]["reason"] = "3 workers were lost; steps have become slower: 1.5 s instead of 1 s; " + rows[2]["reason"]
    rows[4]["dynamics_changed"] = True
    (folder / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = gather(Run.open(tmp_path, folder.name))
    assert [len(era) for era in eras_of(data.observations, data.decisions)] == [2, 2, len(data.observations) - 4]


@pytest.mark.parametrize("tried", [0, 1, 6])
def test_a_replay_has_the_same_pictures_of_its_search(tmp_path: Path, tried: int) -> None:
    model, space = model_of("lambda")
    choices = [Choice(workers, 1769) for workers in (8, 16, 4, 10, 12, 9)][:tried]
    observations = [Observation(one, 1.2 * model.step_s(one, 512), 20, 512) for one in choices]
    standing = Standing(0.0, 0.0, (Phase(980, 512),))
    story = story_of_replay(space, model, Goal(budget_usd=2.0), observations, standing, chosen=Choice(9, 1769))
    pictures = pictures_of_search(story)
    assert [one.name for one in pictures] == ["belief", "belief-history"]
    assert [write(one, tmp_path, kind).suffix for one in pictures for kind in ("svg", "png")] == [".svg", ".png"] * 2
    assert story.path[-1] == Choice(9, 1769)


# ---- without the extra ----


def test_without_matplotlib_the_command_says_what_to_install(tuned: dict[str, Rounds], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'smlt\[report\]'"):
        sections_of(tuned["local"].folder)


def test_the_command_line_does_not_import_matplotlib_before_it_draws() -> None:
    code = "import smlt.cli, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_wrong_arguments_are_refused_before_anything_is_written(tuned: dict[str, Rounds], tmp_path: Path) -> None:
    runs = tuned["local"].folder.parent
    for arguments, words in (
        (("here", "--format", "gif"), "--format gif: svg or png, please"),
        (("nowhere",), "there is no run nowhere"),
        (("here", "--output", "/proc/none/report.html"), "/proc/none/report.html cannot be written"),
    ):
        done = smlt("report", *arguments, "--runs-dir", runs, "--pictures", tmp_path / "pictures", cwd=tmp_path)
        assert done.returncode not in (0, 1)
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "pictures").exists()
