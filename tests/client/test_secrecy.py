"""The store's password appears nowhere, however it is given and however a run ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from commandline import HOLD, Running, smlt, status, write_task

from smlt.client.doctor import diagnose
from smlt.store.embedded import EmbeddedStore

JOB = ("--workers", 2, "--epochs", 9, "--global-batch-size", 16, "--json")
#: Quoted it is another text, of which a part stays in place: what is looked for.
CORE = "hunter2correcthorse"
PASSWORD = f"p/a?{CORE}#@%20:&"
WRONG = f"wrong{CORE}"

#: How a task fails, as lines of its `before_step`.
ENDS = {
    "well": "",
    "raises": "        if number == 35:\n            raise ValueError(sorted(os.environ.items()))\n",
    "is killed": "        if number == 35:\n            os.kill(os.getpid(), signal.SIGKILL)\n",
}


def private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text + "\n")
    return path


#: Ways to give a password: from (address, password, a folder outside of the run) to arguments and environment.
Way = Callable[[str, str, Path], tuple[tuple[str, ...], dict[str, str]]]
WAYS: dict[str, Way] = {
    "SMLT_STORE": lambda at, word, _: ((), {"SMLT_STORE": f"redis://:{quote(word, safe='')}@{at}"}),
    "SMLT_STORE_PASSWORD": lambda at, word, _: (("--store", f"redis://{at}"), {"SMLT_STORE_PASSWORD": word}),
    "SMLT_STORE_PASSWORD_FILE": lambda at, word, folder: (
        ("--store", f"redis://{at}"),
        {"SMLT_STORE_PASSWORD_FILE": str(private(folder / "word", word))},
    ),
    "SMLT_STORE_FILE": lambda at, word, folder: (
        (),
        {"SMLT_STORE_FILE": str(private(folder / "url", f"redis://:{quote(word, safe='')}@{at}"))},
    ),
    "password_file": lambda at, word, folder: (("--store", f"redis://{at}?password_file={private(folder / 'w', word)}"), {}),
    "password_secret": lambda at, word, folder: (
        ("--store", f"redis://{at}?password_secret=file://{private(folder / 'w', word)}"),
        {},
    ),
    "SMLT_STORE is a secret": lambda at, word, folder: (
        (),
        {"SMLT_STORE": f"file://{private(folder / 'url', f'redis://:{quote(word, safe=str())}@{at}')}"},
    ),
}


@pytest.fixture(scope="module")
def server() -> object:
    with EmbeddedStore() as store:
        import redis

        redis.Redis.from_url(store.url).acl_setuser(
            "default", enabled=True, passwords=["+" + PASSWORD], keys=["*"], channels=["*"], commands=["+@all"]
        )
        yield store.tcp_url.partition("@")[2]


def looked_through(folder: Path) -> int:
    """Look for the password in every file below; returns how many there are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert CORE.encode() not in path.read_bytes(), path
    return len(files)


def command_lines(run: Running) -> list[str]:
    lines = []
    for process in [psutil.Process(run.process.pid), *run.descendants()]:
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return lines


@pytest.mark.parametrize(
    ("way", "end"), [*((way, "well") for way in WAYS), *(("SMLT_STORE_PASSWORD", end) for end in ENDS if end != "well")]
)
def test_a_run_shows_the_password_nowhere(server: str, tmp_path: Path, way: str, end: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "work").mkdir()
    arguments, environment = WAYS[way](server, PASSWORD, tmp_path / "secret")
    # What a task shows of its environment comes into a log, with the variables that lead to the password.
    dump = "        print(sorted(os.environ.items()), self.__dict__)\n"
    script = write_task(tmp_path / "work", "\n" + dump + HOLD.lstrip("\n") + ENDS[end])
    with Running(
        *("train", script, *JOB, "--name", "run", *arguments),
        cwd=tmp_path / "work",
        HOLD=str(tmp_path / "work"),
        SMLT_DEBUG="1",
        **environment,
    ) as run:
        run.wait_for(lambda event: event["event"] == "step" and event["step"] == 29)
        lines = command_lines(run)
        assert len(lines) >= 3  # this one and two workers
        assert not any(CORE in line for line in lines)
        (tmp_path / "work" / "go").touch()
        code = run.finish()
        assert CORE not in json.dumps(run.events)
    assert (code == 0) == (end != "raises")  # who is killed is replaced
    assert looked_through(tmp_path / "work") > 6  # the run folder, the standard error


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("debug", ["", "1"])
def test_a_wrong_password_is_not_shown_with_or_without_a_traceback(server: str, tmp_path: Path, way: str, debug: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "work").mkdir()
    arguments, environment = WAYS[way](server, WRONG, tmp_path / "secret")
    script = write_task(tmp_path / "work")
    for command in (("train", script, *JOB), ("launch", "-n", 2), ("doctor",)):
        more = (script,) if command[0] == "launch" else ()
        done = smlt(*command, *arguments, *more, cwd=tmp_path / "work", SMLT_DEBUG=debug, **environment)
        assert done.returncode in ((1, 3) if debug else (3,)), done.stderr  # Python's own for a traceback is 1
        assert ("Traceback" in done.stderr) == (debug == "1" and command[0] != "doctor")
        assert CORE not in done.stdout + done.stderr
    looked_through(tmp_path / "work")


def test_a_launched_script_finds_the_url_in_its_environment_only(server: str, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "s.py").write_text(
        "import os, sys, time, smlt\n"
        "comm = smlt.init()\n"
        "print(sorted(name for name in os.environ if name.startswith('SMLT_STORE')), comm, comm.parameter_store, flush=True)\n"
        "smlt.barrier()\n"
        "sys.exit(smlt.allreduce(smlt.rank(), op='sum') != 1)\n"
    )
    arguments, environment = WAYS["SMLT_STORE_PASSWORD_FILE"](server, PASSWORD, tmp_path / "secret")
    done = smlt("launch", "-n", 2, *arguments, "s.py", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("['SMLT_STORE']") == 2
    assert CORE not in done.stdout + done.stderr


# ---- code that was exchanged ----


def test_a_resumed_run_refuses_other_code_than_it_was_started_with(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    job = ("--workers", 1, "--epochs", 2, "--global-batch-size", 16)
    assert smlt("train", script, *job, "--name", "run", "--object-store", "objects", cwd=tmp_path).returncode == 0
    code = tmp_path / "objects" / "run" / "code"
    assert status(tmp_path / "smlt-runs" / "run")["code_sha256"] == sha256((code / "MANIFEST.json").read_bytes()).hexdigest()
    evil = (code / "tiny.py").read_bytes() + b"\nprint('evil')\n"
    (code / "tiny.py").write_bytes(evil)
    (code / "MANIFEST.json").write_text(json.dumps({"tiny.py": sha256(evil).hexdigest()}))
    done = smlt("train", "--resume", "run", "--epochs", 4, cwd=tmp_path)
    assert done.returncode == 6
    assert "code/MANIFEST.json is not what was uploaded" in done.stderr
    assert "evil" not in (tmp_path / "smlt-runs/run/logs/worker-0.log").read_text()


def test_a_module_that_was_put_beside_the_code_is_not_imported(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    job = ("--workers", 1, "--epochs", 2, "--global-batch-size", 16)
    assert smlt("train", script, *job, "--name", "run", cwd=tmp_path).returncode == 0
    (tmp_path / "smlt-runs/run/code/numpy.py").write_text("raise SystemExit('planted')\n")
    done = smlt("train", "--resume", "run", "--epochs", 3, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# ---- smlt doctor ----


def findings(url: str | None, **more: bool) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.status, finding.text) for finding in diagnose(url, **more)}


def test_doctor_says_where_the_password_comes_from(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", PASSWORD)
    open_file = private(tmp_path / "open", PASSWORD)
    open_file.chmod(0o644)
    quoted = quote(PASSWORD, safe="")
    for url, status_, told in (
        (f"redis://:{quoted}@{server}", "ok", "from the URL"),
        (f"redis://{server}?password_env=TOKEN", "ok", "from the variable TOKEN (password_env)"),
        (f"redis://{server}?password_file={open_file}", "ok", f"from the file {open_file} (password_file)"),
        (f"redis://{server}?password_secret=env:TOKEN", "ok", "from env:TOKEN (password_secret)"),
    ):
        found = findings(url)
        assert found["store password"] == (status_, told)
        assert found["store TLS"] == ("ok", "off: the store is on this machine")
        assert found["store"][0] == "ok"
        assert ("store secret" in found) == ("open" in url)
        assert CORE not in repr(found)
    assert findings(f"redis://:{quoted}@{server}", in_process_list=True)["store password"][0] == "warn"
    assert findings("redis://h?password_env=NONE")["store"] == (
        "fail",
        "password_env: the environment variable NONE is not set; export it, or change password_env",
    )


@pytest.mark.parametrize(
    ("url", "password", "tls"),
    [
        ("redis://:x@192.0.2.1", "ok", ("warn", "off: the password and all gradients travel in plain text")),
        ("redis://192.0.2.1", "warn", ("warn", "off: all gradients travel in plain text")),
        ("rediss://:x@192.0.2.1", "ok", ("ok", "on, verified by the system's authorities")),
        ("rediss://:x@192.0.2.1?ssl_ca_certs=/ca.pem", "ok", ("ok", "on, verified by /ca.pem")),
        ("rediss://:x@192.0.2.1?ssl_cert_reqs=none", "ok", ("warn", "on, but the store's certificate is not verified")),
        ("redis://:x@127.0.0.9", "ok", ("ok", "off: the store is on this machine")),
        ("redis://:x@[::1]", "ok", ("ok", "off: the store is on this machine")),
        ("unix:///tmp/s?password=x", "ok", ("ok", "not needed: a unix socket")),
    ],
)
def test_doctor_says_whether_what_travels_can_be_read(url: str, password: str, tls: tuple[str, str]) -> None:
    from smlt.client.doctor import secrecy
    from smlt.store.secrets import find_store

    address = find_store(url)
    assert address is not None
    found = {finding.name: finding for finding in secrecy(address)}
    assert found["store password"].status == password
    assert found["store TLS"].status == tls[0]
    assert found["store TLS"].text.startswith(tls[1])


def test_doctor_warns_of_a_password_on_the_command_line(server: str, tmp_path: Path) -> None:
    url = f"redis://:{quote(PASSWORD, safe='')}@{server}"
    done = smlt("doctor", "--store", url, "--json", cwd=tmp_path)
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows["store password"]["status"] == "warn"
    assert "every user of this machine can see it" in rows["store password"]["text"]
    assert CORE not in done.stdout + done.stderr
    done = smlt("doctor", "--json", cwd=tmp_path, SMLT_STORE=url)
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows["store password"]["status"] == "ok"
