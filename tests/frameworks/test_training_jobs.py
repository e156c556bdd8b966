"""`smlt train` on the examples of every framework; one worker of each is killed and replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import Running, rows, status, steps
from lines import installed

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("framework", installed("tensorflow", "jax", "mxnet", "sklearn"))
def test_a_killed_worker_is_replaced_and_the_digits_are_learnt(framework: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    epochs = 40 if framework in ("mxnet", "jax") else 15
    with Running(
        *("train", EXAMPLES / f"digits_{framework}.py", "--workers", 2, "--epochs", epochs, "--json", "--name", "digits"),
        cwd=tmp_path,
    ) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] >= 5)
        dict(run.workers())[1].kill()
        assert run.finish() == 0, run.errors.read_text()
    folder = tmp_path / "smlt-runs" / "digits"
    assert status(folder)["state"] == "done"
    assert status(folder)["metrics"]["accuracy"] > 0.93
    assert [number for number, _ in steps(folder)] == list(range(1, epochs * 23 + 1))
    assert [row["epoch"] for row in rows(folder) if row["kind"] == "epoch"] == list(range(epochs))
    assert any(event["event"] not in ("started", "step", "epoch", "ended") for event in run.events)  # it was replaced
