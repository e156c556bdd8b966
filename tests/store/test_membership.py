"""Freeze, acknowledge, resume as pure transitions: who goes on from where, whoever has died and when."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt.errors import ConfigError
from smlt.store.membership import COMMITTED, EPOCH_ENDED, SHARED, Ack, Coordinator, Move, Plan, Position, move_for


def at(step: int, phase: int = COMMITTED) -> Position:
    return Position(step, phase)


def planned(coordinator: Coordinator, *acks: Ack, resume: bool = False) -> Plan:
    """The plan that follows when these have acknowledged the current generation."""
    for ack in acks:
        assert coordinator.acknowledge(coordinator.generation, ack)
    plan = coordinator.make_plan(resume)
    assert plan is not None
    return plan


def running(*names: str, step: int = 0) -> Coordinator:
    """A job that these train, rank by rank."""
    coordinator = Coordinator()
    coordinator.freeze(names)
    planned(coordinator, *(Ack(name, at(step) if step else None) for name in names))
    return coordinator


def test_the_first_plan_begins_for_all_and_ranks_them_in_order() -> None:
    coordinator = Coordinator()
    assert coordinator.freeze(["a", "b", "a", "c"]) == 1
    assert coordinator.make_plan(False) is None
    assert coordinator.missing() == ["a", "b", "c"]
    plan = planned(coordinator, Ack("c"), Ack("a"), Ack("b"))
    assert plan == Plan(1, {"a": 0, "b": 1, "c": 2}, None, None)
    assert plan.world_size == 3
    assert {move_for(plan, Ack(name)) for name in "abc"} == {Move.BEGIN}
    assert coordinator.make_plan(False) is None  # it is in force


def test_nobody_with_state_begins_from_a_checkpoint_where_there_may_be_one() -> None:
    coordinator = running("a", "b", step=7)
    coordinator.freeze(["a", "b"])
    coordinator.replace("a", "c")
    coordinator.replace("b", "d")
    plan = planned(coordinator, Ack("c"), Ack("d"), resume=True)
    assert (plan.position, plan.resume, plan.donor, plan.restore) == (None, True, None, ())
    assert move_for(plan, Ack("c")) is Move.BEGIN
    assert coordinator.committed == 0  # what was committed went with those who had it


def test_who_stays_keeps_its_rank_and_a_replacement_takes_the_free_one() -> None:
    coordinator = running("a", "b", "c", "d")
    coordinator.freeze(["a", "b", "c", "d"])
    coordinator.replace("b", "new")
    plan = planned(coordinator, Ack("d", at(5)), Ack("new"), Ack("c", at(5)), Ack("a", at(5)))
    assert plan.ranks == {"a": 0, "new": 1, "c": 2, "d": 3}
    assert (plan.position, plan.donor, plan.restore, plan.finish) == (at(5), 0, (1,), ())
    assert move_for(plan, Ack("new")) is Move.RESTORE
    assert move_for(plan, Ack("a", at(5))) is Move.GO_ON


def test_fewer_workers_close_the_ranks_and_nobody_moves_who_need_not() -> None:
    coordinator = running("a", "b", "c", "d")
    coordinator.freeze(["a", "b", "c", "d"])
    coordinator.replace("b", None)
    plan = planned(coordinator, *(Ack(name, at(5)) for name in "acd"))
    assert plan.ranks == {"a": 0, "c": 2, "d": 1}
    assert move_for(plan, Ack("b", at(5))) is Move.LEAVE
    coordinator.freeze(["a", "d", "c", "e", "f"])
    grown = planned(coordinator, *(Ack(name, at(5)) for name in "acd"), Ack("e"), Ack("f"))
    assert grown.ranks == {"a": 0, "d": 1, "c": 2, "e": 3, "f": 4}
    assert grown.restore == (3, 4)


def test_who_is_one_behind_and_has_sent_everything_finishes() -> None:
    coordinator = running("a", "b", "c")
    coordinator.freeze(["a", "b", "c"])
    plan = planned(coordinator, Ack("a", at(4), finishing=True), Ack("b", at(5)), Ack("c", at(4), finishing=True))
    assert (plan.position, plan.finish, plan.restore, plan.donor) == (at(5), (0, 2), (), None)
    assert move_for(plan, Ack("a", at(4), finishing=True)) is Move.FINISH


def test_who_is_behind_and_cannot_finish_takes_a_snapshot_of_who_is_there() -> None:
    coordinator = running("a", "b", "c")
    coordinator.freeze(["a", "b", "c"])
    plan = planned(coordinator, Ack("a", at(4)), Ack("b", at(4), finishing=True), Ack("c", at(5)))
    assert (plan.position, plan.finish, plan.restore, plan.donor) == (at(5), (1,), (0,), 2)


def test_a_step_that_only_a_dead_worker_had_reported_is_finished_not_undone() -> None:
    coordinator = running("a", "b")
    coordinator.reported(5)  # by b, which then died
    coordinator.freeze(["a", "b"])
    coordinator.replace("b", "new")
    plan = planned(coordinator, Ack("a", at(4), finishing=True), Ack("new"))
    assert (plan.position, plan.finish, plan.restore, plan.donor) == (at(5), (0,), (1,), 0)


def test_a_step_that_nobody_had_reported_is_computed_again() -> None:
    coordinator = running("a", "b")
    coordinator.reported(4)
    coordinator.freeze(["a", "b"])
    plan = planned(coordinator, Ack("a", at(4), finishing=True), Ack("b", at(4), finishing=True))
    assert (plan.position, plan.finish, plan.restore, plan.donor) == (at(4), (), (), None)


def test_a_step_that_can_no_more_be_finished_is_computed_again_from_where_the_survivors_are() -> None:
    coordinator = running("a", "b")
    coordinator.reported(5)
    coordinator.freeze(["a", "b"])
    coordinator.replace("b", "new")
    plan = planned(coordinator, Ack("a", at(4)), Ack("new"))  # it tried to finish, and the store no longer had it
    assert (plan.position, plan.finish, plan.restore) == (at(4), (), (1,))
    assert coordinator.committed == 5


@pytest.mark.parametrize("phase", [SHARED, EPOCH_ENDED])
def test_at_the_end_of_an_epoch_who_is_furthest_is_the_donor(phase: int) -> None:
    coordinator = running("a", "b", "c")
    coordinator.freeze(["a", "b", "c"])
    plan = planned(coordinator, Ack("a", at(4)), Ack("b", at(4, phase)), Ack("c", at(3), finishing=True))
    assert (plan.position, plan.finish, plan.restore, plan.donor) == (at(4, phase), (), (0, 2), 1)


def test_acknowledgements_of_other_generations_of_strangers_and_after_the_plan_are_ignored() -> None:
    coordinator = running("a", "b")
    assert not coordinator.acknowledge(1, Ack("a", at(9)))  # there is a plan
    coordinator.freeze(["a", "b"])
    for generation in (1, 3):
        assert not coordinator.acknowledge(generation, Ack("a", at(9)))
    assert not coordinator.acknowledge(2, Ack("stranger", at(9)))
    assert coordinator.missing() == ["a", "b"]
    assert coordinator.committed == 0
    assert coordinator.acknowledge(2, Ack("a", at(3)))
    assert coordinator.acknowledge(2, Ack("a", at(3)))  # said again
    assert coordinator.missing() == ["b"]


def test_a_freeze_in_a_freeze_forgets_what_was_acknowledged() -> None:
    coordinator = running("a", "b")
    coordinator.freeze(["a", "b"])
    coordinator.acknowledge(2, Ack("a", at(3)))
    assert coordinator.freeze(["a", "b"]) == 3
    assert coordinator.missing() == ["a", "b"]
    assert coordinator.plan is None


def test_the_acknowledgement_of_one_that_dies_goes_with_it() -> None:
    coordinator = running("a", "b")
    coordinator.freeze(["a", "b"])
    coordinator.acknowledge(2, Ack("a", at(5)))
    coordinator.acknowledge(2, Ack("b", at(4), finishing=True))
    coordinator.replace("a", "new")
    assert coordinator.missing() == ["new"]
    plan = planned(coordinator, Ack("new"))
    assert (plan.position, plan.finish) == (at(5), (1,))  # a had committed step 5: it is not undone


def test_a_worker_that_goes_on_under_another_name_keeps_its_rank() -> None:
    coordinator = running("a", "b", "c")
    coordinator.freeze(["a", "b", "c"])
    coordinator.acknowledge(2, Ack("b", at(3)))
    coordinator.rename("b", "b2")
    assert coordinator.missing() == ["a", "b2", "c"]
    assert planned(coordinator, Ack("c", at(3)), Ack("b2", at(3)), Ack("a", at(3))).ranks == {"a": 0, "b2": 1, "c": 2}
    coordinator.freeze(["c2", "b2", "a2"], {"a": "a2", "c": "c2"})
    assert planned(coordinator, *(Ack(name, at(3)) for name in ("a2", "b2", "c2"))).ranks == {"a2": 0, "b2": 1, "c2": 2}


def test_nobody_is_expected_nobody_plans() -> None:
    coordinator = running("a")
    coordinator.freeze(["a"])
    coordinator.replace("a", None)
    assert coordinator.make_plan(False) is None


# ---- whatever happens ----

positions = st.builds(Position, st.integers(0, 4), st.sampled_from([COMMITTED, SHARED, EPOCH_ENDED]))
answers = st.tuples(st.none() | positions, st.booleans())


@st.composite
def changes(draw: st.DrawFn) -> tuple[Coordinator, list[Ack]]:
    """A job whose membership changes, and what those who are there then acknowledge."""
    size = draw(st.integers(1, 6))
    names = [f"w{number}" for number in range(size)]
    coordinator = running(*names)
    if draw(st.booleans()):
        coordinator.reported(draw(st.integers(0, 5)))
    stay = draw(st.lists(st.sampled_from(names), unique=True))
    new = [f"n{number}" for number in range(draw(st.integers(0 if stay else 1, 4)))]
    coordinator.freeze(draw(st.permutations(stay + new)))
    acks = [Ack(name, *draw(answers)) for name in stay] + [Ack(name) for name in new]
    return coordinator, draw(st.permutations(acks))


@given(changes(), st.booleans())
def test_a_plan_loses_no_step_and_gives_everyone_exactly_one_thing_to_do(
    change: tuple[Coordinator, list[Ack]], resume: bool
) -> None:
    coordinator, acks = change
    before = dict(coordinator.ranks)
    plan = planned(coordinator, *acks, resume=resume)
    size = len(acks)
    assert sorted(plan.ranks.values()) == list(range(size))
    assert set(plan.ranks) == {ack.worker_id for ack in acks}
    for ack in acks:
        if before.get(ack.worker_id, size) < size:
            assert plan.ranks[ack.worker_id] == before[ack.worker_id]
    moves = {plan.ranks[ack.worker_id]: move_for(plan, ack) for ack in acks}
    known = [ack.position for ack in acks if ack.position is not None]
    if not known:
        assert (plan.position, plan.donor, plan.finish, plan.restore, plan.resume) == (None, None, (), (), resume)
        assert set(moves.values()) == {Move.BEGIN}
        return
    assert plan.position is not None
    assert not plan.resume
    assert plan.position >= max(known)
    assert plan.position <= max(known) or plan.position == at(max(known).step + 1)
    for ack in acks:
        move = moves[plan.ranks[ack.worker_id]]
        assert move is {
            ack.position == plan.position: Move.GO_ON,
            ack.can_finish(plan.position): Move.FINISH,
        }.get(True, Move.RESTORE)
    assert {rank for rank, move in moves.items() if move is Move.FINISH} == set(plan.finish)
    assert {rank for rank, move in moves.items() if move is Move.RESTORE} == set(plan.restore)
    assert (plan.donor is not None) == bool(plan.restore)
    if plan.donor is not None:
        assert moves[plan.donor] in (Move.GO_ON, Move.FINISH)
    assert coordinator.committed >= plan.position.step


@given(changes())
def test_a_plan_comes_back_from_json_as_it_was(change: tuple[Coordinator, list[Ack]]) -> None:
    coordinator, acks = change
    plan = planned(coordinator, *acks)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json().encode()) == plan


GOOD = json.loads(Plan(3, {"a": 0}, at(2), 0, (0,), ()).to_json())


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("generation", "ranks", "finish", "restore")),
        *({"position": place} for place in ([1], "x", {}, [1e999, 0], 3)),
        *({"ranks": [1]}, {"ranks": {"a": None}}, {"donor": "x"}, {"finish": ["x"]}),
    ],
)
def test_what_is_no_plan_is_told_so(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="what the store holds as the job's plan is none"):
        Plan.from_json(json.dumps({**GOOD, **change}))


@given(st.text(max_size=20) | st.binary(max_size=20) | st.sampled_from(['{"generation": 1}', "[]", "3", "null", "{}"]))
def test_garbage_is_no_plan(text: str | bytes) -> None:
    with pytest.raises(ConfigError):
        Plan.from_json(text)
