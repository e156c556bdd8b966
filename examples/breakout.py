"""Atari Breakout from pixels by PPO (PyTorch, ale-py): n workers that act and learn in parallel.

    smlt launch -n 2 examples/breakout.py --minutes 10
    smlt launch -n 2 examples/breakout.py --minutes 20 --resume
    python examples/breakout.py --evaluate 20 --play game.gif

Each worker plays games of its own, computes the gradient of what it has seen and averages it with the others'
(`smlt.allreduce`): synchronous, data-parallel PPO. All hold the same parameters at all times, to the bit, which is checked.
`handler` is the same as a Lambda function. docs/breakout.md has the figures and the recipe for 50 million frames.

A run keeps checkpoints and metrics.jsonl in --out. With one seed, n and --frames it is the same run again; limits in time
make the learning rate depend on the clock, and a resumed run begins new games.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from breakout_env import Games
from breakout_ppo import NETWORKS
from breakout_run import Budget, Run, Settings, load_checkpoint, make_model

import smlt
from smlt.errors import ConfigError, SmltError
from smlt.store.object import open_object_store

REPORT_EVERY_S = 5.0


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """The worker as a Lambda function: invoke it n times at once, again and again until each says "done".

    `event`: {"smlt": {store, job, rank, world_size}, "breakout": {"out": "s3://bucket/prefix", "frames": 50_000_000, any
    of Settings}}. Every invocation goes on from the newest checkpoint in `out`, and stops with one before its time is up.
    Each round of invocations takes a job's name of its own.
    """
    communicator = smlt.init(event)
    torch.set_num_threads(1)
    asked = dict(event.get("breakout", {}))
    out = asked.pop("out", None)
    if out is None:
        raise ConfigError('the event\'s "breakout" needs "out": where checkpoints are kept, s3://bucket/prefix')
    budget = Budget(**{field.name: asked.pop(field.name, None) for field in dataclasses.fields(Budget)})
    try:
        settings = Settings(**asked)
    except TypeError as error:
        raise ConfigError(f'the event\'s "breakout": {error}') from error
    run = Run(communicator, settings, budget, open_object_store(out), resume=True)
    # Half a minute for the update under way and the checkpoint.
    end = time.monotonic() + context.get_remaining_time_in_millis() / 1e3 - 30
    run.stop = lambda: time.monotonic() > end
    return run.train()


class Terminal:
    """Prints rank 0's rows, every few seconds, as text or as JSON lines; writes all of them to metrics.jsonl in `folder`."""

    def __init__(self, as_json: bool, folder: Path | None) -> None:
        self.as_json, self.folder = as_json, folder
        self.printed = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "metrics.jsonl").open("a") as file:
                print(json.dumps(row), file=file)
        if time.monotonic() < self.printed + REPORT_EVERY_S and "status" not in row:
            return
        self.printed = time.monotonic()
        print(json.dumps(row) if self.as_json else self._text(row), flush=True)

    @staticmethod
    def _text(row: dict[str, Any]) -> str:
        spent = row["act_s"] + row["wait_s"] + row["learn_s"] + row["communicate_s"]
        parts = ", ".join(
            f"{name} {row[f'{name}_s'] / max(spent, 1e-9):.0%}" for name in ("act", "learn", "communicate", "wait")
        )
        mean = "-" if row["mean_return"] is None else f"{row['mean_return']:.2f}"
        return (
            f"{row['elapsed_s']:6.0f} s  {row['frames']:>11,} frames  {row['frames_per_s']:6,.0f}/s  return {mean:>6} "
            f"(last {row['averaged']} of {row['episodes']:,})  loss {row['loss'] or 0:.3f}  {parts}"
            + (f"  {row['status']}" if "status" in row else "")
        )


def train(options: argparse.Namespace) -> int:
    """Train as the command line says; the exit code."""
    communicator = smlt.init()
    budget = Budget(options.frames, options.minutes, options.cpu_minutes)
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    local = Path(options.out) if "://" not in options.out else None
    objects = open_object_store(options.out)
    if options.resume:
        load_checkpoint(objects)  # an error when there is none
    run = Run(communicator, settings, budget, objects, options.resume)
    signals: list[int] = []

    def ask_to_stop(number: int, _: Any) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # who asks again does not want to wait

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    run.stop = lambda: bool(signals)
    if run.rank == 0:
        run.report = Terminal(options.json, local)
    try:
        end = run.train()
    finally:
        for number, action in before.items():
            signal.signal(number, action)
        smlt.finalize()
    if end["status"] == "stopped" and run.rank == 0:
        print(f"stopped; the checkpoint is in {options.out}: go on with --resume", file=sys.stderr)
    return 128 + signals[0] if signals else 0


def evaluate(options: argparse.Namespace) -> int:
    """Play with a checkpoint's policy: the mean score of --evaluate games, and one game as a GIF."""
    tensors, state = load_checkpoint(open_object_store(options.out))
    settings = Settings(**state["settings"])
    model = make_model(settings)
    model.load_state_dict({name[6:]: torch.from_numpy(array) for name, array in tensors.items() if name.startswith("model.")})
    count = options.evaluate or 1
    games = Games(count, options.seed + 1_000_000_007)
    generator = torch.Generator().manual_seed(options.seed)
    scores: dict[int, float] = {}
    pictures = []
    # One game of each: the first to be finished would be the short ones.
    while len(scores) < count:
        if 0 not in scores and options.play is not None:
            pictures.append(games.observations[0, :, :, -1].copy())
        with torch.no_grad():
            logits, _ = model(torch.from_numpy(games.observations))
        games.step(torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1).numpy())
        for number, score in games.finished:
            scores.setdefault(number, score)
        games.finished.clear()
    mean = sum(scores.values()) / count
    if options.play is not None:
        _write_gif(options.play, pictures)
    row = {"episodes": count, "mean_return": mean, "best": max(scores.values()), "frames": state["frames"]}
    print(json.dumps(row) if options.json else f"mean score of {count} games: {mean:.2f}, the best {row['best']:g}")
    return 0


def _write_gif(path: Path, pictures: list[Any]) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("--play writes with Pillow: pip install pillow") from error
    frames = [Image.fromarray(picture).resize((336, 336), Image.Resampling.NEAREST) for picture in pictures]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 * 4 // 60, loop=0)


def parser() -> argparse.ArgumentParser:
    """The command line; an option for each of Settings."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = made.add_argument_group("when to end (whichever comes first; a resumed run counts from its very beginning)")
    budget.add_argument("--minutes", type=float, help="by the clock")
    budget.add_argument("--cpu-minutes", type=float, help="of processor time, all workers together")
    budget.add_argument("--frames", type=int, help="of the game, all workers together; 4 an action")
    made.add_argument("--out", default="breakout-run", help="folder or s3:// for checkpoints (default: %(default)s)")
    made.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    made.add_argument("--json", action="store_true", help="print JSON lines")
    made.add_argument("--evaluate", type=int, metavar="GAMES", help="do not train: play so many games with the checkpoint")
    made.add_argument("--play", type=Path, metavar="FILE.gif", help="do not train: draw a game with the checkpoint")
    hyper = made.add_argument_group("hyper-parameters")
    choices = {"network": tuple(NETWORKS), "precision": ("auto", "fp32", "bf16")}
    for field in dataclasses.fields(Settings):
        hyper.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            choices=choices.get(field.name),
            help=f"{field.metadata['help']} (default: %(default)s)",
        )
    return made


def main() -> int:
    """Train, or play; the exit code."""
    made = parser()
    options = made.parse_args()
    torch.set_num_threads(1)  # a worker is one core
    try:
        if options.evaluate is not None or options.play is not None:
            if options.evaluate is not None and options.evaluate < 1:
                raise ConfigError("--evaluate: at least one game")
            return evaluate(options)
        return train(options)
    except ConfigError as error:
        made.error(str(error))
    except SmltError as error:
        print(f"breakout: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
