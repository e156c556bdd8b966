"""The model that chooses algorithms, its file, and that all workers choose alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smlt import Communicator
from smlt.collective.trace import PHASES, record, to_chrome
from smlt.collective.tuning import (
    LOCAL,
    NETWORK,
    Tuning,
    cache_path,
    choose,
    chunk_bytes,
    hierarchical_s,
    load,
    save,
    window_bytes,
)
from smlt.errors import ConfigError
from smlt.store.embedded import EmbeddedStore

LIMIT = 65_536


def test_small_values_go_in_one_shot_and_large_ones_by_shards_of_all() -> None:
    for tuning in (LOCAL, NETWORK):
        assert choose(tuning, "auto", 4, 100, LIMIT) == ("one-shot", 0)
        assert choose(tuning, "auto", 4, 22_000_000, LIMIT) == ("hierarchical", 4)
    assert choose(LOCAL, "one-shot", 4, 22_000_000, LIMIT)[0] == "hierarchical"  # it does not fit
    assert choose(LOCAL, "centralised", 4, 22_000_000, LIMIT) == ("hierarchical", 1)


@pytest.mark.parametrize("nodes", [2, 3, 4, 8])
def test_each_node_of_a_store_has_as_many_shards_where_there_are_enough(nodes: int) -> None:
    for tuning in (LOCAL, NETWORK):
        for n in (2, 5, 8, 64, 1000):
            for size in (100_000, 2_000_000, 22_000_000):
                _, shards = choose(tuning, "hierarchical", n, size, LIMIT, nodes)
                assert 1 <= shards <= n
                assert shards < nodes or shards % nodes == 0


def test_more_nodes_are_never_slower_and_serve_more_owners() -> None:
    times = [min(hierarchical_s(NETWORK, 128, m, 2_000_000, k) for m in range(1, 129)) for k in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 3 * times[3]
    owners = [choose(NETWORK, "auto", 128, 2_000_000, LIMIT, k)[1] for k in (1, 2, 4, 8)]
    assert owners == sorted(owners)


def test_commands_grow_with_the_workers_and_not_with_their_square() -> None:
    for tuning in (LOCAL, NETWORK):
        owners = [choose(tuning, "auto", n, 200_000, LIMIT)[1] for n in (32, 64, 128, 1000)]
        assert max(owners) <= 16, "so many chunks for each worker"


def test_chunks_and_windows_follow_the_link() -> None:
    assert chunk_bytes(NETWORK, 64 << 10, 256 << 10) == 64 << 10
    assert chunk_bytes(LOCAL, 64 << 10, 256 << 10) == 256 << 10
    assert window_bytes(NETWORK) < window_bytes(LOCAL)


def test_measured_constants_are_kept_by_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLT_TUNING", str(tmp_path / "cache" / "tuning.json"))
    assert load("redis://far:6379") == NETWORK
    measured = Tuning(1e-4, 1e-6, 1e8, 1e9)
    assert save("redis://:secret@far:6379", measured) == cache_path()
    assert load("redis://other@far:6379") == measured
    assert load("redis://elsewhere:6379") == NETWORK
    assert "secret" not in cache_path().read_text()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.json"
    path.write_text("{")
    monkeypatch.setenv("SMLT_TUNING", str(path))
    with pytest.raises(ConfigError, match="smlt doctor --tune"):
        load("redis://far")
    path.write_text('{"redis://far:6379": {"round_trip_s": -1}}')
    with pytest.raises(ConfigError, match="tuning"):
        load("redis://far")


def test_workers_with_other_constants_take_those_of_the_first(store: EmbeddedStore, job: str) -> None:
    with (
        Communicator(store.url, job=job, rank=0, world_size=2, tuning=NETWORK) as first,
        Communicator(store.url, job=job, rank=1, world_size=2, tuning=LOCAL) as second,
    ):
        assert first.tuning == second.tuning == NETWORK
        assert first.chunk_bytes == second.chunk_bytes


def test_a_trace_tells_what_time_was_spent_on(store: EmbeddedStore, job: str) -> None:
    from groups import Group

    workers = Group(store.url, job, 2, codec="fp16")

    def traced(comm: Communicator) -> object:
        with record(comm) as trace:
            comm.allreduce(np.ones(300_000, np.float32))
        return trace

    try:
        traces = workers.run(traced)
    finally:
        workers.close()
    for trace in traces:
        assert trace.bytes()["encode"] == trace.bytes()["add"] == 600_000
        assert all(trace.seconds()[phase] >= 0 for phase in PHASES)
        assert all(event.end_ns >= event.begin_ns for event in trace.events)
    rows = to_chrome(traces)["traceEvents"]
    assert {row["pid"] for row in rows} == {0, 1}
    assert {"X", "M"} == {row["ph"] for row in rows}


def test_alone_there_is_nothing_to_trace() -> None:
    with Communicator() as comm, pytest.raises(ConfigError, match="nothing to trace"), record(comm):
        pass
