"""Global batch schedules: what holds when, and that the curve depends on the schedule, not on who trains or how often."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from groups import Group
from hypothesis import given
from hypothesis import strategies as st
from training import Line, Sequential, configure, losses, train

from smlt import Communicator, Task
from smlt.errors import CheckpointError, ConfigError, TaskError
from smlt.store.object import DirectoryObjectStore
from smlt.worker import checkpoint
from smlt.worker.frameworks.numpy import SGD
from smlt.worker.schedule import BatchSchedule, lr_ratio
from smlt.worker.trainer import Trainer

#: Of 53 samples: 6 steps, 3 steps and again 6 steps, the last of each epoch is short.
SCHEDULE: dict[str, Any] = {"epochs": 4, "batch_schedule": "0:10,1:20,3:10", "lr_rule": "linear"}
STEPS = [6, 3, 3, 6]


class Growing(Line):
    """Chooses by what evaluate() gave: 10 samples a step, 30 once the error is small."""

    asked: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def global_batch_size(self, epoch: int, metrics: dict[str, float]) -> int | None:
        self.asked.append((epoch, metrics))
        return 30 if metrics.get("mse", 9.0) < 1.0 else None


class Plain(Sequential):
    """PyTorch with momentum, and nothing drawn: the same for any number of workers."""

    def model(self) -> Any:
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
        generator = torch.Generator().manual_seed(0)  # the workers are threads: they share the process's
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        return model

    def optimizer(self, model: Any) -> Any:
        import torch

        return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)


def sizes(rows: list[dict[str, Any]]) -> list[int]:
    """The global batch of each step."""
    return [row["global_batch_size"] for row in rows if "loss" in row]


# ---- the schedule itself ----


def test_a_schedule_is_read_and_holds_until_the_next_change() -> None:
    schedule = BatchSchedule.parse(" 5:128, 10:256", 64)
    assert str(schedule) == "0:64,5:128,10:256"
    assert [schedule.at(epoch) for epoch in (0, 4, 5, 9, 10, 1000)] == [64, 64, 128, 128, 256, 256]
    assert BatchSchedule.parse(str(schedule), 1) == schedule
    assert BatchSchedule.parse("0:8,2:4,9:16", 1).smallest() == 4
    assert [BatchSchedule.parse("0:8,2:4,9:16", 1).smallest(epoch) for epoch in (3, 9, 99)] == [4, 16, 16]
    assert BatchSchedule.constant(7).at(3) == 7


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'' is not EPOCH:SAMPLES"),
        ("5", "'5' is not EPOCH:SAMPLES"),
        ("0:64,,5:128", "'' is not EPOCH:SAMPLES"),
        ("0:64,-5:128", "'-5:128' is not EPOCH:SAMPLES"),
        ("0:6.4", "'0:6.4' is not EPOCH:SAMPLES"),
        ("0:٣", "is not EPOCH:SAMPLES"),
        ("0:0", "epoch 0 has a global batch of 0"),
        ("5:99999999999", "a global batch of 99999999999"),
        ("5:128,5:256", "5 stands behind 5"),
        ("5:128,3:256", "3 stands behind 5"),
    ],
)
def test_a_schedule_that_is_none_is_refused_by_name(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        BatchSchedule.parse(text, 64)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_rules_are_what_their_sources_say(before: int, after: int) -> None:
    assert lr_ratio("none", before, after) == 1
    assert lr_ratio("linear", before, after) == after / before
    assert lr_ratio("sqrt", before, after) ** 2 == pytest.approx(after / before)


def test_a_configuration_that_cannot_be_is_refused() -> None:
    for values, told in (
        ({"lr_rule": "cubic"}, "choose one of none, linear, sqrt"),
        ({"batch_schedule": "0:20,5:40"}, "begins with another batch than 10"),
        ({"patience": 0}, "--patience 0 is not positive"),
        ({"patience": 1, "stop_mode": "least"}, "choose one of max, min"),
    ):
        with pytest.raises(ConfigError, match=told):
            configure(**values)


# ---- the curve ----


@pytest.mark.parametrize("task", [Line, Plain])
def test_with_a_schedule_the_curve_is_the_same_for_any_number_of_workers(
    group: Callable[..., Group], store: Any, task: type[Task]
) -> None:
    with Communicator() as comm:
        _, rows = train(comm, configure(**SCHEDULE), None, task())
    expected = losses(rows)
    assert sizes(rows) == [size for size, steps in zip([10, 20, 20, 10], STEPS, strict=True) for _ in range(steps)]
    assert [row["samples"] for row in rows if "loss" in row][5:9] == [3, 20, 20, 13]
    assert [(row["global_batch_size"], row["lr_factor"]) for row in rows if row.get("kind") == "epoch"] == [
        (10, 1.0),
        (20, 2.0),
        (20, 2.0),
        (10, 1.0),
    ]
    for n in (2, 3):
        workers = Group(store.url, f"schedule-{task.__name__}-{n}", n)
        for _, rows in workers.run(lambda comm: train(comm, configure(**SCHEDULE), None, task())):
            np.testing.assert_allclose(losses(rows), expected, rtol=1e-5)
        workers.close()


def test_a_schedule_shows_every_sample_once_an_epoch(group: Callable[..., Group]) -> None:
    (trainer, _), (other, _) = group(2).run(lambda comm: train(comm, configure(**SCHEDULE), None))
    for epoch, steps in enumerate(STEPS):
        assert trainer.iterator.steps_in(epoch) == steps
        parts = [worker.iterator.indices(epoch, step)[0] for step in range(steps) for worker in (trainer, other)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(53))


@pytest.mark.parametrize(("task", "values"), [(Line, SCHEDULE), (Plain, SCHEDULE), (Growing, {"epochs": 4, "lr_rule": "sqrt"})])
# Around the change, and within an epoch of the other batch.
@pytest.mark.parametrize("stop_at", [4, 5, 6, 7, 9])
def test_stopped_and_resumed_around_a_change_a_run_ends_in_the_same_bits(
    group: Callable[..., Group], tmp_path: Path, task: type[Task], values: dict[str, Any], stop_at: int
) -> None:
    def bits(folder: Path) -> bytes:
        tensors, state = checkpoint.load_latest(DirectoryObjectStore(folder), "run/checkpoints") or ({}, {})
        held = json.dumps([state["batch"], state["framework"]])  # the latter holds the learning rate
        return b"".join(tensors[name].tobytes() for name in sorted(tensors)) + held.encode()

    config, workers = configure(**values), group(2)
    whole = workers.run(lambda comm: train(comm, config, DirectoryObjectStore(tmp_path / "whole"), task()))
    cut = DirectoryObjectStore(tmp_path / "cut")
    first = workers.run(lambda comm: train(comm, config, cut, task(), stop_at=stop_at))
    assert [trainer.step for trainer, _ in first] == [stop_at + 1] * 2
    second = workers.run(lambda comm: train(comm, config, cut, task(), resume=True))
    assert losses(first[0][1]) + losses(second[0][1]) == losses(whole[0][1])
    assert sizes(first[0][1]) + sizes(second[0][1]) == sizes(whole[0][1])
    assert len(set(sizes(whole[0][1]))) == 2
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole") != b""


@pytest.mark.parametrize("stop_at", [6, 8])  # behind 7 and 9 steps: within epoch 1, and at the beginning of epoch 2
def test_a_donor_gives_the_batch_and_the_learning_rate_that_are_in_force(
    group: Callable[..., Group], tmp_path: Path, stop_at: int
) -> None:
    """As in a new generation: one of three comes with another state."""
    objects, workers = DirectoryObjectStore(tmp_path), group(3)
    expected = losses(group(1).run(lambda comm: train(comm, configure(**SCHEDULE), None))[0][1])

    def stop(comm: Communicator) -> Trainer:
        return train(comm, configure(**SCHEDULE), None, stop_at=stop_at)[0]

    stopped = workers.run(stop)

    def go_on(comm: Communicator) -> list[float]:
        trainer = stopped[comm.rank]
        if comm.rank == 2:
            trainer = train(Communicator(), configure(**SCHEDULE), None, stop_at=1)[0]
        trainer.stop_requested, trainer.objects = False, objects
        trainer.attach(comm)
        if comm.rank == 0:
            trainer.give_snapshot(2)
        comm.barrier()
        if comm.rank == 2:
            trainer.take_snapshot(2)
        comm.barrier()
        trainer.run()
        assert (trainer.batch.size, trainer.adapter.optimizer.lr) == (10, 0.02)  # type: ignore[attr-defined]
        return [row["loss"] for row in trainer.recent if "loss" in row]

    for curve in workers.run(go_on):
        np.testing.assert_allclose(curve, expected, rtol=1e-5)


def test_workers_that_have_decided_go_on_with_those_that_have_not(group: Callable[..., Group]) -> None:
    """A generation may end while the workers agree on an epoch's batch: some know the answer, others ask again."""

    class Doubling(Line):
        def global_batch_size(self, epoch: int, metrics: dict[str, float]) -> int | None:
            return 2 * int(metrics["global_batch_size"]) if epoch else None

    workers = group(2)
    config = configure(epochs=3, lr_rule="linear")
    expected = workers.run(lambda comm: losses(train(comm, config, None, Doubling())[1]))
    assert len(expected[0]) == 6 + 3 + 2

    def run(comm: Communicator) -> list[float]:
        trainer, _ = train(comm, config, None, Doubling(), stop_at=5)
        assert (trainer.step, trainer.step_in_epoch) == (6, 0)
        trainer.stop_requested = False
        if comm.rank == 1:
            trainer.batch.begin(1, trainer.metrics, Communicator())
        trainer.attach(comm)
        trainer.run()
        return [row["loss"] for row in trainer.recent if "loss" in row]

    assert workers.run(run) == expected


def test_a_checkpoint_of_a_time_without_schedules_is_taken_over_to_the_bit(tmp_path: Path) -> None:
    objects = DirectoryObjectStore(tmp_path)
    with Communicator() as comm:
        whole = losses(train(comm, configure(), None)[1])
        train(comm, configure(), objects, stop_at=8)
        where = max((tmp_path / "run" / "checkpoints").iterdir())
        state = json.loads((where / "state.json").read_text())
        for name in ("batch", "history", "batch_schedule", "lr_rule"):
            del state[name]
        state["framework"] = {}
        (where / "state.json").write_text(json.dumps(state))
        manifest = json.loads((where / "MANIFEST.json").read_text())
        manifest["state.json"] = sha256((where / "state.json").read_bytes()).hexdigest()
        (where / "MANIFEST.json").write_text(json.dumps(manifest))
        _, rows = train(comm, configure(), objects, resume=True)
    assert losses(rows) == whole[9:]


@pytest.mark.parametrize("other", [{"batch_schedule": "0:10,2:20"}, {"lr_rule": "sqrt"}])
def test_a_resumed_run_keeps_its_schedule_and_its_rule(tmp_path: Path, other: dict[str, Any]) -> None:
    objects = DirectoryObjectStore(tmp_path)
    with Communicator() as comm:
        train(comm, configure(), objects, stop_at=3)
        with pytest.raises(CheckpointError, match=f"made with {next(iter(other))}"):
            train(comm, configure(**other), objects, resume=True)


# ---- the learning rate ----


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("linear", 2), ("sqrt", 2**0.5)])
@pytest.mark.parametrize("task", [Line, Sequential])
def test_the_rule_multiplies_the_learning_rate_at_the_change(task: type[Task], rule: str, factor: float) -> None:
    seen: list[float] = []

    class Watched(task):  # type: ignore[misc, valid-type]
        def optimizer(self, model: Any) -> Any:
            self.made = super().optimizer(model)
            return self.made

        def loss(self, model: Any, batch: Any) -> Any:
            seen.append(self.made.lr if isinstance(self.made, SGD) else self.made.param_groups[0]["lr"])
            return super().loss(model, batch)

        def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
            return {}

    with Communicator() as comm:
        trainer, _ = train(comm, configure(epochs=2, batch_schedule="0:10,1:20", lr_rule=rule), None, Watched())
    first = 0.02 if task is Line else 0.01
    assert seen == [first] * 6 + [first * factor] * 3
    assert trainer.batch.lr_factor == factor


def test_doubled_by_the_linear_rule_a_step_is_twice_as_long(tmp_path: Path) -> None:
    """Without momentum, and with every sample alike, only the learning rate is left to make a difference."""

    class Alike(Line):
        def data(self) -> dict[str, Any]:
            return {"train": (np.ones((40, 4), np.float32), np.ones(40, np.float32))}

        def loss(self, model: Any, batch: Any) -> Any:
            positions.append(float(model["b"]))
            return 1.0, {"w": np.zeros(4, np.float32), "b": np.float32(-1)}

        def optimizer(self, model: Any) -> Any:
            return SGD(model, lr=0.25)

    positions: list[float] = []
    with Communicator() as comm:
        train(comm, configure(epochs=3, batch_schedule="0:10,1:20", lr_rule="linear"), None, Alike())
    assert np.diff(positions).tolist() == [0.25] * 4 + [0.5] * 3


@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR"])
def test_a_scheduler_of_pytorch_goes_on_from_the_changed_rate(scheduler: str) -> None:
    import torch

    class Scheduled(Plain):
        def optimizer(self, model: Any) -> Any:
            optimizer = super().optimizer(model)
            kinds: dict[str, Any] = {
                "StepLR": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5),
                "OneCycleLR": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.04, 20, cycle_momentum=False),
            }
            made = kinds[scheduler]()
            optimizer.register_step_post_hook(lambda *_: made.step())
            optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
            return optimizer

    rates: list[float] = []
    with Communicator() as comm:
        train(comm, configure(epochs=3, batch_schedule="0:10,1:20"), None, Scheduled())
        kept, rates = rates, []
        train(comm, configure(epochs=3, batch_schedule="0:10,1:20", lr_rule="linear"), None, Scheduled())
    assert len(set(kept)) > 2
    assert rates == pytest.approx([rate * (1 if step < 6 else 2) for step, rate in enumerate(kept)])


class Bare:
    """An optimizer that keeps its learning rate to itself."""

    def step(self, gradients: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def test_a_rule_that_finds_no_learning_rate_says_so_before_training() -> None:
    import torch

    class Hidden(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

    for task, optimizer, told in (
        (Line, lambda self, model: Bare(), "a Bare, has no number `lr`"),
        (Plain, lambda self, model: Hidden(model.parameters()), 'a Hidden, has no "lr"'),
    ):
        odd = type("Odd", (task,), {"optimizer": optimizer})
        with Communicator() as comm:
            with pytest.raises(TaskError, match=told):
                train(comm, configure(batch_schedule="0:10,1:20", lr_rule="sqrt"), None, odd())
            if task is Line:  # without a rule it does not matter
                assert train(comm, configure(batch_schedule="0:10,1:20"), None, odd())[0].state == "done"


# ---- the callback ----


@pytest.mark.parametrize("n", [1, 3])
def test_a_task_chooses_the_batch_by_its_metrics(group: Callable[..., Group], n: int) -> None:
    Growing.asked.clear()
    runs = group(n).run(lambda comm: train(comm, configure(epochs=4, lr_rule="linear"), None, Growing()))
    for trainer, rows in runs:
        ended = [row["metrics"]["mse"] for row in rows if row.get("kind") == "epoch"]
        expected = [10, *(30 if mse < 1 else 10 for mse in ended[:-1])]
        assert [row["global_batch_size"] for row in rows if row.get("kind") == "epoch"] == expected
        assert set(expected) == {10, 30}
        assert trainer.batch.lr_factor == 3
    assert sorted({epoch for epoch, _ in Growing.asked}) == [0, 1, 2, 3]
    assert [metrics for epoch, metrics in Growing.asked if epoch == 0] == [{"global_batch_size": 10}] * n
    for epoch, metrics in Growing.asked[n:]:
        assert metrics == {"mse": ended[epoch - 1], "global_batch_size": expected[epoch - 1]}


def test_a_batch_smaller_than_the_number_of_workers_trains_with_those_it_is_enough_for(group: Callable[..., Group]) -> None:
    class Tiny(Line):
        def global_batch_size(self, epoch: int, metrics: dict[str, float]) -> int | None:
            return np.int64(2)  # type: ignore[return-value]

    expected = losses(group(1).run(lambda comm: train(comm, configure(epochs=1), None, Tiny()))[0][1])
    assert len(expected) == 27
    for _, rows in group(4).run(lambda comm: train(comm, configure(epochs=1), None, Tiny())):
        np.testing.assert_allclose(losses(rows), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (0, "gave 0, not 1 to"),
        (-4, "gave -4, not 1 to"),
        (2**40, "gave 1099511627776, not 1 to"),
        (64.0, "gave 64.0, a float, not an int or None"),
        (True, "gave True, a bool"),
        ("64", "gave '64', a str"),
        (ZeroDivisionError("never"), "raised ZeroDivisionError: never"),
    ],
)
def test_nonsense_of_a_callback_is_named_with_the_call(answer: Any, told: str) -> None:
    class Odd(Line):
        def global_batch_size(self, epoch: int, metrics: dict[str, float]) -> int | None:
            if epoch == 0:
                return None
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[no-any-return]

    with (
        Communicator() as comm,
        pytest.raises(TaskError, match=rf"global_batch_size\(epoch=1, metrics={{'global_batch_size': 10, 'mse': .*}}\) {told}"),
    ):
        train(comm, configure(), None, Odd())


def test_workers_that_disagree_are_all_told(group: Callable[..., Group]) -> None:
    class Own(Line):
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def global_batch_size(self, epoch: int, metrics: dict[str, float]) -> int | None:
            return 10 + self.rank if epoch == 1 else None

    for outcome in group(3).attempt(lambda comm: train(comm, configure(), None, Own(comm.rank))):
        assert isinstance(outcome.error, TaskError)
        assert "disagree about the global batch of epoch 1, by rank [10, 11, 12]" in str(outcome.error)


def test_a_callback_beside_a_schedule_and_one_that_is_no_method_are_refused() -> None:
    with Communicator() as comm:
        with pytest.raises(TaskError, match=r"Growing has a global_batch_size\(\) of its own and the run a --batch-schedule"):
            train(comm, configure(**SCHEDULE), None, Growing())
        with pytest.raises(TaskError, match="global_batch_size is a int, not a method"):
            train(comm, configure(), None, type("Number", (Line,), {"global_batch_size": 32})())


def test_batches_are_loaded_ahead_across_epochs_as_far_as_the_batch_is_known() -> None:
    class Data:
        """Counts what is taken of it."""

        def __init__(self) -> None:
            self.taken = 0
            self.changed = threading.Condition()

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            with self.changed:
                self.taken += 1
                self.changed.notify_all()
            return np.float32(1)

    class Slow(Line):
        def __init__(self) -> None:
            self.samples = Data()

        def data(self) -> dict[str, Any]:
            return {"train": self.samples, "test": np.ones(1, np.float32)}

        def loss(self, model: Any, batch: Any) -> Any:
            return 1.0, {name: np.zeros_like(array) for name, array in model.items()}

        def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
            with self.samples.changed:
                timeout_s = 0.2 if isinstance(self, Asking) else 10.0
                ahead.append(self.samples.changed.wait_for(lambda: self.samples.taken > 10, timeout_s))
            return {}

    class Asking(Slow):
        def global_batch_size(self, epoch: int, metrics: dict[str, float]) -> int | None:
            return 5

    for task, expected in ((Slow(), True), (Asking(), False)):
        ahead: list[bool] = []
        with Communicator() as comm:
            train(comm, configure(epochs=2, global_batch_size=5), None, task)
        assert ahead[0] is expected


# ---- early stop ----


class Plateau(Line):
    """Gets better for three epochs, then no more."""

    def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
        return {"accuracy": self.score(), "error": 1 - self.score()}

    def score(self) -> float:
        return [0.1, 0.5, 0.7, 0.6, 0.7, 0.65, 0.9][min(self.epochs_seen, 6)]

    epochs_seen = 0

    def global_batch_size(self, epoch: int, metrics: dict[str, float]) -> int | None:
        self.epochs_seen = epoch
        return None


@pytest.mark.parametrize(
    ("values", "epochs"),
    [
        ({"patience": 2}, 5),
        ({"patience": 3}, 6),
        ({"patience": 4}, 9),
        ({"patience": 2, "stop_metric": "error", "stop_mode": "min"}, 5),
        ({"patience": 1, "stop_metric": "error"}, 2),
        ({"patience": 2, "target_accuracy": 0.5}, 2),
    ],
)
def test_training_ends_when_it_has_stopped_getting_better(values: dict[str, Any], epochs: int, tmp_path: Path) -> None:
    objects = DirectoryObjectStore(tmp_path)
    with Communicator() as comm:
        trainer, rows = train(comm, configure(epochs=9, **values), objects, Plateau())
        assert (trainer.state, trainer.epoch, len(losses(rows))) == ("done", epochs, 6 * epochs)
        trainer, rows = train(comm, configure(epochs=9, **values), objects, Plateau(), resume=True)
        assert (trainer.state, losses(rows)) == ("done", [])  # resumed, it is still done
        for stop_at in (5, 11, 17):  # what was seen before it was stopped counts
            cut = DirectoryObjectStore(tmp_path / str(stop_at))
            train(comm, configure(epochs=9, **values), cut, Plateau(), stop_at=stop_at)
            assert train(comm, configure(epochs=9, **values), cut, Plateau(), resume=True)[0].epoch == epochs


def test_a_metric_that_is_no_number_is_never_better() -> None:
    class Nan(Line):
        def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
            return {"accuracy": float("nan")}

    with Communicator() as comm:
        assert train(comm, configure(epochs=9, patience=3), None, Nan())[0].epoch == 3
        with pytest.raises(TaskError, match='--patience needs "accuracy" in what evaluate'):
            train(comm, configure(patience=3), None)
