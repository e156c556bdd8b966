"""The engine alone: time, cores, threads and links agree with what can be reckoned by hand."""

from __future__ import annotations

import pytest

from bench.simulator.engine import Cores, Engine, Link, Thread


def test_events_happen_in_the_order_of_their_time_and_then_of_their_making() -> None:
    engine, seen = Engine(), []
    engine.at(2.0, seen.append, "late")
    engine.at(1.0, seen.append, "first")
    engine.at(1.0, seen.append, "second")
    engine.run()
    assert seen == ["first", "second", "late"]
    assert engine.now == 2.0


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_cores_are_shared_equally(threads: int) -> None:
    engine, ends = Engine(), []
    cores = Cores(engine, 2)
    for _ in range(threads):
        cores.run(1.0, lambda: ends.append(engine.now))
    engine.run()
    assert ends == pytest.approx([max(1.0, threads / 2)] * threads)


def test_a_thread_that_comes_later_slows_the_others_from_then_on() -> None:
    engine, ends = Engine(), {}
    cores = Cores(engine, 1)
    cores.run(1.0, lambda: ends.setdefault("early", engine.now))
    engine.at(0.5, cores.run, 1.0, lambda: ends.setdefault("late", engine.now))
    engine.run()
    assert ends == pytest.approx({"early": 1.5, "late": 2.0})


def test_a_thread_serves_its_flows_in_turn() -> None:
    engine, seen = Engine(), []
    thread = Thread(engine)
    for flow in ("a", "a", "b"):
        thread.do(flow, 1.0, seen.append, flow)
    engine.run()
    assert seen == ["a", "b", "a"]
    assert thread.busy_s == engine.now == 3.0


def test_waking_costs_once_for_all_jobs_that_find_a_thread_awake() -> None:
    engine = Engine()
    thread = Thread(engine, wake_s=0.25)
    for _ in range(3):
        thread.do("a", 1.0, lambda: None)
    engine.run()
    assert (engine.now, thread.wakes) == (3.25, 1)


def test_a_message_takes_its_bytes_over_the_rate_and_the_latency() -> None:
    engine, ends = Engine(), []
    link = Link(engine, 1e6, latency_s=0.125)
    link.send("a", 500_000, lambda: ends.append(engine.now))
    engine.run()
    assert ends == pytest.approx([0.625])


def test_a_short_message_waits_for_what_a_flow_may_queue_and_not_for_all_it_sends() -> None:
    engine, ends = Engine(), {}
    link = Link(engine, 1e6, flow_bytes=100_000, segment_bytes=50_000)
    link.send("bulk", 1_000_000, lambda: ends.setdefault("bulk", engine.now))
    link.send("token", 100, lambda: ends.setdefault("token", engine.now))
    engine.run()
    assert ends == pytest.approx({"token": 0.1001, "bulk": 1.0001})


def test_a_bucket_that_has_filled_lets_its_burst_pass_at_once() -> None:
    engine, ends = Engine(), []
    link = Link(engine, 1e6, burst_bytes=100_000, segment_bytes=50_000)
    engine.at(1.0, link.send, "a", 300_000, lambda: ends.append(engine.now))
    engine.run()
    assert ends == pytest.approx([1.2])
