"""The uploaded layer under Lambda's runtime client: on a bare Python it trains, and serves handlers of users' own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commandline import rows, smlt, status, write_task
from functions import BUCKET, ROLE, Cloud

from smlt.emulator import LambdaLocal
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore

HANDLER = Path(__file__).parents[2] / "examples" / "lambda_handler.py"


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with LambdaLocal(settle_s=0.2) as local:
        yield Cloud(local)


def deploy(cloud: Cloud, name: str, script: Path, layer: Path, *more: object) -> list[dict[str, Any]]:
    """Deploy from a zip and the layer; what was done, row by row."""
    made = ("--create-bucket", "--create-role", "--layer", layer, "--json")
    done = smlt("deploy", name, BUCKET, script, ROLE, *made, *more, cwd=script.parent, **cloud.environment)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_functions_of_the_uploaded_layer_train_and_a_second_deployment_sends_nothing(
    cloud: Cloud, layer: Path, tmp_path: Path
) -> None:
    script = write_task(tmp_path)
    assert deploy(cloud, "trainer", script, layer)[-1]["sent_bytes"] > layer.stat().st_size
    assert deploy(cloud, "trainer", script, layer)[-1]["sent_bytes"] == 0
    job = ("--workers", 2, "--epochs", 5, "--global-batch-size", 16, "--name", "bare", "--codec", "fp32")
    done = cloud.train(script, *job, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert status(tmp_path / "smlt-runs" / "bare")["state"] == "done"
    losses = [row["loss"] for row in rows(tmp_path / "smlt-runs" / "bare") if row["kind"] == "step"]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2


def test_a_handler_of_ones_own_keeps_its_connections_while_its_sandbox_is_frozen(
    cloud: Cloud, layer: Path, store: EmbeddedStore
) -> None:
    deploy(cloud, "mean", HANDLER, layer, "--handler", "lambda_handler.handler")
    client, parameters = cloud.client("lambda"), ParameterStore(store.tcp_url, job="mean")
    version = client.publish_version(FunctionName="mean")["Version"]

    def invoke(rank: int) -> dict[str, Any]:
        """Each rank has sandboxes of its own: those of another version."""
        event = {"smlt": {"store": store.tcp_url, "job": "mean", "rank": rank, "world_size": 2}}
        answer = client.invoke(FunctionName="mean", Qualifier=["$LATEST", version][rank], Payload=json.dumps(event))
        value: dict[str, Any] = json.loads(answer["Payload"].read())
        return value

    def connections() -> set[str]:
        return {row["id"] for row in parameters.client.client_list() if row["name"].startswith("smlt")}

    others = connections()
    seen = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert list(pool.map(invoke, range(2))) == [{"rank": rank, "mean": 0.5} for rank in range(2)]
            seen.append(connections() - others)
    assert len(seen[0]) >= 2
    assert seen[0] == seen[1] == seen[2]
    assert sum(record.init_ms is not None for record in cloud.local.invocations if record.function == "mean") == 2
    parameters.sweep()
    parameters.close()
