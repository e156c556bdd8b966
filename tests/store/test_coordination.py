"""What scheduler and workers say to each other through a real store: every write is fenced, nothing lost goes unnoticed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from smlt.errors import ConfigError, FencedError, StoreDataLost
from smlt.store.coordination import Answer, Coordination, Look, ack_from_json, ack_to_json
from smlt.store.embedded import EmbeddedStore
from smlt.store.membership import EPOCH_ENDED, Ack, Plan, Position
from smlt.store.parameter import REPORTS_KEPT, ParameterStore


@pytest.fixture
def job_here(parameters: ParameterStore) -> Coordination:
    """A job at generation 1, scheduled by "s"."""
    made = Coordination(parameters)
    made.open_generation(1, "s")
    return made


def a_plan(generation: int) -> Plan:
    return Plan(generation, {"a": 0, "b": 1}, Position(3), 0, (), (1,))


def acknowledge(coordination: Coordination, generation: int, name: str = "a", process: str = "p") -> int:
    ack = Ack(name, Position(3), finishing=True)
    return coordination.acknowledge(generation, ack, process, [{"step": 3}], "{}", liveness_s=10)


def report(coordination: Coordination, generation: int = 1, rank: int = 0, **row: Any) -> Answer:
    return coordination.report(generation, f"w{rank}", rank, row, liveness_s=10)


def everything(coordination: Coordination) -> dict[bytes, Any]:
    """All that the store holds of the job."""
    store = coordination.parameters.client
    return {key: store.dump(key) for key in store.scan_iter(match=f"smlt:{{{coordination.parameters.job}.*")}


# ---- the scheduler's generations ----


def test_a_generation_said_twice_changes_nothing_that_anyone_reads(job_here: Coordination) -> None:
    job_here.publish(a_plan(1), "s")
    assert job_here.plan() == a_plan(1)
    job_here.open_generation(2, "s")
    assert job_here.plan() is None
    job_here.open_generation(2, "s")  # the answer of the first was lost
    assert job_here.generation() == 2
    assert job_here.plan() is None
    job_here.publish(a_plan(2), "s")
    job_here.publish(a_plan(2), "s")
    assert job_here.plan() == a_plan(2)


def test_a_generation_that_is_not_newer_is_refused(job_here: Coordination) -> None:
    job_here.open_generation(5, "s")
    with pytest.raises(FencedError, match="is at generation 5; this scheduler is at 4"):
        job_here.open_generation(4, "s")
    with pytest.raises(FencedError, match="is at generation 5; this scheduler is at 4"):
        job_here.publish(a_plan(4), "s")
    assert job_here.plan() is None


def test_a_second_scheduler_is_refused_while_the_lease_lives_and_changes_nothing(job_here: Coordination) -> None:
    before = everything(job_here)
    for call in (
        lambda: job_here.open_generation(2, "other"),
        lambda: job_here.publish(a_plan(1), "other"),
        lambda: job_here.look("other", ["a"]),
    ):
        with pytest.raises(FencedError, match=r"has another scheduler now \(s\)"):
            call()
    assert everything(job_here) == before


def test_a_scheduler_takes_over_when_the_lease_has_run_out(job_here: Coordination) -> None:
    assert 0 < job_here.parameters.client.pttl(job_here.parameters.key("scheduler")) <= 15_000
    job_here.parameters.client.delete(job_here.parameters.key("scheduler"))  # as its TTL does
    with pytest.raises(FencedError, match="is at generation 1"):
        job_here.open_generation(1, "other")  # the same number would not fence the first one's workers
    job_here.open_generation(2, "other")
    with pytest.raises(FencedError, match=r"another scheduler now \(other\)"):
        job_here.open_generation(3, "s")


def test_the_lease_is_renewed_by_looking(job_here: Coordination) -> None:
    key = job_here.parameters.key("scheduler")
    job_here.parameters.client.pexpire(key, 1000)
    assert job_here.look("s", []) == Look(True, 1, False, {})
    assert job_here.parameters.client.pttl(key) > 1000


def test_a_look_tells_who_is_there_and_whether_there_is_a_plan(job_here: Coordination) -> None:
    acknowledge(job_here, 1, "a")
    acknowledge(job_here, 1, "c")
    assert job_here.look("s", ["a", "b", "c"]) == Look(True, 1, False, {"a": True, "b": False, "c": True})
    job_here.publish(a_plan(1), "s")
    job_here.parameters.client.unlink(job_here.parameters.key("worker:c"))
    assert job_here.look("s", ["c", "a"]) == Look(True, 1, True, {"c": False, "a": True})


# ---- the workers' writes ----


def test_acknowledgements_are_kept_by_worker_with_their_last_rows(job_here: Coordination) -> None:
    assert job_here.acks(1) == []
    assert acknowledge(job_here, 1) == 1
    assert acknowledge(job_here, 1) == 1  # said again
    assert acknowledge(job_here, 1, "b", "q") == 1
    assert sorted(job_here.acks(1), key=lambda pair: pair[0].worker_id) == [
        (Ack("a", Position(3), finishing=True), [{"step": 3}]),
        (Ack("b", Position(3), finishing=True), [{"step": 3}]),
    ]
    assert {text for kind, text in job_here.read_events([], {}, 10).words if kind == "ack"} == {"a", "b"}


def test_an_acknowledgement_of_an_older_generation_is_answered_with_the_current_one(job_here: Coordination) -> None:
    job_here.open_generation(7, "s")
    assert acknowledge(job_here, 1) == 7
    assert job_here.acks(1) == job_here.acks(7) == []
    assert acknowledge(job_here, 7) == 7


def test_a_second_process_of_a_worker_is_refused_for_good(job_here: Coordination) -> None:
    acknowledge(job_here, 1)
    before = everything(job_here)
    for attempt in (1, 2):
        with pytest.raises(FencedError, match=r"worker a of job .* is another process already: this duplicate ends"):
            acknowledge(job_here, attempt, process="duplicate")
    with pytest.raises(FencedError, match="is another process"):
        job_here.beat("a", "duplicate", "{}", 10)
    after = everything(job_here)
    assert set(after) == set(before)
    assert job_here.acks(1)[0][0].worker_id == "a"
    assert job_here.beat("a", "p", "{}", 10) == Answer("", True)


def test_a_worker_of_an_older_generation_writes_nothing(job_here: Coordination) -> None:
    report(job_here, step=1)
    job_here.open_generation(2, "s")
    before = everything(job_here)
    with pytest.raises(FencedError, match="generation 2 has begun; this worker is of generation 1"):
        report(job_here, step=2)
    assert not job_here.fail(1, 0, 2, "ValueError: late", "")
    assert acknowledge(job_here, 1) == 2
    assert everything(job_here).keys() - before.keys() <= {job_here.parameters.key("claims").encode()}
    assert job_here.failure() is None
    assert report(job_here, 2, step=2) == Answer("", True)


def test_reports_come_in_order_and_carry_back_what_is_asked_for(job_here: Coordination) -> None:
    last_ids: dict[str, str] = {}
    assert job_here.read_events([0, 1], last_ids, 10).reports == []
    for step in (1, 2):
        assert report(job_here, rank=1, step=step) == Answer("", True)
    assert job_here.read_events([0, 1], last_ids, 10).reports == [(1, {"step": 1}), (1, {"step": 2})]
    job_here.request_stop()
    assert report(job_here, rank=1, step=3) == Answer("stop", True)
    assert job_here.read_events([0, 1], last_ids, 10).reports == [(1, {"step": 3})]
    assert job_here.read_events([0, 1], last_ids, 10).reports == []


def test_a_worker_hears_whether_there_is_a_scheduler(job_here: Coordination) -> None:
    assert report(job_here).scheduled
    assert job_here.beat("w0", "p", "{}", 10).scheduled
    job_here.parameters.client.delete(job_here.parameters.key("scheduler"))
    assert not report(job_here).scheduled
    assert not job_here.beat("w0", "p", "{}", 10).scheduled


def test_a_report_and_a_beat_renew_the_sign_of_life(job_here: Coordination) -> None:
    assert job_here.look("s", ["w0"]).alive == {"w0": False}
    job_here.report(1, "w0", 0, {}, liveness_s=2.5)
    key = job_here.parameters.key("worker:w0")
    assert 0 < job_here.parameters.client.pttl(key) <= 2500
    job_here.beat("w0", "p", '{"rank": 0}', liveness_s=20)
    assert job_here.parameters.client.pttl(key) > 2500
    assert json.loads(job_here.parameters.client.get(key)) == {"rank": 0}


def test_faults_and_pauses_are_heard_once_in_order(job_here: Coordination) -> None:
    last_ids: dict[str, str] = {}
    job_here.fault("a", 1, "x" * 5000, [1, 2])
    job_here.pause("b")
    (fault, paused) = job_here.read_events([0], last_ids, 10).words
    word = json.loads(fault[1])
    assert (fault[0], word["worker_id"], word["generation"], word["ranks"]) == ("fault", "a", 1, [1, 2])
    assert word["text"] == "x" * 1000
    assert paused == ("paused", "b")
    assert job_here.read_events([0], last_ids, 10).words == []


def test_only_the_first_failure_is_kept_and_wakes_everyone(job_here: Coordination) -> None:
    assert job_here.failure() is None
    assert job_here.fail(0, 2, 7, "ValueError: no", "Traceback …")  # it came before it had acknowledged any generation
    assert not job_here.fail(1, 1, 8, "CollectiveError: ended", "")
    failure: Any = job_here.failure()
    assert (failure["rank"], failure["step"], failure["error"]) == (2, 7, "ValueError: no")
    _, words = job_here.wait_for_word("0-0", 10)
    assert [word for word in words if word[0] == "abort"] == [("abort", "rank 2 failed at step 7: ValueError: no")]


def test_words_to_the_workers_are_heard_once_in_order(job_here: Coordination) -> None:
    job_here.publish(a_plan(1), "s")
    last_id, words = job_here.wait_for_word("0-0", 10)
    assert words == [("generation", "1"), ("plan", "1")]
    assert job_here.wait_for_word(last_id, 10) == (last_id, [])
    job_here.open_generation(2, "s")
    assert job_here.wait_for_word(last_id, 10)[1] == [("generation", "2")]


def test_what_is_no_acknowledgement_or_plan_is_told_so(job_here: Coordination) -> None:
    wrong = [
        b'{"worker_id": "a", "position": %s, "finishing": 0, "recent": []}' % place for place in (b"3", b"[1]", b"[1e999, 0]")
    ]
    for garbage in (b"", b"[]", b"{}", b"\xff", *wrong):
        with pytest.raises(ConfigError, match="is none"):
            ack_from_json(garbage)
        job_here.parameters.client.set(job_here.parameters.key("plan"), garbage)
        with pytest.raises(ConfigError, match="is none"):
            job_here.plan()
    ack = Ack("a", Position(4, EPOCH_ENDED), finishing=False)
    assert ack_from_json(ack_to_json(ack, [{"step": 4}]).encode()) == (ack, [{"step": 4}])
    assert ack_from_json(ack_to_json(Ack("b"), []).encode()) == (Ack("b"), [])


def test_every_key_has_a_time_to_live_and_streams_do_not_grow_for_ever(job_here: Coordination) -> None:
    acknowledge(job_here, 1)
    job_here.publish(a_plan(1), "s")
    for step in range(3):
        report(job_here, step=step)
    job_here.fault("a", 1, "x")
    job_here.request_stop()
    job_here.fail(1, 0, 0, "e", "")
    store, keys = job_here.parameters.client, list(everything(job_here))
    assert len(keys) == 12
    assert all(0 < store.pttl(key) <= job_here.parameters.ttl_s * 1000 for key in keys)
    with store.pipeline(transaction=False) as pipe:
        for _ in range(REPORTS_KEPT):
            pipe.xadd(job_here.parameters.key("meta:0"), {"j": "{}"})
            pipe.xadd(job_here.parameters.key("events"), {"kind": "ack", "text": "a"})
        pipe.execute()
    report(job_here)
    job_here.pause("a")
    assert store.xlen(job_here.parameters.key("meta:0")) <= REPORTS_KEPT + 200
    assert store.xlen(job_here.parameters.key("events")) <= 1200


def test_deleting_what_is_older_leaves_the_current_generation(job_here: Coordination) -> None:
    acknowledge(job_here, 1)
    job_here.open_generation(2, "s")
    acknowledge(job_here, 2)
    job_here.publish(a_plan(2), "s")
    job_here.delete_before(2)
    assert job_here.acks(1) == []
    assert [ack.worker_id for ack, _ in job_here.acks(2)] == ["a"]
    assert job_here.plan() == a_plan(2)


# ---- a store that has lost its data ----


@pytest.fixture(scope="module")
def own_store() -> Iterator[EmbeddedStore]:
    with EmbeddedStore() as server:
        yield server


CALLS: dict[str, Callable[[Coordination], Any]] = {
    "publish": lambda c: c.publish(a_plan(1), "s"),
    "acknowledge": lambda c: acknowledge(c, 1),
    "report": lambda c: report(c),
    "beat": lambda c: c.beat("w0", "p", "{}", 10),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_call_notices_that_the_store_has_lost_its_data(own_store: EmbeddedStore, name: str) -> None:
    parameters = ParameterStore(own_store.url, job=f"lost-{name}")
    coordination = Coordination(parameters)
    coordination.open_generation(1, "s")
    acknowledge(coordination, 1)
    parameters.client.flushall()
    with pytest.raises(StoreDataLost, match=r"no longer has job lost-.*: it lost its data"):
        CALLS[name](coordination)
    assert everything(coordination) == {}  # nothing is written into a store that does not know the job
    assert coordination.generation() is None
    assert coordination.plan() is None
    assert coordination.look("s", ["a"]) == Look(intact=False)
    assert everything(coordination) == {}
    coordination.open_generation(2, "s")  # the scheduler begins anew
    acknowledge(coordination, 2)
    assert coordination.look("s", ["a"]) == Look(True, 2, False, {"a": True})
    parameters.close()
