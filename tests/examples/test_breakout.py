"""Breakout by PPO: its arithmetic against plain references, and short real runs with real games."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from groups import Group

torch = pytest.importorskip("torch")
pytest.importorskip("ale_py", reason="Breakout needs the extra atari")
pytest.importorskip("gymnasium")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))

import breakout  # noqa: E402
from breakout_env import ACTIONS, Games, atari_vector_env  # noqa: E402
from breakout_ppo import NETWORKS, ActorCritic, Learner, Rollout, advantages, ppo_loss  # noqa: E402
from breakout_run import Budget, Run, Settings, load_checkpoint  # noqa: E402

import smlt  # noqa: E402
from smlt.errors import CheckpointError, CollectiveError, ConfigError, WorkerLostError  # noqa: E402
from smlt.store.object import open_object_store  # noqa: E402

NETWORKS["tiny"] = (((4, 8, 8),), 16)
#: Two updates of two steps by two workers: 2 * 2 workers * 2 games * 16 actions * 4 frames.
SMALL = Settings(envs=2, steps=16, minibatches=2, epochs=1, network="tiny", seed=5)
FRAMES = 512


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(workers: Group, folder: Path, frames: int, resume: bool = False, **changes: Any) -> list[Run]:
    """Two workers' runs, trained to `frames`."""
    settings = Settings(**{**vars(SMALL), **changes})

    def work(communicator: smlt.Communicator) -> Run:
        run = Run(communicator, settings, Budget(frames=frames), open_object_store(str(folder)), resume)
        run.rows = []
        run.report = run.rows.append
        assert run.train()["status"] == "done"
        return run

    return workers.run(work)


def parameters(run: Run) -> np.ndarray:
    return run.learner.flat.detach().numpy()


def test_advantages_are_the_discounted_sums_of_td_errors_up_to_an_episode_s_end() -> None:
    draw = np.random.default_rng(1)
    steps, envs, discount, trace = 9, 5, 0.9, 0.8
    rewards, values = draw.normal(size=(2, steps, envs)).astype(np.float32)
    ended = (draw.random((steps, envs)) < 0.25).astype(np.float32)
    last = draw.normal(size=envs).astype(np.float32)
    as_tensor = torch.from_numpy
    nothing = torch.empty(0)
    rollout = Rollout(nothing, nothing, nothing, as_tensor(values), as_tensor(rewards), as_tensor(ended), as_tensor(last))
    found = advantages(rollout, discount, trace)
    assert ended.any()
    following = np.vstack([values[1:], last])
    for env in range(envs):
        for step in range(steps):
            expected, weight = 0.0, 1.0
            for later in range(step, steps):
                goes_on = 1 - ended[later, env]
                expected += weight * (rewards[later, env] + discount * goes_on * following[later, env] - values[later, env])
                weight *= discount * trace
                if not goes_on:
                    break
            assert found[step, env].item() == pytest.approx(expected, abs=1e-5)


def test_the_loss_and_its_gradient_are_those_of_a_sample_by_sample_computation() -> None:
    draw = np.random.default_rng(2)
    batch, clip = 64, 0.2
    logits, values = draw.normal(size=(batch, 4)), draw.normal(size=batch)
    actions = draw.integers(4, size=batch)
    old, advantage, targets = draw.normal(-1.4, 0.4, batch), draw.normal(size=batch), draw.normal(size=batch)

    def reference(logits: np.ndarray) -> float:
        total = 0.0
        for i in range(batch):
            probabilities = np.exp(logits[i]) / np.exp(logits[i]).sum()
            ratio = probabilities[actions[i]] / np.exp(old[i])
            surrogate = min(ratio * advantage[i], min(max(ratio, 1 - clip), 1 + clip) * advantage[i])
            entropy = -(probabilities * np.log(probabilities)).sum()
            total += -surrogate + 0.5 * 0.5 * (values[i] - targets[i]) ** 2 - 0.01 * entropy
        return total / batch

    variable = torch.tensor(logits, requires_grad=True)
    rest = [torch.tensor(each) for each in (values, actions, old, advantage, targets)]
    loss, parts = ppo_loss(variable, *rest, clip, 0.5, 0.01)
    loss.backward()
    assert loss.item() == pytest.approx(reference(logits))
    assert 0 < parts["clipped"] < 1
    for i, action in [(0, 0), (1, 2), (5, 3), (40, 1)]:
        moved = np.zeros_like(logits)
        moved[i, action] = 1e-6
        slope = (reference(logits + moved) - reference(logits - moved)) / 2e-6
        assert variable.grad[i, action].item() == pytest.approx(slope, abs=1e-7)


def test_a_flat_step_is_the_step_of_adam_on_each_tensor() -> None:
    flat, plain = (ActorCritic("tiny", seed=3) for _ in range(2))
    learner = Learner(flat, 1e-3, 0.5)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3, eps=1e-5)
    pixels = torch.randint(256, (6, 84, 84, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for model in (flat, plain):
            logits, values = model(pixels)
            loss = logits.square().sum() + values.sum()
            if model is flat:
                assert learner.step(loss, lambda gradient: True)
            else:
                adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                adam.step()
    for mine, other in zip(flat.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_game_s_score_is_that_of_all_its_lives() -> None:
    # The same games without the news of lost lives: there the end of an episode is that of a game.
    from gymnasium.vector import AutoresetMode

    games = Games(3, seed=11)
    plain = atari_vector_env()("breakout", 3, num_threads=1, reward_clipping=False, autoreset_mode=AutoresetMode.SAME_STEP)
    plain.reset(seed=11)
    scores, expected, lives = np.zeros(3), [], 0
    draw = np.random.default_rng(0)
    for _ in range(300):
        actions = draw.integers(len(ACTIONS), size=3)
        rewards, ended = games.step(actions)
        _, points, over, _, _ = plain.step(actions)
        assert np.array_equal(rewards, np.sign(points))
        assert not np.any(over & (ended == 0))
        scores += points
        expected += [(int(number), scores[number]) for number in np.flatnonzero(over)]
        scores[over] = 0
        lives += int(ended.sum())
    assert games.finished == expected
    assert lives >= 5 * len(expected) > 0


def test_workers_hold_the_same_parameters_and_a_run_can_be_repeated(group: Any, tmp_path: Path) -> None:
    workers = group(2)
    runs = trained(workers, tmp_path / "a", FRAMES)
    assert np.array_equal(parameters(runs[0]), parameters(runs[1]))
    assert not np.array_equal(runs[0].games.observations, runs[1].games.observations)  # but games of their own
    row = runs[0].rows[-1]
    assert (row["frames"], row["updates"], row["status"], row["world_size"]) == (FRAMES, 2, "done", 2)
    again = trained(workers, tmp_path / "b", FRAMES)
    assert np.array_equal(parameters(runs[0]), parameters(again[0]))
    other = trained(workers, tmp_path / "c", FRAMES, seed=6)
    assert not np.array_equal(parameters(runs[0]), parameters(other[0]))


def test_a_resumed_run_goes_on_from_the_checkpoint(group: Any, tmp_path: Path) -> None:
    workers = group(2)
    first = trained(workers, tmp_path, FRAMES)
    with pytest.raises(ConfigError, match="holds a run already: go on with --resume"):
        trained(workers, tmp_path, FRAMES)
    for frames in (FRAMES, 2 * FRAMES):
        runs = trained(workers, tmp_path, frames, resume=True)
        assert runs[0].rows[-1]["frames"] == frames
        assert np.array_equal(parameters(runs[0]), parameters(first[0])) == (frames == FRAMES)
    assert np.array_equal(parameters(runs[0]), parameters(runs[1]))
    steps = [run.learner.optimizer.state[run.learner.flat]["step"].item() for run in (first[0], runs[0])]
    assert steps == [4, 8]  # Adam went on too
    assert runs[0].rows[-1]["elapsed_s"] > first[0].rows[-1]["elapsed_s"]
    tensors, state = load_checkpoint(open_object_store(str(tmp_path)))
    assert (state["frames"], state["updates"]) == (2 * FRAMES, 4)
    assert np.array_equal(tensors["model.policy.bias"], runs[0].model.policy.bias.detach().numpy())
    with pytest.raises(CheckpointError, match="of another network"):
        trained(workers, tmp_path, 4 * FRAMES, resume=True, network="small")


@pytest.mark.parametrize("when", ["acting", "learning"])
def test_one_worker_that_is_asked_to_stop_stops_all_behind_the_same_step(group: Any, tmp_path: Path, when: str) -> None:
    asked_before = 4 if when == "acting" else SMALL.steps + 1  # calls of `stop`: one a step of the games, one a minibatch

    def work(communicator: smlt.Communicator) -> tuple[dict[str, Any], bytes]:
        run = Run(communicator, SMALL, Budget(minutes=5), open_object_store(str(tmp_path)))
        calls = iter(range(10**6))
        run.stop = lambda: run.rank == 1 and next(calls) >= asked_before
        return run.train(), parameters(run).tobytes()

    (row, here), (_, there) = group(2).run(work)
    assert row["status"] == "stopped"
    assert here == there
    assert load_checkpoint(open_object_store(str(tmp_path)))[1]["updates"] == 1


def test_parameters_that_differ_end_the_run(group: Any, tmp_path: Path) -> None:
    def work(communicator: smlt.Communicator) -> None:
        run = Run(communicator, SMALL, Budget(frames=FRAMES), open_object_store(str(tmp_path)))
        if run.rank == 1:

            def spoil(row: dict[str, Any]) -> None:
                with torch.no_grad():
                    run.learner.flat[7] += 1e-6

            run.report = spoil
        run.train()

    for outcome in group(2).attempt(work):
        assert isinstance(outcome.error, CollectiveError)
        assert "after update 2 the workers' parameters are not the same" in str(outcome.error)


def test_a_worker_that_leaves_ends_the_run_with_its_rank(group: Any, tmp_path: Path) -> None:
    def work(communicator: smlt.Communicator) -> None:
        run = Run(communicator, SMALL, Budget(minutes=5), open_object_store(str(tmp_path)))
        if run.rank == 1:

            def leave(row: dict[str, Any]) -> None:
                communicator.close()
                raise InterruptedError

            run.report = leave
        run.train()

    stayed, left = group(2, timeout_s=2).attempt(work)
    assert isinstance(left.error, InterruptedError)
    assert isinstance(stayed.error, WorkerLostError)
    assert stayed.error.ranks == (1,)


def test_the_handler_stops_before_its_time_is_up_and_goes_on_when_invoked_again(tmp_path: Path) -> None:
    class Context:
        remaining_s = 20.0  # less than what is kept for the checkpoint

        def get_remaining_time_in_millis(self) -> int:
            return int(self.remaining_s * 1000)

    event = {"smlt": {"rank": 0, "world_size": 1}, "breakout": {"out": str(tmp_path), "frames": 256, **vars(SMALL)}}
    context = Context()
    try:
        assert breakout.handler(event, context)["status"] == "stopped"
        context.remaining_s = 300.0
        end = breakout.handler(event, context)
        assert (end["status"], end["frames"]) == ("done", 256)
        with pytest.raises(ConfigError, match=r'the event\'s "breakout": .*\'gamma\''):
            breakout.handler({**event, "breakout": {"out": str(tmp_path), "frames": 256, "gamma": 1}}, context)
        with pytest.raises(ConfigError, match='needs "out"'):
            breakout.handler({**event, "breakout": {}}, context)
    finally:
        smlt.finalize()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say when to end"),
        (["--minutes", "0"], "must be above 0"),
        (["--minutes", "nan"], "must be above 0"),
        (["--frames", "many"], "invalid int value"),
        (["--frames", "100", "--envs", "0"], "envs must be above 0"),
        (["--frames", "100", "--clip", "2"], "clip must be from 0 to 1"),
        (["--frames", "100", "--envs", "2", "--steps", "2", "--minibatches", "5"], "some would be empty"),
        (["--frames", "100", "--network", "huge"], "invalid choice"),
        (["--evaluate", "0"], "at least one game"),
    ],
)
def test_arguments_that_cannot_work_are_told_so(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["breakout.py", *arguments, "--out", str(tmp_path / "run")])
    try:
        with pytest.raises(SystemExit) as end:
            breakout.main()
    finally:
        smlt.finalize()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: breakout.Terminal, row: dict[str, Any]) -> None:
        if "status" not in row:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(breakout.Terminal, "__call__", interrupted)
    monkeypatch.setattr(sys, "argv", ["breakout.py", "--minutes", "5", "--out", str(tmp_path), "--envs", "2", "--steps", "8"])
    handler = signal.getsignal(signal.SIGINT)
    assert breakout.main() == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    assert "go on with --resume" in capsys.readouterr().err
    assert load_checkpoint(open_object_store(str(tmp_path)))[1]["frames"] >= 64


def test_launched_workers_train_and_their_checkpoint_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--envs", "2", "--steps", "16", "--minibatches", "2", "--epochs", "1"]
    command = [sys.executable, "-m", "smlt", "launch", "-n", "2", str(EXAMPLES / "breakout.py"), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--frames", str(FRAMES), "--json", *small], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1].removeprefix("[0] "))
    assert (last["frames"], last["status"], last["world_size"]) == (FRAMES, "done", 2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["updates"] for row in rows] == [1, 2]
    pytest.importorskip("PIL")
    picture = tmp_path / "game.gif"
    monkeypatch.setattr(
        sys, "argv", ["breakout.py", "--out", str(tmp_path), "--evaluate", "2", "--json", "--play", str(picture)]
    )
    assert breakout.main() == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 2
    assert picture.read_bytes()[:4] == b"GIF8"


@pytest.mark.parametrize("arguments", [["--evaluate", "1"], ["--minutes", "1", "--resume"]])
def test_playing_or_resuming_without_a_checkpoint_says_what_to_do(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["breakout.py", *arguments, "--out", str(tmp_path)])
    try:
        assert breakout.main() == 6
    finally:
        smlt.finalize()
    assert f"there is no checkpoint in {tmp_path}: train first" in capsys.readouterr().err
