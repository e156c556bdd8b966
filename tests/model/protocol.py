"""The membership protocol as a model: every interleaving of workers, scheduler, one crash and one zombie, by exhaustion.

What decides is the product's own code (`Coordinator`, `Ack`, `Plan`, `move_for`); modelled are the store's atomic scripts, the
collective by its documented actions, and time, which is just the order of actions. The names of the actions are
those of docs/reliability.md. Values are symbols: a contribution is (step, rank, n, how many steps its model has seen), an
aggregate the tuple of all contributions in rank order, so equal symbols stand for equal bits. Whoever commits checks that the
aggregate is what an undisturbed run has there: then a model is known by the number of its steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from smlt.store.membership import Ack, Coordinator, Move, Plan, Position, move_for

STEPS = 2

# A worker's state: where it is in its life.
GATHERING, TRAINING, FINISHING, ENDED, LEFT, DEAD = "gathering", "training", "finishing", "ended", "left", "dead"


class Worker(NamedTuple):
    name: str
    life: str = GATHERING
    plan: Plan | None = None  # of the generation it takes part in, or took part in last
    taken: Plan | None = None  # the next one, while it finishes a step of the one before
    acknowledged: int = 0
    ack: Ack | None = None
    steps: int | None = None  # committed; None: no state
    sent: bool = False  # all of its contribution to the next step
    unreported: bool = False

    @property
    def generation(self) -> int:
        return 0 if self.plan is None else self.plan.generation

    @property
    def rank(self) -> int:
        assert self.plan is not None
        return self.plan.ranks[self.name]


class World(NamedTuple):
    """Everything there is. Hashable, so that each is looked at once."""

    n: int
    # the store
    generation: int
    published: Plan | None
    acks: frozenset[tuple[int, Ack]]
    contributions: frozenset[tuple[int, int, int, Any]]  # generation, step, rank, value
    aggregates: frozenset[tuple[int, int, int, Any]]  # generation, step, owner, value
    snapshots: frozenset[tuple[int, int]]  # generation, steps
    marks: frozenset[tuple[int, str, int]]  # barriers: generation, which, rank
    faults: frozenset[int]  # generations that a worker cannot go on in
    reported: int  # the newest step
    over: bool  # a worker has reported its end: the last checkpoint is written
    # the scheduler
    coordinator: tuple[Any, ...]
    lost: frozenset[str]  # whom it has replaced
    # the workers, and what may still go wrong
    workers: tuple[Worker, ...]
    crashes: int
    zombies: int
    losses: int
    has_lost: bool  # the store has lost data


def _kept(c: Coordinator) -> tuple[Any, ...]:
    return (c.generation, c.plan, tuple(sorted(c.ranks.items())), tuple(c.expected), frozenset(c.acks.values()), c.committed)


def _coordinator(kept: tuple[Any, ...]) -> Coordinator:
    made = Coordinator(kept[0])
    made.plan, made.ranks, made.expected = kept[1], dict(kept[2]), list(kept[3])
    made.acks, made.committed = {ack.worker_id: ack for ack in kept[4]}, kept[5]
    return made


def beginning(n: int, crashes: int, zombies: int, losses: int = 0) -> World:
    """n workers that have just been started in generation 1."""
    coordinator = Coordinator()
    names = [f"w{i}" for i in range(n)]
    coordinator.freeze(names)
    none: frozenset[Any] = frozenset()
    return World(
        n, 1, None, none, none, none, none, none, none, 0, False,
        _kept(coordinator), frozenset(), tuple(Worker(name) for name in names), crashes, zombies,
        losses, False,
    )  # fmt: skip


def contribution(world: World, worker: Worker) -> tuple[int, int, int, Any]:
    """What a worker uploads: a function of its model, its samples (step, rank, n) and nothing else."""
    assert worker.steps is not None
    step = worker.steps + 1
    return (worker.generation, step, worker.rank, (step, worker.rank, world.n, worker.steps))


# ---- the workers' actions ----


def worker_actions(world: World, index: int) -> Iterator[tuple[str, World]]:
    worker = world.workers[index]

    def become(action: str, **changes: Any) -> tuple[str, World]:
        store = {name: changes.pop(name) for name in list(changes) if name in World._fields}
        changed = (*world.workers[:index], worker._replace(**changes), *world.workers[index + 1 :])
        return f"{action}({worker.name})", world._replace(workers=changed, **store)

    if worker.life == GATHERING:
        yield from _gathering(world, worker, become)
    elif worker.life == FINISHING:
        yield from _finishing(world, worker, become)
    elif worker.life == TRAINING:
        if world.generation > worker.generation:
            yield become("Notice", life=GATHERING)
        yield from _training(world, worker, become)


def _gathering(world: World, worker: Worker, become: Any) -> Iterator[tuple[str, World]]:
    if world.generation > max(worker.generation, worker.acknowledged):
        position = None if worker.steps is None else Position(worker.steps)
        ack = Ack(worker.name, position, worker.sent)
        acks = world.acks | {(world.generation, ack)}
        yield become("Acknowledge", acknowledged=world.generation, ack=ack, acks=acks)
    plan = world.published
    if worker.acknowledged > worker.generation and plan is not None and plan.generation >= worker.acknowledged:
        move = move_for(plan, worker.ack)
        if move is Move.LEAVE:
            yield become("Take", life=LEFT)
        elif move is Move.FINISH:
            yield become("Take", life=FINISHING, taken=plan)
        elif move is Move.BEGIN:
            yield become("Take", life=TRAINING, plan=plan, steps=0, sent=False, unreported=False)
        else:  # a step that was under way is taken back
            yield become("Take", life=TRAINING, plan=plan, sent=False, unreported=False)


def _finishing(world: World, worker: Worker, become: Any) -> Iterator[tuple[str, World]]:
    value = _result(world, worker)
    if value is not None:
        steps = committed(world, worker, value)
        yield become("Finish", life=TRAINING, plan=worker.taken, taken=None, steps=steps, sent=False, unreported=False)
    else:
        faults = world.faults | {worker.taken.generation}
        yield become("GiveUpFinishing", life=GATHERING, plan=worker.taken, taken=None, sent=False, faults=faults)


def _result(world: World, worker: Worker) -> Any:
    """The value of the step under way, when all its aggregates are in the store."""
    step = (worker.steps or 0) + 1
    found = {owner: value for g, s, owner, value in world.aggregates if (g, s) == (worker.generation, step)}
    if len(found) < worker.plan.world_size:
        return None
    values = set(found.values())
    assert len(values) == 1, "owners have aggregated different contributions"
    return values.pop()


def committed(world: World, worker: Worker, value: Any) -> int:
    """Invariants 1 and 2: what a worker commits is what everyone commits, disturbed or not, each rank counting once."""
    step = worker.steps + 1
    assert value == tuple((step, rank, world.n, step - 1) for rank in range(world.n)), f"{worker.name} commits {value}"
    return step


def _training(world: World, worker: Worker, become: Any) -> Iterator[tuple[str, World]]:
    plan, steps = worker.plan, worker.steps
    assert steps is not None or plan.restore
    assert plan is not None
    here = (worker.generation, worker.rank)
    if plan.restore and not _handed_over(world, plan):
        snapshot = next((state for g, state in world.snapshots if g == worker.generation), None)
        if worker.rank == plan.donor and snapshot is None:
            yield become("GiveSnapshot", snapshots=world.snapshots | {(worker.generation, steps)})
        if (worker.generation, "restored", worker.rank) not in world.marks:
            if worker.rank not in plan.restore:
                yield become("Arrive", marks=world.marks | {(worker.generation, "restored", worker.rank)})
            elif snapshot is not None:
                yield become("Restore", steps=snapshot, marks=world.marks | {(worker.generation, "restored", worker.rank)})
        return
    step = steps + 1
    if worker.unreported:
        if world.generation == worker.generation:  # else the script refuses, and the worker notices
            yield become("Report", unreported=False, reported=max(world.reported, steps))
        return
    if step > STEPS:
        if (worker.generation, "end", worker.rank) not in world.marks:
            yield become("Arrive", marks=world.marks | {(worker.generation, "end", worker.rank)})
        elif world.generation == worker.generation and _all_are_at_the_end(world, worker):
            yield become("End", life=ENDED, over=True)
        return
    if not worker.sent:
        new = contribution(world, worker)
        held = [c for c in world.contributions if c[:3] == new[:3]]
        assert not held, f"two workers of one rank upload in one generation: {held}"
        yield become("Upload", sent=True, contributions=world.contributions | {new})
        return
    given = {rank: value for g, s, rank, value in world.contributions if (g, s) == (worker.generation, step)}
    if not any(a[:3] == (here[0], step, here[1]) for a in world.aggregates) and len(given) == plan.world_size:
        value = tuple(given[rank] for rank in range(plan.world_size))
        yield become("Publish", aggregates=world.aggregates | {(worker.generation, step, worker.rank, value)})
    value = _result(world, worker)
    if value is not None:
        yield become("Commit", steps=committed(world, worker, value), sent=False, unreported=True)
    # Aggregates of the step before go, once everyone's contribution to this one says that it has completed that.
    old = {a for a in world.aggregates if a[:3] == (here[0], step - 1, here[1])}
    if old and len(given) == plan.world_size:
        yield become("Delete", aggregates=world.aggregates - old)


def _all_are_at_the_end(world: World, worker: Worker) -> bool:
    return all((worker.generation, "end", rank) in world.marks for rank in range(world.n))


def _handed_over(world: World, plan: Plan) -> bool:
    return all((plan.generation, "restored", rank) in world.marks for rank in range(plan.world_size))


# ---- the scheduler's actions ----


def scheduler_actions(world: World) -> Iterator[tuple[str, World]]:
    kept = world.coordinator
    members = {name for name, _ in kept[2]} if kept[1] is not None else set(kept[3])
    for worker in world.workers:
        if worker.name not in members or world.over:
            continue
        if worker.life == DEAD:
            yield f"Replace({worker.name})", _replaced(world, worker.name)
        elif world.zombies and worker.life != ENDED:  # it has not been heard of for too long, and lives
            yield f"Suspect({worker.name})", _replaced(world, worker.name)._replace(zombies=world.zombies - 1)
    if world.generation < kept[0] and not world.over:  # the store has come back without the job
        coordinator = _coordinator(kept)
        coordinator.freeze(coordinator.expected if kept[1] is None else sorted(coordinator.ranks, key=coordinator.ranks.get))
        yield "Reopen", world._replace(coordinator=_kept(coordinator), generation=coordinator.generation, published=None)
        return
    if kept[0] in world.faults and kept[1] is not None and not world.over:
        coordinator = _coordinator(kept)
        coordinator.freeze(sorted(coordinator.ranks, key=coordinator.ranks.__getitem__))
        yield "Refreeze", world._replace(coordinator=_kept(coordinator), generation=coordinator.generation, published=None)
    if kept[1] is None:
        yield from _publish(world)


def _replaced(world: World, name: str) -> World:
    """Freeze unless frozen; another worker takes the place."""
    coordinator = _coordinator(world.coordinator)
    if coordinator.plan is not None:
        coordinator.freeze(sorted(coordinator.ranks, key=coordinator.ranks.__getitem__))
    place, used = name.rstrip("'"), {worker.name for worker in world.workers} | set(coordinator.expected)
    new = next(candidate for k in range(9) if (candidate := place + "'" * k) not in used)
    coordinator.replace(name, new)
    opened = coordinator.generation > world.coordinator[0]
    return world._replace(
        coordinator=_kept(coordinator),
        generation=coordinator.generation if opened else world.generation,
        published=None if opened else world.published,
        lost=world.lost | {name},
        workers=(*world.workers, Worker(new)),
    )


def _publish(world: World) -> Iterator[tuple[str, World]]:
    coordinator = _coordinator(world.coordinator)
    for generation, ack in world.acks:
        coordinator.acknowledge(generation, ack)
    coordinator.reported(world.reported)
    plan = coordinator.make_plan(resume=False)
    if plan is not None:
        check_plan(world, plan)
        yield "Publish plan", world._replace(coordinator=_kept(coordinator), published=plan)


def check_plan(world: World, plan: Plan) -> None:
    """Training never goes back a step that a worker here had committed, or that was reported while someone can know it."""
    assert sorted(plan.ranks.values()) == list(range(world.n))
    here = [w for w in world.workers if w.name in plan.ranks and w.life != DEAD and w.steps is not None]
    assert all(plan.position is not None and plan.position.step >= w.steps for w in here)
    # With the store's data what would complete a step may be gone, and whoever had reported it too.
    if any((w.sent and not world.has_lost) or w.steps >= world.reported for w in here):
        assert plan.position is not None
        assert plan.position.step >= world.reported


# ---- what goes wrong ----


def faults(world: World) -> Iterator[tuple[str, World]]:
    if world.crashes:
        for index, worker in enumerate(world.workers):
            if worker.life not in (DEAD, LEFT, ENDED) and worker.name not in world.lost:
                dead = (*world.workers[:index], worker._replace(life=DEAD), *world.workers[index + 1 :])
                yield f"Crash({worker.name})", world._replace(workers=dead, crashes=world.crashes - 1)


def lose_data(world: World) -> Iterator[tuple[str, World]]:
    """The store restarts empty. What is in the object store (snapshots) and in the scheduler's memory stays."""
    if world.losses and not world.over:
        none: frozenset[Any] = frozenset()
        empty = {"acks": none, "contributions": none, "aggregates": none, "marks": none, "faults": none}
        yield "LoseData", world._replace(generation=0, published=None, losses=world.losses - 1, has_lost=True, **empty)


def actions(world: World) -> Iterator[tuple[str, World]]:
    """Everything that can happen next."""
    for index in range(len(world.workers)):
        yield from worker_actions(world, index)
    yield from scheduler_actions(world)
    yield from faults(world)
    yield from lose_data(world)


def normal(world: World) -> World:
    """The same world without what nobody will ever look at again, so that worlds with one future are one state."""
    generation, plan, ranks, expected, _, committed_step = world.coordinator
    there = [w for w in world.workers if w.name not in world.lost and w.life != LEFT]
    reading = {w.generation for w in there if w.life in (TRAINING, FINISHING) or (w.life == GATHERING and w.sent)}
    reading |= {w.taken.generation for w in there if w.taken is not None} | {world.generation}
    # Of those who were suspected and live: who has noticed just leaves, and what nobody else reads nobody else can see.
    there += [w for w in world.workers if w.name in world.lost and w.life in (TRAINING, FINISHING) and w.generation in reading]
    workers = tuple(sorted((_plain(w) for w in there), key=lambda worker: worker.name))
    names = {w.name for w in workers}
    return world._replace(
        acks=frozenset(a for a in world.acks if plan is None and a[0] == generation and a[1].worker_id in expected),
        contributions=frozenset(c for c in world.contributions if c[0] in reading),
        aggregates=frozenset(a for a in world.aggregates if a[0] in reading),
        snapshots=frozenset(s for s in world.snapshots if s[0] in reading),
        marks=frozenset(m for m in world.marks if m[0] in reading),
        faults=frozenset(f for f in world.faults if f == world.generation),
        coordinator=(generation, plan, ranks, expected if plan is None else (), frozenset(), committed_step),
        lost=world.lost & names,
        workers=workers,
    )


def _plain(worker: Worker) -> Worker:
    if worker.life == DEAD:
        return Worker(worker.name, DEAD)
    if worker.life in (TRAINING, ENDED):
        return worker._replace(acknowledged=0, ack=None)
    return worker


# ---- what must hold in every state ----


def check(world: World) -> None:
    """Invariants 4 and 7 of docs/architecture.md, and that all who take part in a generation stand at one place."""
    plans: dict[int, Plan] = {}
    for worker in world.workers:
        if worker.plan is not None and worker.life != DEAD:  # 7: one plan a generation; 4: it names whoever acts in it
            assert plans.setdefault(worker.generation, worker.plan) == worker.plan
            assert worker.name in worker.plan.ranks
    for generation, step, rank, _ in world.aggregates | world.contributions:
        assert generation <= world.coordinator[0]
        assert 0 <= rank < world.n
        plan = plans.get(generation)
        assert plan is None or plan.position is None or step > plan.position.step


def is_good_end(world: World) -> bool:
    """The job is over, and nobody who lives is left in it."""
    return world.over and all(w.life in (ENDED, DEAD, LEFT) or w.name in world.lost for w in world.workers)
