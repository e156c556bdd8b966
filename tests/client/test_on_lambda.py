"""Training by Lambda functions: the same bits as by local workers, whatever Lambda does to the invocations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import eventually, keys_of, parameters, rows, smlt, status, steps, write_task
from functions import FUNCTION, Cloud, cloud

from smlt.store.embedded import EmbeddedStore

JOB = ("--workers", 3, "--epochs", 20, "--global-batch-size", 16)
LAST_STEP = 80
#: A step takes so long: for a test to have time to disturb it.
SLOW = "\n        time.sleep(0.04)\n"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"), SLOW)


@pytest.fixture(scope="module")
def deployed(script: Path) -> Iterator[Cloud]:
    with cloud(script, seed=3) as made:
        yield made


@pytest.fixture(autouse=True)
def undisturbed(deployed: Cloud) -> Iterator[None]:
    yield
    faults = deployed.local.faults
    faults.throttle = faults.duplicate = faults.kill = 0.0


@pytest.fixture(scope="module")
def expected(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same job by local workers."""
    folder = tmp_path_factory.mktemp("local")
    assert smlt("train", script, *JOB, "--name", "local", cwd=folder).returncode == 0
    return folder / "smlt-runs" / "local"


def metrics(run: Path) -> list[Any]:
    return [(row["step"], row["metrics"]) for row in rows(run) if row["kind"] == "epoch"]


def same_end(deployed: Cloud, run: Path, expected: Path) -> None:
    assert status(run)["state"] == "done"
    assert [number for number, _ in steps(run)] == list(range(1, LAST_STEP + 1))
    assert steps(run) == steps(expected)
    assert metrics(run) == metrics(expected)
    assert deployed.parameters(run.name) == parameters(expected)
    assert [key for key in deployed.objects(f"{run.name}/") if "/snapshots/" in key] == []


def reasons(run: Path) -> list[str]:
    return [reason for row in rows(run) if row["kind"] == "membership" for reason in row["reasons"]]


def test_a_run_ends_in_the_bits_of_local_workers_and_is_billed(
    deployed: Cloud, script: Path, expected: Path, tmp_path: Path
) -> None:
    before = len(deployed.local.invocations)
    done = deployed.train(script, *JOB, "--name", "calm", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "smlt-runs" / "calm"
    same_end(deployed, run, expected)
    assert reasons(run) == []
    made = deployed.local.invocations[before:]
    written = [json.loads(line) for line in (run / "invocations.jsonl").read_text().splitlines()]
    assert sorted(row["request_id"] for row in written) == sorted(record.request_id for record in made)
    assert sorted(row["rank"] for row in written) == [-1, 0, 1, 2]  # first of all a probe
    assert sum(row["billed_ms"] for row in written) == sum(record.billed_ms for record in made)
    bill = json.loads((run / "bill.json").read_text())
    assert bill["total_usd"] > 0
    assert f"{bill['total_usd']:.6f}" in smlt("status", "calm", cwd=tmp_path).stdout
    again = smlt("bill", "calm", "--from-log", "--json", cwd=tmp_path, **deployed.environment)
    assert json.loads(again.stdout) == bill
    keys = {name: value for name, value in deployed.environment.items() if "KEY" in name}
    assert smlt("bill", "calm", "--from-log", cwd=tmp_path, **keys).returncode == 0  # the run knows which AWS it is on
    quantities = {item["name"]: item["quantity"] for item in bill["items"]}
    code = len(deployed.objects("calm/code/"))
    checkpoints = 20 * 4  # state, tensors, manifest and a look for older ones
    assert quantities["S3 writes"] * 1000 >= code + checkpoints  # what this machine has sent, too
    assert quantities["S3 reads"] > 0


def test_a_larger_tmp_is_on_the_bill(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    deployed.deploy(script, "--tmp", 2048)
    try:
        assert deployed.train(script, *JOB, "--epochs", 1, "--name", "large-tmp", cwd=tmp_path).returncode == 0
    finally:
        deployed.deploy(script)
    bill = json.loads((tmp_path / "smlt-runs" / "large-tmp" / "bill.json").read_text())
    assert "function disk" in {item["name"] for item in bill["items"]}


def test_throttled_duplicated_and_killed_invocations_and_time_limits_change_no_bit(
    deployed: Cloud, script: Path, expected: Path, tmp_path: Path
) -> None:
    deployed.deploy(script, "--timeout", 3)
    faults = deployed.local.faults
    faults.throttle, faults.duplicate, faults.kill, faults.kill_after_s = 0.2, 0.1, 0.05, (0.5, 2.5)
    before = len(deployed.local.invocations)
    done = deployed.train(script, *JOB, "--name", "rough", "--max-restarts", 50, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "smlt-runs" / "rough"
    same_end(deployed, run, expected)
    assert "time limit" in reasons(run)
    assert deployed.local.injected["throttle"] > 0
    billed = [json.loads(line) for line in (run / "invocations.jsonl").read_text().splitlines()]
    assert eventually(lambda: len(deployed.local.invocations) - before >= len(billed))  # a killed one is billed as well
    assert {row["request_id"] for row in billed} <= {record.request_id for record in deployed.local.invocations[before:]}


def test_functions_whose_scheduler_is_gone_stop_at_a_checkpoint_and_the_run_is_resumed(
    deployed: Cloud, script: Path, expected: Path, store: EmbeddedStore, tmp_path: Path
) -> None:
    """The store needs a password, which functions are not given in an event: it is in their environment."""
    deployed.deploy(script, "--env", f"SMLT_STORE_PASSWORD={store.tcp_url.split('@')[0].rpartition(':')[2]}")
    where = ("--store", f"redis://{store.tcp_url.rpartition('@')[2]}")
    deployed.environment["SMLT_STORE_PASSWORD"] = store.tcp_url.split("@")[0].rpartition(":")[2]
    with deployed.running(script, *JOB, "--name", "orphans", *where, cwd=tmp_path) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == 10)
        run.process.kill()
        run.process.wait()
    done = smlt("stop", "orphans", cwd=tmp_path, **deployed.environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "its 3 workers were stopped" in done.stdout
    assert keys_of(store.url, "orphans") == []
    assert smlt("resume", "orphans", cwd=tmp_path, **deployed.environment).returncode == 0
    same_end(deployed, tmp_path / "smlt-runs" / "orphans", expected)
    assert keys_of(store.url, "orphans") == []


def test_a_stopped_run_leaves_no_invocation_under_way(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    before = len(deployed.local.invocations)
    with deployed.running(script, *JOB, "--epochs", 1000, "--name", "stopped", cwd=tmp_path) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == 5)
        assert smlt("stop", "stopped", cwd=tmp_path, **deployed.environment).returncode == 0
        run.finish()
    step = status(tmp_path / "smlt-runs" / "stopped")["checkpoint_step"]
    assert step >= 5
    away = smlt("status", "stopped", cwd=tmp_path, AWS_ENDPOINT_URL="http://127.0.0.1:1", AWS_REGION="us-east-1")
    assert (away.returncode, away.stderr) == (0, "")  # AWS is not needed to tell what is known here
    assert f"step {step}" in away.stdout
    assert len(deployed.local.invocations) == before + 4  # a probe and three workers: all are over


def test_now_ends_functions_in_the_middle_of_a_step(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    before = len(deployed.local.invocations)
    with deployed.running(script, *JOB, "--epochs", 1000, "--name", "killed", cwd=tmp_path) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == 5)
        assert smlt("stop", "killed", "--now", cwd=tmp_path, **deployed.environment).returncode == 0
        run.finish()
    assert len(deployed.local.invocations) == before + 4


def test_another_memory_is_an_alias_and_leaves_the_function_as_it_is(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    job = ("--workers", 2, "--epochs", 1, "--global-batch-size", 16)
    for name in ("small", "again"):
        before = len(deployed.local.invocations)
        assert deployed.train(script, *job, "--memory", 512, "--name", name, cwd=tmp_path).returncode == 0
        assert {record.memory_mb for record in deployed.local.invocations[before:]} == {512}
    client = deployed.client("lambda")
    assert client.get_function_configuration(FunctionName=FUNCTION)["MemorySize"] == 1769
    aliases = client.list_aliases(FunctionName=FUNCTION)["Aliases"]
    assert [alias["Name"] for alias in aliases] == ["smlt-512mb"]
    versions = client.list_versions_by_function(FunctionName=FUNCTION)["Versions"]
    assert [version["Version"] for version in versions] == ["$LATEST", aliases[0]["FunctionVersion"]]  # none for "again"


@pytest.mark.parametrize("package", ["", "pieces"])
def test_a_warm_sandbox_runs_the_code_of_each_run(deployed: Cloud, tmp_path: Path, package: str) -> None:
    """A package without an __init__.py, too."""
    wanted = f"from {package} import sizes" if package else "import sizes"
    script = write_task(tmp_path, f"\n        {wanted}\n        print('size', sizes.SIZE)\n")
    (tmp_path / package).mkdir(exist_ok=True)
    job = ("--workers", 2, "--epochs", 1, "--global-batch-size", 16)
    before = len(deployed.local.invocations)
    for size in (1, 2):
        (tmp_path / package / "sizes.py").write_text(f"SIZE = {size}\n")
        assert deployed.train(script, *job, "--name", f"size{package}-{size}", cwd=tmp_path).returncode == 0
        logs = tmp_path / "smlt-runs" / f"size{package}-{size}" / "logs"
        printed = "".join(path.read_text() for path in logs.glob("worker-*"))
        assert f"size {size}" in printed
        assert f"size {3 - size}" not in printed
    cold = [record for record in deployed.local.invocations[before:] if record.init_ms is not None]
    assert len(cold) < len(deployed.local.invocations[before:]) / 2


def test_a_worker_whose_twin_was_first_is_not_lost(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    """Whose answer comes is Lambda's choice: that of the one that trains, or of the one that was refused."""
    deployed.local.faults.duplicate = 1.0
    job = (*JOB, "--epochs", 2, "--on-failure", "stop", "--name", "twins")
    done = deployed.train(script, *job, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_that_is_not_needed_any_more_leaves(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    before = len(deployed.local.invocations)
    with deployed.running(script, *JOB, "--epochs", 1000, "--name", "scaled", cwd=tmp_path) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == 5)
        for workers in (4, 3):
            assert smlt("scale", "scaled", "--workers", workers, cwd=tmp_path).returncode == 0
            run.wait_for(lambda event, size=workers: event["event"] == "membership" and event["world_size"] == size)
        assert eventually(lambda: len(deployed.local.invocations) == before + 2, 10.0)  # a probe, and the fourth worker
        assert smlt("stop", "scaled", cwd=tmp_path, **deployed.environment).returncode == 0
        run.finish()
    assert len(deployed.local.invocations) == before + 5


def test_more_workers_than_may_run_at_once_are_not_waited_for(deployed: Cloud, script: Path, tmp_path: Path) -> None:
    client = deployed.client("lambda")
    client.put_function_concurrency(FunctionName=FUNCTION, ReservedConcurrentExecutions=3)
    try:
        with deployed.running(script, *JOB, "--epochs", 1000, "--name", "many", cwd=tmp_path) as run:
            run.wait_for(lambda event: event["event"] == "step" and event["step"] == 5)
            assert smlt("scale", "many", "--workers", 4, cwd=tmp_path).returncode == 0
            said = run.wait_for(lambda event: event["event"] == "warning" or event.get("step", 0) > 200)
            assert smlt("stop", "many", cwd=tmp_path, **deployed.environment).returncode == 0
            run.finish()
    finally:
        client.delete_function_concurrency(FunctionName=FUNCTION)
    assert said.get("text") == "smlt scale: 4 workers: the function may have 3 invocations at once"
