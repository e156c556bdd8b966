"""A whole training job as Lambda functions, against `smlt lambda-local`: the same bits as with local workers?

    python -m bench.on_lambda [--script examples/digits.py] [--workers 8] [--epochs 300] [--time-limit 10]
                              [--throttle 0.2] [--duplicate 0.1] [--kill 0.05] [--seed 0] [--json FILE]

Trains by local workers, then by functions without disturbance, then with a function timeout of --time-limit seconds and the
faults, and compares losses, metrics and the last checkpoint. Exit code 1 when they differ or something is left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import boto3

from smlt.emulator import LambdaLocal

FUNCTION, BUCKET, ROLE, IMAGE = "digits", "smlt-bench", "smlt-bench-role", "bench/smlt:latest"
ROOT = Path(__file__).parents[1]


def smlt(*arguments: object, cwd: Path, environment: dict[str, str]) -> float:
    """Run a command to its end; returns its seconds."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "smlt", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - began


def rows(run: Path) -> list[dict[str, Any]]:
    """The run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[Any]:
    """Step, loss and metrics as the run has them."""
    return [(row["step"], row.get("loss"), row.get("metrics")) for row in rows(run) if row["kind"] in ("step", "epoch")]


def last_tensors(objects: dict[str, bytes]) -> str:
    """SHA-256 of the newest checkpoint's tensors."""
    newest = max(key for key in objects if key.endswith("/tensors.safetensors"))
    return sha256(objects[newest]).hexdigest()


def in_bucket(local: LambdaLocal, prefix: str) -> dict[str, bytes]:
    """The objects below a prefix."""
    client = boto3.client("s3", endpoint_url=local.endpoint_url, region_name="us-east-1", **local.credentials)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [row["Key"] for page in pages for row in page.get("Contents", [])]
    return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, default=ROOT / "examples" / "digits.py")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--time-limit", type=int, default=10)
    parser.add_argument("--throttle", type=float, default=0.2)
    parser.add_argument("--duplicate", type=float, default=0.1)
    parser.add_argument("--kill", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    script = options.script.resolve()
    job = ("--workers", options.workers, "--epochs", options.epochs, "--max-restarts", 20, "--json")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="smlt-bench-") as name, LambdaLocal(seed=options.seed) as local:
        folder = Path(name)
        environment = local.environment()
        local_s = smlt("train", script, *job, "--name", "local", cwd=folder, environment={})
        runs = folder / "smlt-runs"
        expected = curve(runs / "local")
        tensors = {p.as_posix(): p.read_bytes() for p in (runs / "local" / "checkpoints").rglob("*.safetensors")}
        deploy = ("deploy", FUNCTION, BUCKET, script, ROLE, "--create-bucket", "--create-role", "--image", IMAGE)
        on = ("--on", "lambda", "--function", FUNCTION)
        good = True
        for kind in ("undisturbed", "disturbed"):
            limit = 900 if kind == "undisturbed" else options.time_limit
            smlt(*deploy, "--timeout", limit, cwd=folder, environment=environment)
            if kind == "disturbed":
                local.faults.throttle, local.faults.duplicate, local.faults.kill = (
                    options.throttle,
                    options.duplicate,
                    options.kill,
                )
                local.faults.kill_after_s = (0.0, float(options.time_limit))
            seconds = smlt("train", script, *job, *on, "--name", kind, cwd=folder, environment=environment)
            local.faults.throttle = local.faults.duplicate = local.faults.kill = 0.0
            run = runs / kind
            reasons = [reason for row in rows(run) if row["kind"] == "membership" for reason in row["reasons"]]
            status = json.loads((run / "status.json").read_text())
            objects = in_bucket(local, f"{kind}/")
            result[kind] = {
                "same_curve": curve(run) == expected,
                "same_tensors": last_tensors(objects) == last_tensors(tensors),
                "seconds": round(seconds, 1),
                "seconds_local": round(local_s, 1),
                "steps": status["step"],
                "invoked_again": reasons.count("time limit"),
                "workers_lost": sum("worker" in reason for reason in reasons),
                "snapshots_left": sum("/snapshots/" in key for key in objects),
                "cost_usd": status.get("cost_usd"),
            }
            good &= result[kind]["same_curve"] and result[kind]["same_tensors"] and not result[kind]["snapshots_left"]
        result["injected"] = dict(local.injected)
        result["invocations"] = len(local.invocations)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
