"""Several nodes of a store at the command line: starting them, and what functions can and cannot be given of them."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import Running, eventually

from smlt.cli.store import up
from smlt.client.deployment.request import store_secrets
from smlt.client.lambda_runs import check_reference, through
from smlt.errors import ConfigError
from smlt.store.parameter import ParameterStore

SECRET = "password_secret=aws-secretsmanager://store"


def started(running: Running, file: Path, *, servers: int, places: int) -> list[int]:
    """The processes that `smlt store up --url-file` says it has, once its store has been looked at."""
    said = running.wait_for(lambda row: "nodes" in row)
    assert said["url_file"] == str(file)
    assert [row["memory_bytes"] for row in said["nodes"]] == [64 << 20] * servers
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with contextlib.closing(ParameterStore(file.read_text().strip(), job="up")) as parameters:
        assert len(parameters.propose_places()) == places
        assert len(parameters.survey()) == servers
    return [int(row["pid"]) for row in said["nodes"]]


def test_store_up_serves_until_it_is_asked_to_end(tmp_path: Path) -> None:
    file = tmp_path / "store.url"
    with Running("store", "up", "--cluster", "--memory", "64", "--url-file", file, "--json", cwd=tmp_path) as running:
        pids = started(running, file, servers=1, places=1)
        running.process.send_signal(signal.SIGINT)
        assert running.finish() == 0
    assert not file.exists()
    assert eventually(lambda: not any(map(psutil.pid_exists, pids)))


def test_store_up_ends_when_a_server_dies_that_has_no_replica(tmp_path: Path) -> None:
    file = tmp_path / "store.url"
    with Running("store", "up", "--nodes", "2", "--memory", "64", "--url-file", file, "--json", cwd=tmp_path) as running:
        pids = started(running, file, servers=2, places=2)
        os.kill(pids[1], signal.SIGKILL)
        assert running.finish() == 3
    assert f"server 1 (process {pids[1]}) has died" in running.errors.read_text()
    assert not file.exists()
    assert eventually(lambda: not any(map(psutil.pid_exists, pids)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "0 nodes: a store has 1 to 64"),
        ({"replicas": 1}, "--replicas is for --cluster"),
        ({"url_file": Path(__file__)}, "there is such a file"),
    ],
)
def test_store_up_says_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        up(**options)


def test_functions_are_given_lists_and_clusters_without_passwords() -> None:
    for url in (f"rediss://a?{SECRET},rediss://b?{SECRET}", f"rediss+cluster://a?{SECRET},rediss+cluster://b"):
        check_reference(url)
        assert len(store_secrets(url)) == 1  # the same one, asked for once
    assert len(store_secrets(f"rediss://a?{SECRET},rediss://b?{SECRET}-b")) == 2
    for url in ("redis://a,redis://:one@b", "redis://a,redis://b?password=one", "redis+cluster://:one@a"):
        for look in (check_reference, store_secrets):
            with pytest.raises(ConfigError) as caught:
                look(url)
            assert "one" not in str(caught.value).partition("put the")[0].replace("none", "")
    with pytest.raises(ConfigError, match="over the network only"):
        check_reference("redis://a,unix:///b")
    with pytest.raises(ConfigError, match="a function cannot reach that"):
        store_secrets("redis://a,redis://127.0.0.1")


def test_a_tunnel_leads_to_each_node_and_to_no_cluster() -> None:
    assert through("redis://u:p@a:1,rediss://b?db=2", "localhost:5,localhost:6") == (
        "redis://u:p@localhost:5,rediss://localhost:6?db=2&ssl_check_hostname=false"
    )
    with pytest.raises(ConfigError, match="each of the 2 nodes"):
        through("redis://a,redis://b", "localhost:5")
    with pytest.raises(ConfigError, match="a cluster's tell their own addresses"):
        through("redis+cluster://a", "localhost:5")
