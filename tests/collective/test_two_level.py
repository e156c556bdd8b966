"""Workers that share a machine: real processes, with a real store between two "machines" that are both this one."""

from __future__ import annotations

import json
import mmap
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from groups import in_parallel
from two_level_worker import floats

from smlt.collective import _shared, api
from smlt.collective.codecs import OPERATIONS
from smlt.collective.shared_file import delete_dead, map_file, sweep
from smlt.collective.shared_group import SharedGroup, part
from smlt.collective.two_level import TwoLevelCommunicator
from smlt.errors import CollectiveError, ConfigError, FencedError, WorkerLostError
from smlt.store.embedded import EmbeddedStore

WORKER = Path(__file__).with_name("two_level_worker.py")


class Workers:
    """A process for each worker; `machines` lists the ranks of each."""

    def __init__(self, scenario: str, machines: Sequence[Sequence[int]], job: str, store: str | None) -> None:
        self.world_size = sum(map(len, machines))
        common = {"store": store, "job": job, "world_size": self.world_size, "machines": len(machines), "timeout_s": 30}
        places = [
            {**common, "rank": rank, "local_rank": local_rank, "local_size": len(ranks), "machine": machine}
            for machine, ranks in enumerate(machines)
            for local_rank, rank in enumerate(ranks)
        ]
        command = [sys.executable, str(WORKER), scenario, json.dumps(places)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.lines = self.process.stdout

    def ready(self) -> list[int]:
        """Their processes, by rank, once all are at work."""
        lines = [json.loads(self.lines.readline()) for _ in range(self.world_size)]
        return [line["pid"] for line in sorted(lines, key=lambda line: line["rank"])]

    def results(self) -> list[Any]:
        """What each has said at its end, by rank; None for one that was killed."""
        said = {line["rank"]: line for line in map(json.loads, self.lines)}
        assert self.process.wait(60) == 0
        return [said.get(rank) for rank in range(self.world_size)]


@pytest.mark.parametrize("machines", [[[0, 1, 2]], [[0, 3], [2], [1]]], ids=["one", "three unequal"])
def test_every_exchange_is_right_and_the_same_to_the_bit_on_all_workers_and_again(
    store: EmbeddedStore, job: str, machines: list[list[int]]
) -> None:
    found = Workers("every_exchange", machines, job, store.url if len(machines) > 1 else None).results()
    for one in found:
        assert one["digests"] == found[0]["digests"]
        assert one["again"] == one["digests"]


def test_workers_that_call_different_things_all_hear_of_it_and_go_on(store: EmbeddedStore, job: str) -> None:
    found = Workers("disagreement", [[0, 1], [2, 3]], job, store.url).results()
    for rank, one in enumerate(found):
        within, between, kinds = one["texts"]
        assert "disagree" in within or "do not agree" in within
        assert ("float32[4]" in within and "float32[5000000]" in within) or rank > 1
        assert "float32[4]" in between
        assert "float32[5000000]" in between
        assert "broadcast" in kinds
        assert one["after"] == 4.0


@pytest.mark.parametrize("victim", [1, 0], ids=["a worker", "the leader"])
def test_a_killed_worker_is_named_by_those_of_its_machine(job: str, victim: int) -> None:
    workers = Workers("lost", [[0, 1, 2]], job, None)
    pids = workers.ready()
    os.kill(pids[victim], signal.SIGKILL)
    for rank, one in enumerate(workers.results()):
        if rank != victim:
            assert one["error"] == "WorkerLostError"
            assert one["ranks"] == [victim]
            assert f"rank {victim} died" in one["text"]
            assert not one["usable"]


def test_a_killed_worker_is_named_on_other_machines_long_before_the_timeout(store: EmbeddedStore, job: str) -> None:
    workers = Workers("lost", [[0, 1], [2, 3]], job, store.url)
    pids = workers.ready()
    os.kill(pids[3], signal.SIGKILL)
    found = workers.results()
    assert [one and one["ranks"] for one in found] == [[3], [3], [3], None]
    from smlt.store.parameter import ParameterStore

    with_store = ParameterStore(store.url, job=job)
    with_store.sweep()  # a lost worker leaves no farewell, so its job's keys go by their age
    with_store.close()


def test_an_interrupted_worker_ends_the_others(job: str) -> None:
    workers = Workers("lost", [[0, 1, 2]], job, None)
    pids = workers.ready()
    os.kill(pids[1], signal.SIGINT)
    found = workers.results()
    assert [one["error"] for one in found] == ["CollectiveError", "KeyboardInterrupt", "CollectiveError"]
    assert "rank 1 left: KeyboardInterrupt" in found[0]["text"]


# ---- the memory: in threads, each with a map of its own ----


HEADER = struct.Struct("=8sqQQQIII")


def members(folder: Path, name: str = "group", size: int = 2, timeout_s: float = 20, **settings: Any) -> list[SharedGroup]:
    def member(local_rank: int) -> SharedGroup:
        return SharedGroup(
            name,
            local_rank=local_rank,
            local_size=size,
            rank=local_rank,
            timeout_s=timeout_s,
            **settings,
            in_folders=[folder],
        )

    outcomes = in_parallel([lambda r=r: member(r) for r in range(size)])  # type: ignore[misc]
    if failed := [outcome.error for outcome in outcomes if outcome.error is not None]:
        raise BaseExceptionGroup("members", failed)
    return [outcome.value for outcome in outcomes]


def summed(group: SharedGroup, x: Any) -> Any:
    import time

    group.reduce(
        [part(x.dtype.name, OPERATIONS["sum"], x, x, x.size)],
        divisor=1,
        takers=range(group.local_size),
        digest=1,
        description=b"a sum",
        deadline=time.monotonic() + 20,
    )
    return x


@pytest.mark.parametrize(("block_bytes", "blocks"), [(1024, 1), (1024, 2), (65536, 3)])
def test_any_ring_gives_the_same_sums(tmp_path: Path, block_bytes: int, blocks: int) -> None:
    groups = members(tmp_path, size=3, block_bytes=block_bytes, blocks=blocks)
    assert list(tmp_path.iterdir()) == []  # nobody else can open it, nothing is left
    for size in (1, 255, 256, 257, 10_000):
        outcomes = in_parallel([lambda g=g, size=size: summed(g, floats(g.rank, size)) for g in groups])  # type: ignore[misc]
        expected = (floats(0, size) + floats(1, size)) + floats(2, size)
        assert all((outcome.value == expected).all() for outcome in outcomes)
    for group in groups:
        group.close()


def test_what_a_dead_process_left_is_replaced_and_deleted(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    header = HEADER.pack(b"SMLTshm1", dead.pid, 7, _shared.process_namespace(), 1, 2, 1024, 2)
    (probe,) = members(tmp_path, size=1)
    for name in (probe._file_name, f"smlt-{os.geteuid()}-{'0' * 16}", f"smlt-{os.geteuid()}-{'0' * 16}.{dead.pid}"):
        (tmp_path / name).touch(0o600)  # as they are made; rank 1 may open the file before rank 0 has deleted it
        (tmp_path / name).write_bytes(header + bytes(100_000))
    other = tmp_path / f"smlt-{os.geteuid()}-notes"
    other.write_bytes(header)
    for group in members(tmp_path):
        group.close()
    assert list(tmp_path.iterdir()) == [other]


def test_a_dead_file_that_is_replaced_meanwhile_is_not_joined_and_the_new_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = _shared.process_namespace()
    dead = HEADER.pack(b"SMLTshm1", os.getpid(), 7, own, 1, 2, 1024, 2)  # our number, but started at another time
    new = HEADER.pack(b"SMLTshm1", os.getpid(), _shared.process_start(os.getpid()), own, 1, 2, 1024, 2)
    path, real = tmp_path / f"smlt-{os.geteuid()}-{'0' * 16}", os.fstat

    def replacing(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        path.unlink()
        path.touch(0o600)
        path.write_bytes(new)
        return found

    for look in (map_file, delete_dead, lambda path: sweep(path.parent)):
        path.unlink(missing_ok=True)
        path.touch(0o600)
        path.write_bytes(dead)
        with monkeypatch.context() as patch:
            patch.setattr("smlt.collective.shared_file.os.fstat", replacing)
            assert look(path) is None
        assert path.read_bytes() == new
    assert delete_dead(path) == os.getpid()


def test_the_last_word_of_a_process_counts_more_than_its_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = members(tmp_path)

    def ended_just_now(pid: int) -> int:
        other.fail(KeyboardInterrupt())
        return 0

    monkeypatch.setattr(_shared, "process_start", ended_just_now)
    with pytest.raises(CollectiveError, match="rank 1 left: KeyboardInterrupt"):
        summed(one, np.ones(10))


def test_a_hostile_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SharedGroup("g", local_rank=0, local_size=1, rank=0, timeout_s=1, in_folders=[tmp_path])._file_name
    place: dict[str, Any] = {"local_rank": 1, "local_size": 2, "rank": 1, "timeout_s": 0.2, "in_folders": [tmp_path]}
    me = (os.getpid(), _shared.process_start(os.getpid()), _shared.process_namespace())
    key = int(path.name[-16:], 16)
    for content, mode, text in (
        (b"nothing of ours" * 100, 0o600, "is not what this group has made"),
        (HEADER.pack(b"SMLTshm1", *me, key, 3, 1024, 2) + bytes(99_932), 0o600, "is for 3 processes, not 2"),
        (HEADER.pack(b"SMLTshm1", *me, key, 2, 1 << 31, 64) + bytes(9_932), 0o600, "is garbled"),
        (HEADER.pack(b"SMLTshm1", *me, key, 2, 1024, 2) + bytes(5), 0o600, "is garbled"),
        (b"SMLTshm1" + bytes(1000), 0o644, "not a file of this user alone"),
    ):
        path.write_bytes(content)
        path.chmod(mode)
        with pytest.raises(ConfigError, match=text):
            SharedGroup("g", **place)
        path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="cannot be opened"):
        SharedGroup("g", **place)
    path.unlink()
    with pytest.raises(WorkerLostError, match="local rank 0 of this machine did not come"):
        SharedGroup("g", **place)


def test_garbled_counters_are_an_error(tmp_path: Path) -> None:
    seen: list[int] = []
    real = mmap.mmap

    def noting(descriptor: int, size: int) -> Any:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return real(descriptor, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmap, "mmap", noting)
        one, other = members(tmp_path)
    assert seen == [0o600, 0o600]
    memory = one._memory
    place = memory.find(struct.pack("=Iqq", 1, other.rank, os.getpid()))  # state, rank and process, behind the counters
    memory[place - 12 : place] = b"\x5a" * 12
    with pytest.raises(CollectiveError, match="holds what no worker can have written"):
        summed(one, np.ones(10, np.float32))
    assert other.ended == ""


def test_the_place_of_another_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smlt.collective.shared_group.TAKEN_PATIENCE_S", 0.1)
    place: dict[str, Any] = {"local_size": 3, "timeout_s": 1, "in_folders": [tmp_path]}
    outcomes = in_parallel(
        [
            lambda: SharedGroup("g", local_rank=0, rank=0, **place),
            lambda: SharedGroup("g", local_rank=1, rank=1, **place),
            lambda: SharedGroup("g", local_rank=1, rank=1, **place),
        ]
    )
    kinds = [type(outcome.error) for outcome in outcomes]
    assert kinds[0] is WorkerLostError
    assert sorted(kind.__name__ for kind in kinds[1:]) == ["FencedError", "WorkerLostError"]
    assert "local rank 2 of 3 did not come within 1 s" in str(outcomes[0].error)
    assert list(tmp_path.iterdir()) == []
    assert FencedError in kinds


def test_arguments_that_cannot_work_say_what_to_give(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: dict[str, Any] = {"rank": 3, "world_size": 4, "local_rank": 1, "local_size": 2}
    for change, text in (
        ({}, "2 machines need a store"),
        ({"local_size": 3}, "give machine and machines"),
        ({"local_rank": 0}, r"give machine \(SMLT_MACHINE\)"),
        ({"machine": 2}, "machine 2 is not one of 2"),
        ({"local_size": 65, "world_size": 130}, "local_size 65 is not between 1 and 64"),
        ({"local_size": 4, "local_rank": 4}, "local_rank 4 is not one of the machine's 4"),
        ({"machine": 0, "machines": 1}, "give machines"),
    ):
        with pytest.raises(ConfigError, match=text):
            TwoLevelCommunicator(**{**whole, **change})
    with pytest.raises(ConfigError, match="needs local_rank as well"):
        api.init(rank=0, world_size=2, local_size=2)
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("SMLT_TWO_LEVEL", 1)):
        monkeypatch.setenv(name, str(value))
    comm = api.init(job="torchrun")
    assert isinstance(comm, TwoLevelCommunicator)
    assert api.allreduce(np.arange(3.0)).tolist() == [0, 1, 2]
    assert api.init(job="torchrun") is comm
    api.finalize()


def test_layouts_that_contradict_each_other_end_all(store: EmbeddedStore, job: str) -> None:
    makers: list[Callable[[], Any]] = [
        lambda: TwoLevelCommunicator(store.url, job=job, rank=0, world_size=2, local_rank=0, local_size=1, timeout_s=20),
        lambda: TwoLevelCommunicator(
            store.url, job=job, rank=0, world_size=2, local_rank=0, local_size=1, machine=1, machines=2, timeout_s=20
        ),
    ]
    for outcome in in_parallel(makers):
        assert isinstance(outcome.error, ConfigError)
        assert "machine 0 has 0; machine 1 has 0" in str(outcome.error)


def test_closing_ends_what_is_under_way(job: str) -> None:
    place: dict[str, Any] = {"world_size": 2, "local_size": 2, "job": job, "timeout_s": 30}
    one, other = (
        outcome.value
        for outcome in in_parallel([lambda r=r: TwoLevelCommunicator(rank=r, local_rank=r, **place) for r in (0, 1)])  # type: ignore[misc]
    )
    works = [one.allreduce_async(np.ones(10)) for _ in range(2)]
    one.close()
    for work in works:
        with pytest.raises(CollectiveError, match="closed"):
            work.wait()
    with pytest.raises(CollectiveError, match="it was closed"):
        one.barrier()
    with pytest.raises(CollectiveError, match=r"closed|rank 0 has left the job"):
        other.allreduce(np.ones(10))
    assert not other.usable
    other.close()
