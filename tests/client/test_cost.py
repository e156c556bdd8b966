"""The cost model: what must hold of it whatever the constants are, and that its money is the bill's."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
from tuned_folder import WORKLOAD as RESNET

from smlt.client.bill import StoreUse, estimate
from smlt.client.communication import Communication
from smlt.client.cost import Choice, CostModel, Phase, Platform, Workload
from smlt.client.optimizer.observations import Observation
from smlt.client.platforms import node_rate, nodes_of
from smlt.client.prices import PRICES, at_usage
from smlt.collective.codecs import wire_size
from smlt.collective.tuning import NETWORK
from smlt.errors import ConfigError


def on_lambda(workload: Workload = RESNET, **values: object) -> CostModel:
    return CostModel(workload, Platform.on_lambda().changed(**values))


def test_more_memory_computes_faster_in_proportion_below_a_vcpu_and_by_amdahl_above() -> None:
    model = on_lambda(replace(RESNET, optimizer_s=0.0))
    at = {mb: model.step(Choice(64, mb), 512).compute_s for mb in (885, 1769, 3538, 7076)}
    assert at[885] == pytest.approx(at[1769] * 1769 / 885)
    assert at[3538] == pytest.approx(at[1769] * (0.1 + 0.9 / 2))
    assert at[7076] == pytest.approx(at[1769] * (0.1 + 0.9 / 4))


def test_compute_lies_on_straight_lines_between_what_was_measured() -> None:
    assert RESNET.compute_s(8) == 0.12
    assert RESNET.compute_s(36) == pytest.approx((0.12 + 0.9) / 2)
    assert RESNET.compute_s(1024) == pytest.approx(7.0 + (7.0 - 0.9) / 448 * 512)
    wide = replace(RESNET, compute=((1, 0.02), (512, 4.0)))
    assert wide.compute_s(8) == pytest.approx(0.02 + 7 * 3.98 / 511)
    assert replace(RESNET, compute=((4, 1.0), (8, 3.0))).compute_s(1) == pytest.approx(0.1)
    assert replace(RESNET, compute=((8, 3.0),)).compute_s(4) == pytest.approx(1.5)


def test_one_worker_communicates_nothing_and_the_optimizer_step_does_not_shrink_with_workers() -> None:
    model = on_lambda()
    assert model.step(Choice(1, 3538), 512).communication_s == 0
    assert all(model.step(Choice(n, 1769), 512).compute_s >= 0.01 for n in (8, 64, 512))


def test_the_links_bound_is_never_undercut() -> None:
    size = wire_size("float32", "fp16", 11_000_000)
    quick = Platform.on_lambda(store_node="c6gn.2xlarge", store_nodes=64)
    for n in (2, 4, 8, 16):
        communication = Communication((size,), quick)
        bound = 2 * (n - 1) / n * size / NETWORK.link_bytes_per_s
        assert bound <= communication.exposed_s(n, 0.0, 1.0) <= 1.15 * bound


@pytest.mark.parametrize(
    ("codec", "measured_ms"),  # docs/benchmarks.md's table: 11 M floats over a unix socket, workers and store on two cores
    [("fp32", {2: 44, 4: 110, 8: 247}), ("fp16", {2: 32, 4: 61, 8: 140}), ("int8", {2: 24, 4: 43, 8: 87})],
)
def test_collectives_on_one_machine_come_near_to_what_was_measured(codec: str, measured_ms: dict[int, float]) -> None:
    communication = Communication((wire_size("float32", codec, 11_000_000),), Platform.local(2), codec)
    ratios = [communication.on_shared_cores_s(n) * 1e3 / measured for n, measured in measured_ms.items()]
    assert all(0.7 < ratio < 1.35 for ratio in ratios), ratios
    assert 0.85 < sum(ratios) / len(ratios) < 1.15, ratios


def test_a_small_store_is_what_many_workers_wait_for_and_more_nodes_help() -> None:
    small = CostModel(RESNET, Platform.on_lambda(store_node="t4g.small"))
    one, four = (CostModel(RESNET, Platform.on_lambda(store_node="c6gn.xlarge", store_nodes=k)) for k in (1, 4))
    at = Choice(32, 1769)
    assert small.communication.store_limited(32)
    assert small.step(at, 512).communication_s > one.step(at, 512).communication_s > four.step(at, 512).communication_s


def test_backward_hides_communication_but_not_the_last_bucket() -> None:
    open_, hidden = (on_lambda(replace(RESNET, tail_fraction=f)).step(Choice(8, 1769), 512) for f in (1e-9, 0.9))
    assert 0 < hidden.communication_s < open_.communication_s


def test_an_estimates_bill_is_that_of_its_seconds_to_the_last_fraction() -> None:
    model = on_lambda()
    job = model.job(Choice(16, 1769))
    lines = {item.name: item for item in job.bill.items}
    again = estimate(16, 1769, job.seconds, store=StoreUse("c6gn.2xlarge", job.seconds))
    for item in again.items:
        assert lines[item.name] == item
    assert job.bill.total_usd == sum((item.usd for item in job.bill.items), Fraction(0))
    assert job.invocations == job.bill.invocations == 16 * -(-int(job.seconds + 1) // 900)
    # What a second costs, times the seconds, is the bill without what is paid once.
    once = sum(float(lines[name].usd) for name in ("S3 reads", "S3 storage", "logs taken in"))
    assert model.usd_per_s(Choice(16, 1769)) * job.seconds == pytest.approx(job.usd - once, rel=0.01)


def test_phases_add_up_and_a_job_that_has_begun_needs_no_start() -> None:
    model, choice = on_lambda(), Choice(8, 1769)
    whole = model.job(choice)
    halves = [model.job(choice, [Phase(490, 512)], begun=True) for _ in range(2)]
    assert whole.steps_s == pytest.approx(sum(half.steps_s for half in halves))
    assert whole.seconds == pytest.approx(whole.start_s + whole.steps_s + whole.end_s)
    assert halves[0].start_s == 0


def test_why_not_names_too_little_memory_and_too_many_workers() -> None:
    model = on_lambda()
    assert "needs about" in model.why_not(Choice(1, 1769))
    assert model.why_not(Choice(64, 1769)) == ""
    assert "cannot share" in model.why_not(Choice(513, 10_240))
    assert "128 to 10240" in model.why_not(Choice(2, 10_241))
    with pytest.raises(ConfigError, match="needs about"):
        model.job(Choice(1, 1769))


def test_the_space_holds_what_can_work_and_one_memory_locally() -> None:
    space = on_lambda().space(100)
    assert space.workers[:16] == tuple(range(1, 17))
    assert space.workers[-1] == 100
    assert min(space.memory_mb) > 700
    assert max(space.memory_mb) == 10_240
    assert CostModel(RESNET, Platform.local(4)).space(8).memory_mb == (1769,)
    with pytest.raises(ConfigError, match="no function can hold"):
        on_lambda(replace(RESNET, base_mb=20_000)).space(10)


def test_workers_on_one_machine_share_its_cores() -> None:
    model = CostModel(RESNET, Platform.local(2))
    two, four, eight = (model.step(Choice(n, 1769), 512).compute_s for n in (2, 4, 8))
    assert four >= two * 0.99
    assert eight >= four * 0.99  # no more cores: no less time
    assert model.usd_per_s(Choice(4, 1769)) == pytest.approx(2 * model.usd_per_s(Choice(2, 1769)))


def test_growing_stands_still_for_less_than_other_memory() -> None:
    model = on_lambda()
    assert model.switch_s(Choice(8, 1769), Choice(8, 1769)) == 0
    more, less = model.switch_s(Choice(8, 1769), Choice(16, 1769)), model.switch_s(Choice(16, 1769), Choice(8, 1769))
    assert less <= more < model.switch_s(Choice(8, 1769), Choice(8, 3538))
    assert model.switch_s(None, Choice(8, 1769)) > 2


def test_calibration_takes_over_what_was_observed() -> None:
    model = on_lambda()
    rows = []
    for n in (4, 8, 16):
        parts = model.step(Choice(n, 1769), 512)
        compute, communication = 1.5 * parts.compute_s, 2 * parts.communication_s
        rest = parts.total_s - parts.compute_s - parts.communication_s
        total = compute + communication + rest
        rows.append(Observation(Choice(n, 1769), total, 50, 512, compute_s=compute, communication_s=communication))
    learnt = model.calibrated(rows)
    assert learnt.scales.compute == pytest.approx(1.5)
    assert learnt.scales.communication == pytest.approx(2)
    for row in rows:
        assert learnt.step_s(row.choice, 512) == pytest.approx(row.step_s, rel=0.01)
    bare = model.calibrated([replace(row, compute_s=0.0, communication_s=0.0) for row in rows])
    assert bare.step_s(Choice(8, 1769), 512) == pytest.approx(rows[1].step_s, rel=0.25)
    assert model.calibrated([]) is model


def test_everything_survives_json() -> None:
    model = CostModel(RESNET, Platform.on_lambda("arm64", "cache.m7g.large", store_nodes=3)).calibrated(
        [Observation(Choice(8, 1769), 3.0, 10, 512)]
    )
    again = CostModel.from_json(model.to_json())
    assert (again.workload, again.platform, again.scales) == (model.workload, model.platform, model.scales)
    assert again.step_s(Choice(8, 1769), 512) == model.step_s(Choice(8, 1769), 512)
    for text in ("{}", "[]", "{", '{"workload": {}, "platform": {}, "scales": {}}'):
        with pytest.raises(ConfigError):
            CostModel.from_json(text)


def test_prices_fall_with_a_months_use() -> None:
    used = [at_usage(PRICES, "x86_64", gb_s)["lambda.x86_64.gb-second"].usd for gb_s in (0, 6e9, 15e9)]
    assert used == [Decimal("0.0000166667"), Decimal("0.0000150000"), Decimal("0.0000133334")]
    assert at_usage(PRICES, "arm64", 6e9) is PRICES
    much = on_lambda(month_gb_s=2e10).job(Choice(8, 1769))
    assert much.usd < on_lambda().job(Choice(8, 1769)).usd


def test_a_node_of_unknown_rate_is_refused() -> None:
    assert node_rate("cache.t4g.small") == node_rate("t4g.small") == pytest.approx(16e6)
    with pytest.raises(ConfigError, match="x9"):
        Platform.on_lambda(store_node="x9.large")


def test_as_many_store_nodes_are_reckoned_with_as_the_url_lists() -> None:
    assert nodes_of(None) == nodes_of("redis://:a,b@one:6379") == 1
    assert nodes_of("redis://:a,b@one:6379,rediss://two,unix:///three") == 3
    assert nodes_of("redis+cluster://one,redis+cluster://two") == 1
    assert nodes_of("rediss+cluster://one?groups=4") == 4


def test_nodes_of_a_store_multiply_its_hours_and_help_where_it_is_the_limit() -> None:
    one, four = (CostModel(RESNET, Platform.on_lambda(store_nodes=k)) for k in (1, 4))
    many, few = Choice(64, 1769), Choice(2, 1769)
    assert four.step_s(many, 1024) < 0.7 * one.step_s(many, 1024)
    assert four.step_s(few, 1024) == pytest.approx(one.step_s(few, 1024), rel=0.01)
    hours = [
        next(item.quantity for item in model.job(few).bill.items if item.name.startswith("store")) for model in (one, four)
    ]
    assert float(hours[1] / hours[0]) == pytest.approx(4, rel=0.02)
