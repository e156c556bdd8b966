"""Meeting in the store: the Store that torch.distributed gets, and how the workers of a job find each other."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
import torch.distributed as dist
from groups import in_parallel
from processes import keys_left, run_all

import smlt.torch
from smlt.errors import ConfigError, FencedError, StoreAuthError, StoreUnavailable, WorkerLostError
from smlt.store.embedded import EmbeddedStore
from smlt.torch import rendezvous
from smlt.torch.rendezvous import meet

SECOND = timedelta(seconds=1)


@pytest.fixture
def name(store: EmbeddedStore) -> Iterator[str]:
    """A job's name; afterwards no key of a job of that name may be left."""
    made = f"t-{uuid.uuid4().hex[:8]}"
    yield made
    assert keys_left(store, made) == []


@pytest.fixture
def kept(store: EmbeddedStore, name: str) -> Iterator[smlt.torch.Store]:
    made = smlt.torch.Store(store.url, job=name, timeout=5 * SECOND)
    made.join()
    yield made
    assert made.leave()
    made.close()


def test_it_does_what_torchs_own_stores_do(kept: smlt.torch.Store) -> None:
    found = []
    for store in (dist.HashStore(), dist.PrefixStore("a", dist.PrefixStore("b", kept))):
        store.set("k", "v")
        store.append("k", "w")
        found.append(
            [
                *(store.get("k"), store.add("n", 3), store.add("n", -1), store.get("n")),
                *(store.check(["k", "n"]), store.check(["k", "x"]), store.multi_get(["k", "n"])),
                *(store.compare_set("c", "", "1"), store.compare_set("c", "1", "2"), store.get("c")),
                *(store.compare_set("c", "7", "3"), store.compare_set("d", "7", "3")),
                *(store.num_keys(), store.delete_key("k"), store.delete_key("k"), store.check(["k"]), store.num_keys()),
            ]
        )
        store.multi_set(["e", "f"], ["1", "2"])
        store.wait(["e", "f"], SECOND)
    assert found[0] == found[1]
    assert sorted(kept.list_keys()) == sorted(f"b/a/{key}" for key in ("n", "c", "e", "f"))


def test_a_value_is_awaited_and_wakes_who_waits(kept: smlt.torch.Store) -> None:
    def late() -> None:
        time.sleep(0.3)
        kept.set("late", bytes(range(256)))

    thread = threading.Thread(target=late)
    thread.start()
    assert kept.get("late") == bytes(range(256))
    thread.join()


def test_a_key_that_does_not_come_is_named(kept: smlt.torch.Store) -> None:
    with pytest.raises(dist.DistStoreError, match=r"key x, y of job .* was not set within 0.2 s"):
        kept.wait(["x", "y"], timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match="p/x"):
        dist.PrefixStore("p", kept).wait(["x"], timedelta(seconds=0.2))


def all_meet(url: str, job: str, world_size: int, timeout_s: float = 10) -> list[Any]:
    def one(rank: int) -> Callable[[], str]:
        return lambda: meet(url, job, rank, world_size, timeout_s)

    return in_parallel([one(rank) for rank in range(world_size)])


def test_every_meeting_has_a_name_of_its_own(store: EmbeddedStore, name: str) -> None:
    names = []
    for _ in range(2):
        found = {outcome.value for outcome in all_meet(store.url, name, 5)}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 2
    assert all(found.startswith(f"{name}-") for found in names)


def test_two_jobs_meet_at_once_and_apart(store: EmbeddedStore, name: str) -> None:
    outcomes = in_parallel(
        [lambda r=rank, j=job: meet(store.url, f"{name}-{j}", r, 3, 10) for rank in range(3) for job in "ab"]  # type: ignore[misc]
    )
    assert {outcome.value[:-9] for outcome in outcomes[::2]} == {f"{name}-a"}
    assert {outcome.value[:-9] for outcome in outcomes[1::2]} == {f"{name}-b"}


def test_who_has_died_while_waiting_is_not_met(store: EmbeddedStore, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_GO", "return 0")  # it dies: nothing is taken back
    with pytest.raises(WorkerLostError):
        meet(store.url, name, 1, 2, 0.1)
    monkeypatch.undo()
    monkeypatch.setattr(rendezvous, "STALE_MS", 500)
    first = threading.Event()
    found: list[str] = []

    def one(rank: int, wait_s: float) -> None:
        time.sleep(wait_s)
        found.append(meet(store.url, name, rank, 2, 10))
        first.set()

    threads = [threading.Thread(target=one, args=pair) for pair in ((1, 0.0), (0, 1.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


def test_who_does_not_come_is_named(store: EmbeddedStore, name: str) -> None:
    outcomes = in_parallel([lambda r=rank: meet(store.url, name, r, 4, 0.5) for rank in (0, 2)])  # type: ignore[misc]
    errors = [outcome.error for outcome in outcomes]
    assert all(isinstance(error, WorkerLostError) for error in errors)
    assert any(error.ranks == (1, 3) and "ranks 1, 3 of job" in str(error) for error in errors)  # type: ignore[union-attr]


def test_a_rank_that_another_holds_and_another_world_size(
    store: EmbeddedStore, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "TAKEN_S", 0.3)

    def wait() -> None:
        with contextlib.suppress(WorkerLostError):
            meet(store.url, name, 0, 2, 2)

    waiting = threading.Thread(target=wait)
    waiting.start()
    client = redis.Redis.from_url(store.url)
    while not client.exists(f"smlt:{{{name}.0}}:meeting"):
        time.sleep(0.01)
    with pytest.raises(FencedError, match="give each worker its own rank, and each job its own name"):
        meet(store.url, name, 0, 2, 5)
    with pytest.raises(ConfigError, match=r"rank 2 of job .* expects 3 workers, others who wait expect 2"):
        meet(store.url, name, 2, 3, 5)
    waiting.join()


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SMLT_RANK", "SMLT_STORE", "SMLT_JOB"):
        monkeypatch.delenv(variable, raising=False)


def fails(match: str, error: type[Exception], **arguments: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        dist.init_process_group("smlt", timeout=SECOND, **arguments)
    assert isinstance(caught.value, dist.DistBackendError)
    assert not dist.is_initialized()


def test_what_is_wrong_with_the_way_to_the_store_is_said(store: EmbeddedStore, name: str) -> None:
    address = store.tcp_url.partition("@")[2]
    fails("the rank is not known: give", ConfigError, init_method=store.tcp_url)
    fails("rank 2 is not one of the 2 workers", ConfigError, init_method=f"{store.tcp_url}?rank=2&world_size=2")
    fails("'x' is not a whole number", ConfigError, init_method=f"{store.tcp_url}?rank=x&world_size=2")
    fails("refused the user, the password", StoreAuthError, init_method=f"redis://:wrong@{address}", rank=0, world_size=2)
    fails("redis://127.0.0.1:1", StoreUnavailable, init_method="redis://127.0.0.1:1", rank=0, world_size=2)
    fails("the URL cannot be read", ConfigError, init_method="redis://host:port", rank=0, world_size=2)
    fails("SMLT_STORE", ConfigError, store=dist.HashStore(), rank=0, world_size=2)
    late = f"{store.tcp_url}?job={name}"
    fails(f"rank 1 of job {name} did not come", WorkerLostError, init_method=late, rank=0, world_size=2)


def test_a_unix_sockets_path_survives_pytorchs_way_with_urls(store: EmbeddedStore, name: str) -> None:
    made, rank, size = next(dist.rendezvous(f"{store.url}&job={name}", 0, 1))
    assert (rank, size) == (0, 1)
    made.set("a", "b")
    made.join()
    assert made.leave()
    made.close()


def test_the_backend_is_there() -> None:
    assert dist.is_backend_available("smlt")
    assert dist.Backend("smlt") == "smlt"
    assert dist.get_default_backend_for_device("cpu") == "gloo"


SUM = """
import os, sys, torch, torch.distributed as dist
import smlt.torch
dist.init_process_group({arguments})
x = torch.ones(1000) * (dist.get_rank() + 1)
dist.all_reduce(x)
assert dist.get_backend() == "smlt"
print(int(x[0]), dist.get_world_size(), smlt.torch.group_communicator().job)
{end}
"""


def summed(arguments: str, *, end: str = "dist.destroy_process_group()", **variables: Any) -> list[str]:
    ended = run_all(2, SUM.format(arguments=arguments, end=end), **variables)
    assert [worker.code for worker in ended] == [0, 0], ended[0].err + ended[1].err
    assert [worker.out.split()[:2] for worker in ended] == [["3", "2"]] * 2
    return [worker.out.split()[2] for worker in ended]


def test_environment_variables_without_a_master_lead_to_the_store(store: EmbeddedStore, name: str) -> None:
    first, second = summed('"smlt"', SMLT_STORE=store.url, SMLT_JOB=name)
    assert first == second
    assert first.startswith(name)


def test_torchs_own_rendezvous_carries_the_group_too(store: EmbeddedStore, name: str) -> None:
    arguments = f'"smlt", init_method="file:///tmp/{name}", rank=int(os.environ["RANK"]), world_size=2'
    summed(arguments, SMLT_STORE=store.url, SMLT_JOB=name)


def test_a_script_that_just_ends_leaves_no_keys(store: EmbeddedStore, name: str) -> None:
    summed(f'"smlt", init_method="{store.tcp_url}"', end="", SMLT_JOB=name)


@pytest.mark.parametrize(
    ("given", "store"),
    [
        ("redis://:x@a:1,redis://b?job=j&rank=0&world_size=2", "redis://:x@a:1,redis://b"),
        ("unix:/a,unix:///b?rank=0&job=j&world_size=2", "unix:///a,unix:///b"),  # as urllib puts it together
        (
            "redis+cluster://a?groups=2&job=j&rank=0,redis+cluster://b?world_size=2",
            "redis+cluster://a?groups=2,redis+cluster://b",
        ),
    ],
)
def test_several_nodes_are_given_as_init_method(given: str, store: str) -> None:
    assert rendezvous._parted(given) == (store, {"job": "j", "rank": "0", "world_size": "2"})


def test_options_that_torch_cuts_off_are_told() -> None:
    cut = "redis://a?password=x,redis://b?password&rank=0&world_size=2"  # it was ?password=y: torch reads one query, to the "="
    with pytest.raises(ConfigError, match="option 'password' in the URL has no value"):
        rendezvous._parted(cut)
