"""Tasks: found in scripts, with clear words for what is missing; and trained alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from smlt.errors import ConfigError, TaskError
from smlt.worker.config import WorkerConfig
from smlt.worker.task import load_task

EXAMPLES = Path(__file__).parents[2] / "examples"
WHOLE = """
import smlt
class Mine(smlt.Task):
    def model(self): pass
    def data(self): pass
    def loss(self, model, batch): pass
    def optimizer(self, model): pass
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import nonexistent_module\n",
            r"script\.py does not import: ModuleNotFoundError: No module named 'nonexistent_module'",
        ),
        ("raise SystemExit(3)\n", "does not import: SystemExit: 3"),
        ("def f(:\n", "does not import: SyntaxError"),
        ("import smlt\n", "holds no task"),
        (WHOLE + WHOLE.replace("Mine", "Other"), r"holds 2 tasks \(Mine, Other\)"),
        ("import smlt\nclass A(smlt.Task):\n    def model(self): pass\n", r"class A lacks data\(\), loss\(\), optimizer\(\)"),
    ],
)
def test_a_script_that_will_not_do_is_told_why(tmp_path: Path, source: str, message: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(source)
    with pytest.raises(TaskError, match=message):
        load_task(script)


def test_a_script_finds_the_modules_beside_it(tmp_path: Path) -> None:
    (tmp_path / "my_neighbour_module.py").write_text("X = 5\n")
    (tmp_path / "script.py").write_text("from my_neighbour_module import X\n" + WHOLE + "    x = X\n")
    assert load_task(tmp_path / "script.py").x == 5  # type: ignore[attr-defined]


def test_an_example_runs_by_plain_python() -> None:
    command = [sys.executable, str(EXAMPLES / "digits_numpy.py"), "--epochs", "2"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2/2: loss ")
    assert float(lines[1].rpartition("accuracy ")[2]) > 0.8


def test_a_configuration_survives_json_and_refuses_what_it_does_not_know() -> None:
    config = WorkerConfig(
        run="r", job="j", rank=0, world_size=2, object_store_url="/x", script="s.py", epochs=1, global_batch_size=2
    )
    assert WorkerConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match=r"unknown \['y'\] and lacks"):
        WorkerConfig.from_json('{"y": 1}')
    with pytest.raises(ConfigError, match="not JSON"):
        WorkerConfig.from_json("{")
    with pytest.raises(ConfigError, match="epochs 0 is not positive"):
        WorkerConfig.from_json(config.to_json().replace('"epochs": 1', '"epochs": 0'))
