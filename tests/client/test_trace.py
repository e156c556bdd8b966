"""smlt trace and smlt doctor --tune at the command line, against a real embedded store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def smlt(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "smlt", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_trace_prints_phases_and_writes_a_file_for_a_viewer(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    printed = smlt("trace", "--workers", "2", "--floats", "200000", "--out", str(out))
    assert printed.splitlines()[0].split()[:3] == ["worker", "total", "encode"]
    assert {row["pid"] for row in json.loads(out.read_text())["traceEvents"]} == {0, 1}
    rows = [json.loads(line) for line in smlt("trace", "-n", "2", "--floats", "1000", "--json").splitlines()]
    assert [row["rank"] for row in rows] == [0, 1]


def test_tune_measures_and_keeps_what_later_runs_use(tmp_path: Path) -> None:
    kept = tmp_path / "tuning.json"
    rows = [json.loads(line) for line in smlt("doctor", "--tune", "--json", SMLT_TUNING=str(kept)).splitlines()]
    assert {"tuning", "tuning kept"} <= {row["name"] for row in rows}
    assert json.loads(kept.read_text())["local"]["link_bytes_per_s"] > 0
