"""Training runs simulated: seeded, every second accounted for, hazards only ever cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.simulator.models import MODELS
from bench.simulator.training import CALM, Hazards, System, train
from smlt.client.cost import CostModel, Platform
from smlt.client.optimizer.space import Choice

SYSTEM = System("smlt", 0.8, store_node="c6gn.2xlarge", store_nodes=1)


REAL = Hazards()


def model(workers: int) -> CostModel:
    return CostModel(MODELS["resnet18"].workload(16, workers), Platform.on_lambda())


def run(workers: int = 16, system: System = SYSTEM, hazards: Hazards = REAL, seed: int = 0, epochs: int = 2):
    return train(system, model(workers), Choice(workers, 1769), hazards=hazards, seed=seed, epochs=epochs)


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    assert run(seed=3) == run(seed=3)
    assert run(seed=3) != run(seed=4)


@pytest.mark.parametrize("seed", range(5))
def test_every_second_is_accounted_for(seed: int) -> None:
    found = run(seed=seed, hazards=Hazards(failures_per_hour=2.0), epochs=10)
    assert found.failures > 0
    parts = found.compute_s + found.waiting_s + found.communication_s + found.starts_s + found.recovery_s
    assert parts == pytest.approx(found.seconds)


def test_a_calm_run_is_steps_and_one_start() -> None:
    found = run(hazards=CALM, epochs=1)
    parts = model(16).step(Choice(16, 1769), 256)
    start_s = model(16).switch_s(None, Choice(16, 1769))
    step_s = parts.compute_s + parts.data_s + parts.overhead_s + 0.8
    assert found.seconds == pytest.approx(start_s + found.steps * step_s)
    assert (found.failures, found.pauses, found.waiting_s) == (0, 0, 0.0)


def test_no_invocation_is_longer_than_its_limit() -> None:
    found = run(hazards=CALM, epochs=10)
    assert found.pauses == int(found.seconds // 870) or found.pauses == int(found.seconds // 900)


def test_each_hazard_only_costs() -> None:
    calm = run(hazards=CALM, epochs=5)
    for name, value in (("straggling", 0.2), ("starting", 0.5), ("failures_per_hour", 2.0)):
        worse = run(hazards=replace(CALM, **{name: value}), epochs=5)
        assert worse.seconds > calm.seconds, name
        assert worse.usd > calm.usd, name


def test_going_back_to_a_checkpoint_costs_more_than_a_step() -> None:
    often = Hazards(failures_per_hour=2.0)
    assert run(hazards=often, epochs=10).seconds < run(system=replace(SYSTEM, resumes=False), hazards=often, epochs=10).seconds


def test_requests_and_machines_are_on_the_bill() -> None:
    plain = run(system=replace(SYSTEM, store_nodes=0), hazards=CALM).usd
    assert run(system=replace(SYSTEM, store_nodes=2), hazards=CALM).usd > plain
    assert run(system=replace(SYSTEM, store_nodes=0, step_puts=1000.0), hazards=CALM).usd > plain
