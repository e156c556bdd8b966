"""`--metrics-port`: a real run's metrics, scraped over HTTP and read as Prometheus reads them."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from commandline import HOLD, Running, smlt, write_task

from smlt.client.events import FILE as EVENTS
from smlt.client.runs import Run
from smlt.client.spent import spent_so_far
from smlt.errors import ConfigError

parser = pytest.importorskip("prometheus_client.parser")

JOB = ("--workers", 2, "--epochs", 10, "--global-batch-size", 16, "--codec", "fp32", "--json", "--name", "run")
HELD_STEP = 29


class Scrape:
    """What is served at a URL, by name and labels."""

    def __init__(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            text = answer.read().decode()
        self.families = {family.name: family for family in parser.text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, /, **labels: str) -> float:
        (found,) = [one.value for one in self.samples if one.name == name and labels.items() <= one.labels.items()]
        return float(found)


def url_of(run: Running) -> str:
    event = run.wait_for(lambda event: event["event"] == "preparing" and "metrics at" in event["text"])
    found = re.fullmatch(r"metrics at (http://127\.0\.0\.1:\d+/metrics)", event["text"])
    assert found is not None
    return found[1]


def at_step(run: Running, number: int) -> dict[str, Any]:
    return run.wait_for(lambda event: event["event"] == "step" and event["step"] == number)


def listens(url: str) -> bool:
    host, port = re.findall(r"//([^:]+):(\d+)/", url)[0]
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def test_a_run_under_way_tells_what_it_does_and_a_run_that_has_ended_nothing(tmp_path: Path) -> None:
    script = write_task(tmp_path, HOLD)
    with Running("train", script, *JOB, "--metrics-port", 0, cwd=tmp_path, HOLD=str(tmp_path)) as run:
        url = url_of(run)
        last = at_step(run, HELD_STEP)
        seen = Scrape(url)
        steps = [event for event in run.events if event["event"] == "step"]
        assert seen.value("smlt_steps_total", run="run") == HELD_STEP
        assert seen.value("smlt_samples_total") == HELD_STEP * 16
        assert (seen.value("smlt_step"), seen.value("smlt_workers")) == (HELD_STEP, 2)
        assert (seen.value("smlt_epochs"), seen.value("smlt_epochs_completed")) == (10, 7)
        assert seen.value("smlt_loss") == last["loss"]
        accuracy = [event["metrics"]["accuracy"] for event in run.events if event["event"] == "epoch"][-1]
        assert seen.value("smlt_metric", name="accuracy") == accuracy
        assert seen.value("smlt_step_seconds_count") == HELD_STEP - 1
        assert seen.value("smlt_compute_seconds_sum") == pytest.approx(sum(max(row["compute_s"]) for row in steps))
        assert seen.value("smlt_worker_seconds_total", part="compute") == pytest.approx(
            sum(sum(row["compute_s"]) for row in steps)
        )
        assert seen.value("smlt_worker_memory_bytes", rank="1") == pytest.approx(last["rss_mb"][1] * 1e6)
        states = {one.labels["state"]: one.value for one in seen.samples if one.name == "smlt_run_state"}
        assert states == {"running": 1, "done": 0, "stopped": 0, "failed": 0}
        assert (seen.value("smlt_worker_restarts_total"), seen.value("smlt_cost_usd")) == (0, 0)
        (tmp_path / "go").touch()
        assert run.finish() == 0
    assert not listens(url)


def test_names_units_and_labels_are_as_prometheus_wants_them(tmp_path: Path) -> None:
    script = write_task(tmp_path, HOLD)
    with Running("train", script, *JOB, "--metrics-port", 0, cwd=tmp_path, HOLD=str(tmp_path)) as run:
        url = url_of(run)
        at_step(run, HELD_STEP)
        seen = Scrape(url)
        (tmp_path / "go").touch()
        assert run.finish() == 0
    for name, family in seen.families.items():
        assert re.fullmatch(r"smlt_[a-z_]+", name)
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["run"] == "run"
            if family.type == "counter":
                assert sample.name.endswith(("_total", "_created"))


def test_a_lost_worker_is_counted_and_so_is_who_takes_its_place(tmp_path: Path) -> None:
    # The worker that is left waits again, in its third step from there.
    again = HOLD + HOLD.replace("number == 30", "number == 33").replace('"go"', '"go-on"')
    script = write_task(tmp_path, again)
    with Running("train", script, *JOB, "--metrics-port", 0, cwd=tmp_path, HOLD=str(tmp_path)) as run:
        url = url_of(run)
        at_step(run, HELD_STEP)
        dict(run.workers())[1].kill()
        (tmp_path / "go").touch()
        change = run.wait_for(lambda event: event["event"] == "membership")
        seen = Scrape(url)
        (tmp_path / "go-on").touch()
        assert run.finish() == 0
    assert seen.value("smlt_workers_lost_total") == seen.value("smlt_worker_restarts_total") == 1
    assert seen.value("smlt_generation") == change["generation"] == 2
    assert seen.value("smlt_recovery_seconds_total") == pytest.approx(change["recovery_s"])


def test_a_port_in_use_is_an_error_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = smlt("train", write_task(tmp_path), *JOB, "--metrics-port", port, cwd=tmp_path)
    assert done.returncode == ConfigError.exit_code
    assert f"127.0.0.1 port {port}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "smlt-runs").exists()


def test_a_resumed_run_serves_at_its_port_again_or_at_another_that_is_asked_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = write_task(tmp_path)
    assert smlt("train", script, *JOB, "--metrics-port", port, cwd=tmp_path).returncode == 0
    config = tmp_path / "smlt-runs" / "run" / "config.json"
    again = smlt("resume", "run", "--epochs", 11, cwd=tmp_path)
    assert f"metrics at http://127.0.0.1:{port}/metrics" in again.stdout
    with socket.create_server(("127.0.0.1", port)):
        refused = smlt("resume", "run", "--epochs", 12, cwd=tmp_path)
        assert refused.returncode == ConfigError.exit_code
        assert json.loads(config.read_text())["epochs"] == 11
        other = smlt("train", "--resume", "run", "--epochs", 12, "--metrics-port", 0, cwd=tmp_path)
    assert other.returncode == 0
    assert "metrics at http://127.0.0.1:" in other.stdout
    assert json.loads(config.read_text())["metrics_port"] == 0


def test_who_scrapes_at_once_is_told_the_same_cost(tmp_path: Path) -> None:
    run = Run(tmp_path, "run")
    run.path.mkdir()
    run.write_config({"on": "lambda", "memory_mb": 1024})
    run.write_status(state="stopped", architecture="x86_64")
    with (run.path / EVENTS).open("w") as file:
        for number in range(2000):
            worker = {"time": 100.0, "event": "started", "worker_id": f"w{number}", "rank": number, "spare": False}
            file.write(json.dumps(worker) + "\n")
        file.write(json.dumps({"time": 110.0, "event": "over", "state": "stopped", "error": None}) + "\n")
    usd = spent_so_far(run)
    found: list[float] = []
    threads = [threading.Thread(target=lambda: found.append(usd())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    # 2,000 functions of 1 GB for 10 s, and their requests: https://aws.amazon.com/lambda/pricing/, us-east-1
    assert math.isclose(found[0], 2000 * (10 * 0.0000166667 + 0.2e-6), rel_tol=1e-3)
