"""What a sweep decides, without a process: which points, who goes on, what time and money allow."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smlt.client.sweep.controller import Controller, Job, Limits
from smlt.client.sweep.halving import DONE, DROPPED, FAILED, LEFT_OUT, Halving, Trial, rungs_of
from smlt.client.sweep.request import SweepRequest, check_sweep
from smlt.client.sweep.space import Space, parse_space
from smlt.errors import ConfigError
from smlt.worker.hyperparameters import parse_value, set_hyperparameters
from smlt.worker.task import Task

#: What evaluate() would give behind each rung, or "fails".
VALUES = st.one_of(st.floats(0, 1, width=16), st.sampled_from([math.nan, math.inf]), st.just("fails"))


def trials(count: int) -> list[Trial]:
    return [Trial(number, {"x": number}) for number in range(count)]


class World:
    """Runs a controller's jobs in an order of its own. `outcomes`: by trial and rung; `costs`: an epoch's time, by trial, and
    `start_s` a rung's start; a second costs a dollar.
    """

    def __init__(
        self,
        controller: Controller,
        outcomes: list[list[Any]],
        costs: list[float],
        order: random.Random,
        start_s: float = 0.0,
    ) -> None:
        self.controller, self.outcomes, self.costs, self.order, self.start_s = controller, outcomes, costs, order, start_s
        self.now_s, self.most_at_once = 0.0, 0
        self.ends: dict[int, tuple[float, Job]] = {}

    def run(self) -> Halving:
        halving = self.controller.halving
        while not halving.complete:
            while job := self.controller.next_job(self.now_s):
                assert job.number not in self.ends
                took = self._takes(job)
                self.ends[job.number] = (self.now_s + took, job)
            self.most_at_once = max(self.most_at_once, len(self.ends))
            if not self.ends:
                assert halving.complete
                break
            soonest = min(end for end, _ in self.ends.values())
            number = self.order.choice([number for number, (end, _) in self.ends.items() if end == soonest])
            self._end(number, soonest)
        return halving

    def _takes(self, job: Job) -> float:
        return self.start_s + (job.epochs - self.controller.halving.trials[job.number].epochs) * self.costs[job.number]

    def _end(self, number: int, now_s: float) -> None:
        halving, trial = self.controller.halving, self.controller.halving.trials[number]
        self.now_s = now_s
        _, job = self.ends.pop(number)
        trial.usd += self._takes(job)
        self.controller.ended(number, now_s, self.start_s)
        outcome = self.outcomes[number][trial.rung]
        if outcome == "fails":
            halving.fail(number, "it failed")
        else:
            halving.finish(number, outcome)


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[list[Any]]]:
    """(rungs, eta, outcomes)"""
    eta = draw(st.integers(2, 4))
    rungs = rungs_of(draw(st.integers(1, 3)), draw(st.integers(3, 40)), eta)
    count = draw(st.integers(1, 14))
    row = st.lists(VALUES, min_size=len(rungs), max_size=len(rungs))
    return rungs, eta, draw(st.lists(row, min_size=count, max_size=count))


def who_goes_on(entered: list[int], values: dict[int, float], eta: int, maximize: bool) -> list[int]:
    """Successive halving as it is written in the paper: the best len // eta, one at least, of those with a finite value."""
    finite = sorted((n for n in entered if math.isfinite(values[n])), key=lambda n: (-values[n] if maximize else values[n], n))
    return finite[: max(1, len(entered) // eta)]


@given(sweeps(), st.booleans(), st.integers(1, 5), st.integers(0, 2**32))
def test_the_best_of_each_rung_go_on_whatever_the_order_of_the_ends_and_no_trial_is_lost(
    sweep: tuple[tuple[int, ...], int, list[list[Any]]], maximize: bool, slots: int, seed: int
) -> None:
    rungs, eta, outcomes = sweep
    halving = Halving(trials(len(outcomes)), rungs, eta, maximize=maximize)
    world = World(
        Controller(halving, Limits(slots)),
        outcomes,
        [random.Random(seed + n).random() + 0.1 for n in range(20)],
        random.Random(seed),
    )
    world.run()
    assert world.most_at_once <= slots
    entered = list(range(len(outcomes)))
    for rung in range(len(rungs)):
        values = {n: math.nan if outcomes[n][rung] == "fails" else outcomes[n][rung] for n in entered}
        ended_here = {n for n in entered if halving.trials[n].rung == rung}
        assert {n for n in ended_here if halving.trials[n].state == FAILED} == {
            n for n in entered if outcomes[n][rung] == "fails"
        }
        if rung == len(rungs) - 1:
            assert all(halving.trials[n].state in (DONE, FAILED) for n in ended_here)
            break
        goes_on = who_goes_on(entered, values, eta, maximize)
        assert {n for n in entered if halving.trials[n].rung > rung} == set(goes_on)
        assert all(halving.trials[n].state in (DROPPED, FAILED) for n in ended_here)
        entered = sorted(goes_on)


@example(((3, 12, 40), 4, [[0.0] * 3] * 14), 1, 1.0, 0.0, "time", 1)  # beginners alone could use it up
@given(
    sweeps(),
    st.integers(1, 5),
    st.floats(0.2, 3),
    st.sampled_from([0.0, 4.0]),
    st.sampled_from(["time", "money"]),
    st.integers(0, 2**32),
)
def test_no_limit_is_overrun_and_one_trial_comes_to_the_end_when_there_is_enough_for_one(
    sweep: tuple[tuple[int, ...], int, list[list[Any]]], slots: int, share: float, start_s: float, kind: str, seed: int
) -> None:
    rungs, eta, rows = sweep
    enough, order = rungs[-1] + len(rungs) * start_s, random.Random(seed)
    limit = share * enough
    outcomes = [[order.random() for _ in row] for row in rows]
    halving = Halving(trials(len(outcomes)), rungs, eta, maximize=True)
    controller = Controller(halving, Limits(slots, **{"deadline_s" if kind == "time" else "budget_usd": limit}))
    world = World(controller, outcomes, [1.0] * len(outcomes), order, start_s)
    world.run()
    used = world.now_s if kind == "time" else controller.spent_usd
    assert used <= max(limit, rungs[0] + start_s) + 1e-9  # what an epoch takes is not known before one has been trained
    assert all(trial.state in (DONE, DROPPED, LEFT_OUT) for trial in halving.trials.values())
    if share >= 1.001 or (share == 1 and not start_s):  # sums are rounded
        assert any(trial.state == DONE for trial in halving.trials.values())
    for rung in range(len(rungs) - 1):
        took_part = [n for n, trial in halving.trials.items() if len(trial.values) > rung]
        gone_on = {n for n in took_part if halving.trials[n].rung > rung}
        assert gone_on == set(who_goes_on(took_part, {n: outcomes[n][rung] for n in took_part}, eta, True) if took_part else ())


@given(sweeps(), st.integers(1, 4), st.integers(0, 2**32), st.integers(0, 40))
def test_a_sweep_that_was_cut_off_and_goes_on_ends_like_one_that_was_not(
    sweep: tuple[tuple[int, ...], int, list[list[Any]]], slots: int, seed: int, cut: int
) -> None:
    rungs, eta, outcomes = sweep
    whole = Halving(trials(len(outcomes)), rungs, eta, maximize=True)
    World(Controller(whole, Limits(slots)), outcomes, [1.0] * 20, random.Random(seed)).run()
    halving = Halving(trials(len(outcomes)), rungs, eta, maximize=True)
    world = World(Controller(halving, Limits(slots)), outcomes, [1.0] * 20, random.Random(seed))
    for _ in range(cut):
        while job := world.controller.next_job(world.now_s):
            world.ends[job.number] = (0.0, job)
        if world.ends:
            world._end(next(iter(world.ends)), 0.0)
    written = [json.loads(json.dumps(trial.as_json()).replace("NaN", "null")) for trial in halving.trials.values()]
    again = Halving([Trial.from_json(row) for row in written], rungs, eta, maximize=True)
    again.resume()
    World(Controller(again, Limits(slots)), outcomes, [1.0] * 20, random.Random(seed + 1)).run()

    def outcome(found: Halving) -> list[tuple[Any, ...]]:
        return [(trial.number, trial.state, trial.rung, trial.epochs) for trial in found.trials.values()]

    assert outcome(again) == outcome(whole)


def test_a_trial_that_has_ended_by_itself_stands_in_later_rungs_with_what_it_has() -> None:
    halving = Halving(trials(4), (1, 2, 4), 2, maximize=True)
    for number in range(4):
        halving.begin(number)
    for number, value in enumerate([0.2, 0.9, 0.5, 0.1]):
        halving.finish(number, value, over=number == 1)
    assert [trial.number for trial in halving.waiting()] == [2]  # 1 has nothing left to do
    halving.begin(2)
    halving.finish(2, 0.6)
    best = halving.best()
    assert best is not None
    assert (best.number, best.state, best.values) == (1, DONE, [0.9, 0.9, 0.9])
    assert halving.complete


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_draws_lie_in_their_intervals_and_are_those_of_the_seed(seed: int, count: int) -> None:
    space = parse_space(
        ["codec=fp32,fp16"], ["lr=log:1e-4..1e-1", "d=0..0.5", "layers=int:1..4", "width=logint:8..512", "act=relu,tanh"]
    )
    points = space.points(count, seed)
    assert points == space.points(count, seed)
    assert len(points) == 2 * count
    for point in points:
        assert 1e-4 <= point["lr"] <= 1e-1  # type: ignore[operator]
        assert 0 <= point["d"] <= 0.5  # type: ignore[operator]
        assert point["layers"] in (1, 2, 3, 4)
        assert point["width"] in range(8, 513)
        assert point["act"] in ("relu", "tanh")
    assert [p["codec"] for p in points] == ["fp32", "fp16"] * count
    assert Space.from_json(json.loads(json.dumps(space.as_json())), "it").points(count, seed) == points


def test_a_file_says_the_same_as_options_do(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "space.toml", tmp_path / "space.json"
    toml.write_text('[grid]\nact = ["relu", "tanh"]\n[random]\nlr = "log:1e-4..1e-1"\nbig = [true, false]\n')
    as_json.write_text('{"grid": {"act": ["relu", "tanh"]}, "random": {"lr": "log:1e-4..1e-1", "big": [true, false]}}')
    told = parse_space(["act=relu,tanh"], ["lr=log:1e-4..1e-1", "big=true,false"])
    assert parse_space([], [], toml) == parse_space([], [], as_json) == told


@pytest.mark.parametrize(
    ("grid", "drawn", "more", "says"),
    [
        ([], [], {}, "nothing to try"),
        (["lr=0.1,0.1"], [], {}, "comes twice"),
        (["lr=0..1"], [], {}, "for --random"),
        (["lr=1,2"], ["lr=0..1"], {"trials": 2}, "given twice"),
        (["lr"], [], {}, "NAME=VALUE"),
        ([], ["lr=log:0..1"], {"trials": 2}, "above 0"),
        ([], ["lr=1..0"], {"trials": 2}, "begin below its end"),
        ([], ["n=int:1..2.5"], {"trials": 2}, "whole numbers"),
        ([], ["lr=lin:1..2"], {"trials": 2}, "uniform, log, int, logint"),
        ([], ["lr=0..1"], {}, "--trials"),
        (["lr=1,2"], [], {"trials": 2}, "--random"),
        (["global_batch_size=2,64"], [], {"workers": 4, "workers_total": 4}, "cannot share a global batch of 2"),
        (["codec=fp32,fp99"], [], {}, "fp99"),
        (["lr=1,2"], [], {"workers": 4, "workers_total": 2}, "no room"),
        (["lr=1,2"], [], {"halving": 1}, "--halving 1"),
        (["lr=1,2"], [], {"halving": 3, "min_epochs": 11}, "--min-epochs 11"),
        (["lr=1,2"], [], {"min_epochs": 2}, "--halving"),
        (["lr=1,2"], [], {"goal": "up"}, "min, max"),
        (["lr=1,2"], [], {"budget_usd": 1.0}, "--on lambda"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_begins(
    grid: list[str], drawn: list[str], more: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_sweep(SweepRequest("task.py", space=parse_space(grid, drawn).as_json(), **more))


def test_hyper_parameters_are_the_class_attributes_of_a_task_and_keep_their_types() -> None:
    class Base(Task):
        lr = 0.1

    class Mine(Base):
        layers = 2
        act = "relu"
        big = False
        _hidden = 1
        sizes = (1, 2)

    set_hyperparameters(Mine, {"lr": 1, "layers": 3.0, "act": "tanh", "big": True})
    assert (repr(Mine.lr), repr(Mine.layers), Mine.act, Mine.big) == ("1.0", "3", "tanh", True)
    assert Base.lr == 0.1
    for wrong, says in (
        ({"width": 3}, "it has act, big, layers, lr, sizes"),
        ({"_hidden": 3}, "no hyper-parameter _hidden"),
        ({"model": 3}, "no hyper-parameter model"),
        ({"layers": 2.5}, "must be a whole number"),
        ({"big": 1}, "must be true or false"),
        ({"lr": "high"}, "must be a number"),
        ({"sizes": 1}, "only numbers, text"),
    ):
        with pytest.raises(ConfigError, match=says):
            set_hyperparameters(Mine, wrong)
    assert [parse_value(text) for text in ("1", "1e-3", "true", "None", "relu", '"1"', "nan", "[1]")] == [
        1,
        1e-3,
        True,
        None,
        "relu",
        "1",
        "nan",
        "[1]",
    ]
