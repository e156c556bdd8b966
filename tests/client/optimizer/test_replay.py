"""`smlt optimize --replay FILE`: the optimizer on recorded results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smlt.cli import app
from smlt.client.optimizer.goals import Goal
from smlt.client.optimizer.observations import Observation, append_observation
from smlt.client.optimizer.replay import load_table, replay
from smlt.client.optimizer.space import Choice
from smlt.errors import ConfigError

ROWS = [
    {"workers": n, "memory_mb": m, "step_s": 4 / n / min(m / 1769, 1.5) + 0.05 + 0.004 * n}
    for n in (1, 2, 4, 8, 16, 32)
    for m in (1024, 1769, 3538)
]


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    path = tmp_path / "measured.csv"
    path.write_text("workers,memory_mb,step_s\n" + "".join(f"{r['workers']},{r['memory_mb']},{r['step_s']}\n" for r in ROWS))
    return path


def test_an_objective_is_made_as_large_as_possible_in_a_few_evaluations(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    values = [n / (1 + (n / 40) ** 1.8) for n in range(10, 150)]
    path.write_text(json.dumps({"model": "m", "first_workers": 10, "objective": values}))
    for seed in range(5):
        made = replay(load_table(path), seed=seed)
        assert len(made.evaluations) <= 5
        assert made.best.value >= 0.99 * max(values)
        assert made.table_best_value == pytest.approx(max(values))
        assert made.regret <= 0.01


def test_evaluations_are_different_rows_and_no_more_than_allowed(csv_file: Path) -> None:
    made = replay(load_table(csv_file), Goal(deadline_s=float("inf")), evaluations=3)
    assert 1 <= len(made.evaluations) == len({row.choice for row in made.evaluations}) <= 3


def test_a_table_of_step_times_is_searched_for_the_goal(csv_file: Path) -> None:
    table = load_table(csv_file)
    assert len(table.step_s) == len(ROWS)
    made = replay(table, Goal(deadline_s=600), evaluations=8, steps=1000)
    assert made.table_best_value > 0
    assert made.best.step_s * 1000 <= 600
    assert made.regret < 0.3


def test_json_rows_and_csv_rows_are_the_same_table(csv_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(ROWS))
    assert load_table(path).step_s == pytest.approx(load_table(csv_file).step_s)


def test_a_runs_observations_are_a_table(tmp_path: Path) -> None:
    for choice, step_s in ((Choice(2, 1769), 0.4), (Choice(4, 1769), 0.25), (Choice(4, 1769), 0.25), (Choice(8, 1769), 0.2)):
        append_observation(tmp_path, Observation(choice, step_s, 50, 64))
    table = load_table(tmp_path / "observations.jsonl")
    assert table.step_s == pytest.approx({Choice(2, 1769): 0.4, Choice(4, 1769): 0.25, Choice(8, 1769): 0.2})


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '[{"workers": 0, "step_s": 1}]', '[{"workers": 2, "step_s": -1}]', '{"objective": [1, 0]}', "[1]"]
)
def test_what_is_no_table_is_refused_with_its_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.json"):
        load_table(path)


def test_an_objective_takes_no_deadline(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_text('{"objective": [1, 2, 1]}')
    with pytest.raises(ConfigError, match="maximised"):
        replay(load_table(path), Goal(deadline_s=3))


def test_the_command_prints_what_it_tried_and_the_best(csv_file: Path) -> None:
    shown = CliRunner().invoke(app, ["optimize", "--replay", str(csv_file), "--deadline", "10m", "--evaluations", "6"])
    assert shown.exit_code == 0, shown.output
    assert "best of table" in shown.output
    found = CliRunner().invoke(app, ["optimize", "--replay", str(csv_file), "--goal", "time", "--json"])
    made = json.loads(found.output)
    assert made["rows"] == len(ROWS)
    assert made["goal"] == "least time"
    assert made["best"]["value"] >= made["table_best"]["value"]
