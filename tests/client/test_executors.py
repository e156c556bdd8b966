"""Executors as plug-ins: which there are, what one from elsewhere can do, and what workers on other machines are given."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commandline import REPOSITORY, all_gone, environment, eventually, keys_of, rows, same_end, smlt, write_task

from smlt.client.executors.elsewhere import place_elsewhere, private_url
from smlt.client.executors.registry import BUILT_IN, GROUP
from smlt.client.request import RunRequest, check_request
from smlt.errors import ConfigError
from smlt.store.embedded import EmbeddedStore
from smlt.store.secrets import resolve_store_url
from smlt.worker.config import WorkerConfig

JOB = ("--workers", 2, "--epochs", 5, "--global-batch-size", 16, "--codec", "fp32")
#: In the example's page: a file to be made.
TITLE = '```python title="ssh_executor.py"\n'
#: Logs in to nowhere: a shell of this machine runs the command. Its stdin closes when it is killed, as a connection's does.
SSH = '#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\necho "$1" >> "$SSH_HOSTS"\nshift\nexec sh -c "$*"\n'


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which two packages lie as if installed: the documentation's, and one that is broken."""
    folder = tmp_path_factory.mktemp("plugins")
    page = (REPOSITORY / "docs" / "executors.md").read_text()
    (folder / "ssh_executor.py").write_text(page.partition(TITLE)[2].partition("```")[0])
    register(folder, "ssh-executor", 'ssh = "ssh_executor:SshExecutor"')
    register(folder, "broken", 'broken = "no_such_module:Executor"\nlocal = "no_such_module:Another"')
    return folder


def register(folder: Path, package: str, points: str) -> None:
    lines = [line.replace('"', "") for line in points.splitlines()]
    info = folder / f"{package.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))


def with_plugins(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{REPOSITORY}:{folder}"}


def test_this_package_registers_the_executors_that_its_source_tree_has() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == BUILT_IN


def test_executors_are_listed_with_their_packages_and_a_broken_one_keeps_no_other_from_use(
    plugins: Path, tmp_path: Path
) -> None:
    listed = smlt("executors", "--json", cwd=tmp_path, **with_plugins(plugins))
    assert (listed.returncode, listed.stderr) == (0, "")
    found = {row["name"]: row for row in map(json.loads, listed.stdout.splitlines())}
    assert list(found) == [*BUILT_IN, "broken", "ssh"]
    assert (found["ssh"]["package"], found["ssh"]["usable"]) == ("ssh-executor 1.2", True)
    assert found["ssh"]["what"] == "Processes of other machines, by SSH."
    assert "hosts" in found["ssh"]["options"]
    assert found["local"]["usable"]  # nobody else's package takes a name of this one's
    assert "No module named 'no_such_module'" in found["broken"]["lacks"]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nowhere", {}, "choose one of local, lambda, lithops, ray, broken, ssh"),
        ("broken", {}, "executor broken of broken 1.2 cannot be loaded: ModuleNotFoundError"),
        ("ssh", {"host": "a"}, "--on-option host: --on ssh has no such option; those it has: hosts"),
    ],
)
def test_an_executor_that_cannot_be_used_is_told_with_those_that_can(
    plugins: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, str], said: str
) -> None:
    monkeypatch.syspath_prepend(plugins)
    with pytest.raises(ConfigError, match=said):
        check_request(RunRequest("task.py", on=name, on_options=options))


def test_what_cannot_work_is_said_before_there_is_a_run(plugins: Path, tmp_path: Path) -> None:
    done = smlt("train", write_task(tmp_path), "--on", "ssh", cwd=tmp_path, **with_plugins(plugins))
    assert done.returncode == 2
    assert "workers there cannot reach this machine's embedded store: give --store" in done.stderr
    assert not (tmp_path / "smlt-runs").exists()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    assert smlt("train", write_task(folder), *JOB, "--name", "local", cwd=folder).returncode == 0
    return folder / "smlt-runs" / "local"


def test_the_executor_of_the_documentation_trains_to_the_bits_of_local_workers_and_replaces_one_that_dies(
    plugins: Path, expected: Path, store: EmbeddedStore, tmp_path: Path
) -> None:
    dies = '\n        if number == 8 and one_worker(os.environ["FOLDER"]):\n            os.kill(os.getpid(), signal.SIGKILL)\n'
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("ssh", SSH), ("python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    password, _, address = store.tcp_url.removeprefix("redis://:").rpartition("@")
    more = {
        **with_plugins(plugins),
        "PATH": f"{programs}:/usr/bin:/bin",
        "SSH_HOSTS": str(tmp_path / "hosts"),
        "STORE_PASSWORD": password,
        "FOLDER": str(tmp_path),
    }
    where = ("--on", "ssh", "--on-option", "hosts=one,two", "--object-store", tmp_path / "objects")
    url = f"redis://{address}?password_env=STORE_PASSWORD"
    done = smlt("train", write_task(tmp_path, dies), *JOB, *where, "--store", url, "--name", "there", cwd=tmp_path, **more)
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "smlt-runs" / "there"
    (run / "checkpoints").symlink_to(tmp_path / "objects" / "there" / "checkpoints")
    same_end(run, expected)
    assert [row["lost_ranks"] for row in rows(run) if row["kind"] == "membership"] != []
    assert set((tmp_path / "hosts").read_text().split()) == {"one", "two"}
    assert password not in (run / "config.json").read_text()
    assert keys_of(store.url, "there") == []


@pytest.mark.parametrize(
    ("store_url", "object_store", "said"),
    [
        (None, "s3://bucket/runs", "cannot reach this machine's embedded store"),
        ("redis://host", None, "do not have this machine's runs folder"),
        ("unix:///run/store", "s3://bucket/runs", "over the network only"),
        ("redis://:secret@host", "s3://bucket/runs", "is not given a password"),
        ("redis://host?password=secret", "s3://bucket/runs", "is not given a password"),
    ],
)
def test_what_workers_elsewhere_cannot_be_given_is_refused_and_no_password_is_shown(
    store_url: str | None, object_store: str | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        place_elsewhere(RunRequest("task.py", object_store=object_store), store_url, "Kubernetes")
    assert "secret@" not in str(raised.value)
    assert "=secret" not in str(raised.value)


def test_a_password_is_handed_on_in_a_file_that_only_this_user_can_read() -> None:
    with private_url("redis://:secret@localhost:1") as url:
        assert "secret" not in url.removeprefix("file:")
        path = Path(url.removeprefix("file://"))
        assert (path.stat().st_mode & 0o077, path.parent.stat().st_mode & 0o077) == (0, 0)
        assert resolve_store_url(url) == "redis://:secret@localhost:1"
    assert not path.parent.exists()


@pytest.fixture
def call() -> Iterator[subprocess.Popen[str]]:
    """A process that runs `work` with the configurations that it reads, as an engine would."""
    program = "import sys; from smlt.worker.called import work; print(work(*sys.stdin.readline().split(maxsplit=1)[::-1]))"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment()) as process:
        yield process
        process.kill()


def test_a_worker_ends_when_the_call_that_runs_it_is_killed(call: subprocess.Popen[str], store: EmbeddedStore) -> None:
    from smlt import __version__

    config = WorkerConfig("run", "no-job", 0, 1, "/nonexistent", "task.py", 1, 1, store_url=store.url)
    assert call.stdin is not None
    call.stdin.write(f"{__version__} {config.to_json()}\n")
    call.stdin.flush()
    caller = psutil.Process(call.pid)
    assert eventually(lambda: bool(caller.children()))
    (worker,) = caller.children()
    call.kill()
    assert all_gone([worker])


def test_a_call_by_another_version_is_refused_and_says_so(call: subprocess.Popen[str]) -> None:
    config = WorkerConfig("run", "job", 0, 1, "", "task.py", 1, 1)
    output, _ = call.communicate(f"0.0.1 {config.to_json()}\n", timeout=30)
    assert "'exit_code': 2" in output
    assert "the run is by smlt 0.0.1: install the same" in output
