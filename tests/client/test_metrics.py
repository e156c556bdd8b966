"""`--metrics-port`: a run under way, asked over HTTP as Prometheus does."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path

import pytest
from commandline import HOLD, Running, eventually, smlt, write_task

pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families


def scraped(url: str) -> dict[tuple[str, str], float]:
    """(name, the label beside the run's) -> value."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for family in families:
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("run", "le")}
            if "le" not in sample.labels:
                found[sample.name, ",".join(labels.values())] = sample.value
            assert sample.labels["run"] == "held"
    return found


def test_a_run_under_way_answers_with_its_numbers_and_nobody_answers_when_it_has_ended(tmp_path: Path) -> None:
    (tmp_path / "hold").mkdir()
    script = write_task(tmp_path, HOLD)
    arguments = (
        "train",
        script,
        "--workers",
        2,
        "--global-batch-size",
        16,
        "--epochs",
        10,
        "--name",
        "held",
        "--json",
        "--metrics-port",
        0,
    )
    with Running(*arguments, cwd=tmp_path, HOLD=str(tmp_path / "hold")) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] >= 20)
        told = str(run.events) + run.errors.read_text()
        address = re.search(r"http://127\.0\.0\.1:\d+/metrics", told)
        assert address is not None, told
        assert eventually(lambda: scraped(address[0])["smlt_steps_total", ""] == 29)  # all that come before it is let go
        found = scraped(address[0])
        assert found["smlt_run_state", "running"] == 1
        assert found["smlt_run_state", "done"] == 0
        assert found["smlt_samples_total", ""] == 29 * 16
        assert found["smlt_workers", ""] == 2
        assert found["smlt_epochs_completed", ""] == 7
        assert found["smlt_epochs", ""] == 10
        assert 0 <= found["smlt_metric", "accuracy"] <= 1
        assert found["smlt_compute_seconds_count", ""] == 29
        assert found["smlt_worker_memory_bytes", "1"] > 1e6
        assert found["smlt_worker_restarts_total", ""] == 0
        assert {part for name, part in found if name == "smlt_worker_seconds_total"} == {
            "compute",
            "communication_exposed",
            "communication_hidden",
            "data",
        }
        (tmp_path / "hold/go").touch()
        assert run.finish() == 0
        with pytest.raises(OSError, match="refused"):
            scraped(address[0])


def test_a_port_in_use_is_an_error_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = smlt("train", write_task(tmp_path), "--name", "never", "--metrics-port", port, cwd=tmp_path)
    assert done.returncode not in (0, 1)
    assert f"--metrics-port {port}: 127.0.0.1 port {port}: Address already in use" in done.stderr
    assert not (tmp_path / "smlt-runs/never").exists()
