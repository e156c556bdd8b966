"""What `smlt train` says and leaves behind when the script, a worker or the store fails."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import HOLD, Running, all_gone, keys_of, parameters, smlt, status, steps, write_task

from smlt.store.embedded import EmbeddedStore

JOB = ("--workers", 3, "--epochs", 2, "--global-batch-size", 16)


def one_line(text: str) -> bool:
    return text.startswith("smlt: ") and text.count("\n") == 1 and text.endswith("\n")


def test_a_worker_that_raises_shows_its_traceback_once(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(
        tmp_path, f'\n        if number == 3 and one_worker({str(tmp_path)!r}):\n            raise ValueError("b" + "oom")\n'
    )
    with Running("train", script, *JOB, "--store", store.url, "--json", "--name", "boom", cwd=tmp_path) as run:
        run.wait_for(lambda event: event["event"] == "started")
        assert run.finish() == 5
        told = run.errors.read_text()
        processes = run.events  # the events before the end are still JSON
    assert processes[-1]["event"] == "ended"
    assert told.count("Traceback") == 1
    assert told.count("in before_step") == 1
    assert "failed at step 2: ValueError: boom" in told
    end = status(tmp_path / "smlt-runs" / "boom")
    assert end["state"] == "failed"
    assert "ValueError: boom" in end["error"]
    assert keys_of(store.url, "boom") == []


def test_a_script_that_does_not_import_shows_the_traceback_once(store: EmbeddedStore, tmp_path: Path) -> None:
    script = write_task(tmp_path)
    script.write_text("import smlt\n\nNUMBER = 1 / 0\n")
    done = smlt("train", script, *JOB, "--store", store.url, "--name", "import", cwd=tmp_path)
    assert done.returncode == 5
    assert done.stderr.count("Traceback") == 1
    assert "ZeroDivisionError" in done.stderr
    assert "line 3" in done.stderr
    assert keys_of(store.url, "import") == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n", "holds no task"),
        ("import smlt\n\nclass A(smlt.Task):\n    def model(self): return {}\n", "lacks data(), loss(), optimizer()"),
    ],
)
def test_a_script_that_lacks_a_part_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "part.py").write_text(text)
    done = smlt("train", "part.py", *JOB, cwd=tmp_path)
    assert done.returncode == 5
    assert one_line(done.stderr)
    assert told in done.stderr


@pytest.mark.parametrize(
    ("text", "told"), [("def broken(:\n    pass\n", "task.py, line 1"), (None, "there is no script task.py")]
)
def test_a_script_that_is_no_python_leaves_no_run_behind(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / "task.py").write_text(text)
    done = smlt("train", "task.py", *JOB, cwd=tmp_path)
    assert done.returncode == 5
    assert one_line(done.stderr)
    assert told in done.stderr
    assert not (tmp_path / "smlt-runs").exists()


DISAPPEARING = pytest.mark.parametrize(
    ("how", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9"),
        ("os._exit(0)", "ended with exit code 0"),
        ("sys.exit(7)", "ended with exit code 7|has left the job"),  # whichever is seen first: it takes leave of the others
    ],
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the job without a failure."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert smlt("train", write_task(folder), *JOB, "--name", "run", cwd=folder).returncode == 0
    return folder / "smlt-runs" / "run"


@DISAPPEARING
def test_a_worker_that_disappears_is_replaced_and_the_curve_is_the_same(
    store: EmbeddedStore, tmp_path: Path, undisturbed: Path, how: str, told: str
) -> None:
    script = write_task(tmp_path, f"\n        if number == 3 and one_worker({str(tmp_path)!r}):\n            {how}\n")
    done = smlt("train", script, *JOB, "--store", store.url, "--name", "gone", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(told, done.stdout)
    assert "3 workers go on after" in done.stdout
    run = tmp_path / "smlt-runs" / "gone"
    assert steps(run) == steps(undisturbed)
    assert parameters(run) == parameters(undisturbed)
    assert status(run)["restarts"] == 1
    assert keys_of(store.url, "gone") == []


@DISAPPEARING
def test_a_worker_that_disappears_ends_the_others_when_it_is_to_stop(
    store: EmbeddedStore, tmp_path: Path, how: str, told: str
) -> None:
    script = write_task(tmp_path, f"\n        if number == 3 and one_worker({str(tmp_path)!r}):\n            {how}\n")
    arguments = ("--on-failure", "stop", "--store", store.url, "--name", "gone", "--json")
    with Running("train", script, *JOB, *arguments, cwd=tmp_path) as run:
        run.wait_for(lambda event: event["event"] == "started")
        processes = run.descendants()
        assert run.finish() == 4
        said = run.errors.read_text()
    assert said.startswith("smlt: worker ")
    assert re.search(told, said)
    assert f"its log: {tmp_path}/smlt-runs/gone/logs/worker-" in said
    assert all_gone(processes)
    assert status(tmp_path / "smlt-runs" / "gone")["state"] == "failed"
    assert keys_of(store.url, "gone") == []


def test_a_worker_over_its_memory_ends_the_run(tmp_path: Path) -> None:
    done = smlt("train", write_task(tmp_path), *JOB, "--epochs", 2000, "--memory", 2, cwd=tmp_path)
    assert done.returncode == 4
    assert one_line(done.stderr)
    assert "over its limit of 2 MB" in done.stderr


@pytest.fixture
def no_redis() -> Iterator[int]:
    """The port of a server that speaks something else."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.recv(1000)
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_a_store_that_cannot_be_used_is_one_line_without_the_password(
    store: EmbeddedStore, tmp_path: Path, no_redis: int
) -> None:
    script = write_task(tmp_path)
    address = store.tcp_url.partition("@")[2]
    for url, told in (
        ("redis://:secret-word@127.0.0.1:1", "cannot be reached"),
        (f"redis://:secret-word@{address}", "password"),
        (f"redis://:secret-word@127.0.0.1:{no_redis}", "127.0.0.1"),
    ):
        done = smlt("train", script, *JOB, cwd=tmp_path, SMLT_STORE=url)
        assert done.returncode == 3
        assert done.stdout == ""
        assert one_line(done.stderr)
        assert told in done.stderr
        assert "secret-word" not in done.stderr


def test_a_store_that_dies_ends_the_run_and_every_worker(tmp_path: Path) -> None:
    script = write_task(tmp_path, HOLD)
    job = ("--workers", 2, "--epochs", 100, "--global-batch-size", 16, "--timeout", 2, "--json")
    with (
        EmbeddedStore() as own,
        Running("train", script, *job, "--store", own.url, cwd=tmp_path, HOLD=str(tmp_path)) as run,
    ):
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == 29)
        processes = run.descendants()
        own.close()
        assert run.finish() == 3
        assert one_line(run.errors.read_text())
    assert all_gone(processes)


# ---- --resume of what is not whole ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder with a run of two epochs in it, named "run"."""
    folder = tmp_path_factory.mktemp("finished")
    assert smlt("train", write_task(folder), *JOB, "--name", "run", cwd=folder).returncode == 0
    return folder / "smlt-runs"


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def every_checkpoint(run: Path) -> None:
    for path in (run / "checkpoints").glob("*/tensors.safetensors"):
        corrupt(path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda run: shutil.rmtree(run), "there is no run run"),
        (lambda run: (run / "config.json").unlink(), "config.json is missing"),
        (lambda run: (run / "config.json").write_text('{"script": "tiny.py", "epochs": "many"}'), "config.json"),
        (lambda run: (run / "config.json").write_text("{"), "config.json"),
        (lambda run: (run / "status.json").unlink(), "status.json is missing"),
        (lambda run: (run / "code" / "MANIFEST.json").unlink(), "code/MANIFEST.json is missing"),
        (lambda run: (run / "code" / "tiny.py").unlink(), "code/tiny.py is missing"),
        (lambda run: corrupt(run / "code" / "tiny.py"), "code/tiny.py is not what was uploaded"),
        (every_checkpoint, "tensors.safetensors is corrupt"),
    ],
)
def test_resume_of_an_incomplete_run_names_what_is_missing(
    finished: Path, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    shutil.copytree(finished, tmp_path / "smlt-runs")
    damage(tmp_path / "smlt-runs" / "run")
    done = smlt("train", "--resume", "run", "--epochs", 4, cwd=tmp_path)
    assert done.returncode == 6
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_resume_falls_back_to_the_checkpoint_before_a_corrupt_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "smlt-runs")
    run = tmp_path / "smlt-runs" / "run"
    corrupt(max((run / "checkpoints").iterdir()) / "tensors.safetensors")
    done = smlt("train", "--resume", run, "--epochs", 3, "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert "trying the checkpoint before" in done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(5, 13))  # epochs 2 and 3
