"""What 50 million frames of Breakout would take and cost on Lambda: a calculation, not a measurement.

    python -m bench.breakout_recipe
    python -m bench.breakout_recipe --workers 2 4 8 16 --network small --codec int8

Measured here, in processor time of one core: an action of one game, and learning from one observation once (fp32: functions
seldom have bfloat16). Calculated from it: an update is every worker's acting, epochs * minibatches times a minibatch's
learning and an all-reduce, plus three small collectives; the all-reduce by `smlt.client.communication`, whose constants are
in docs/cost.md; the bill by `smlt.client.bill` with the prices of `smlt/client/prices.py` (SMLT_PRICES: others). A function
has one vCPU (1,769 MB) that is taken to be as fast as this core. Each round of invocations loses its start, measured here
as imports and new games, and the half minute that the handler keeps for its end. Needs the extras atari and torch.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

from smlt.client.bill import LONGEST_INVOCATION_S, ObjectUse, StoreUse, estimate
from smlt.client.communication import CODEC_BYTES_PER_S, Communication
from smlt.client.platforms import BASELINE_GBIT, COLD_START_S, SANDBOX_S, Platform
from smlt.client.prices import load_prices
from smlt.worker.processors import MB_PER_VCPU

#: Bytes that a float32 travels as.
ENCODED = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.02}
END_S = 30.0  # what `breakout.handler` keeps for its end


def measure(network: str, envs: int, steps: int, minibatch: int) -> dict[str, float]:
    """Processor seconds: of a start, of an action of one game, of learning from one observation once, of a step of Adam."""
    began = time.process_time()
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    import torch
    from breakout_env import Games
    from breakout_ppo import ActorCritic, Learner, ppo_loss

    torch.set_num_threads(1)
    model = ActorCritic(network)
    learner, games = Learner(model, 1e-4, 0.5), Games(envs, 0)
    start_s = time.process_time() - began

    def act(count: int) -> None:
        for _ in range(count):
            with torch.no_grad():
                logits, _ = model(torch.from_numpy(games.observations))
            games.step(torch.multinomial(logits.softmax(1), 1).squeeze(1).numpy())

    pixels = torch.randint(256, (minibatch, 84, 84, 4), dtype=torch.uint8)
    others = (torch.randint(4, (minibatch,)), *(torch.randn(minibatch) for _ in range(3)))

    def learn(count: int) -> None:
        for _ in range(count):
            loss, _ = ppo_loss(*model(pixels), *others, 0.1, 0.5, 0.01)
            learner.step(loss, lambda gradient: True)

    found = {"start_s": start_s, "parameters": float(learner.gradient.numel())}
    for name, part, count, each in (("act_s", act, steps, envs), ("learn_s", learn, max(4, 1024 // minibatch), minibatch)):
        part(2)  # warm
        began = time.process_time()
        part(count)
        found[name] = (time.process_time() - began) / (count * each)
    found["resident_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def recipe(workers: int, options: argparse.Namespace, measured: dict[str, float]) -> dict[str, Any]:
    """Seconds of an update by part, hours and the bill of the whole, for `workers` functions."""
    observations = options.envs * options.steps
    update_frames = 4 * observations * workers
    encoded = round(measured["parameters"] * ENCODED[options.codec])
    platform = Platform.on_lambda(store_node=options.store_node)
    collective = Communication((encoded,), platform, options.codec)
    steps = options.epochs * options.minibatches
    act_s = observations * measured["act_s"]
    learn_s = options.epochs * observations * measured["learn_s"]
    communicate_s = steps * collective.exposed_s(workers, 0.0, 1.0) + 3 * collective.small_s(workers)
    updates = math.ceil(options.frames / update_frames)
    training_s = updates * (act_s + learn_s + communicate_s)
    useful_s = LONGEST_INVOCATION_S - END_S - COLD_START_S - measured["start_s"]
    rounds = math.ceil(training_s / useful_s)
    billed_s = training_s + rounds * (COLD_START_S + measured["start_s"])
    seconds = billed_s + rounds * SANDBOX_S
    bill = estimate(
        workers,
        MB_PER_VCPU,
        billed_s,
        # A checkpoint a minute, of three files; every worker reads one, of three files, in each round.
        objects=ObjectUse(puts=round(billed_s / 60) * 3, gets=3 * workers * rounds, stored_bytes=100 << 20, stored_s=seconds),
        store=StoreUse(options.store_node, seconds),
        prices=load_prices(),
    )
    return {
        "workers": workers,
        "update_frames": update_frames,
        "updates": updates,
        "act_s": act_s,
        "learn_s": learn_s,
        "communicate_s": communicate_s,
        "store_limited": collective.store_limited(workers),
        "hours": seconds / 3600,
        "rounds": rounds,
        "usd": float(bill.total_usd),
        "of_which_store_usd": float(sum(item.usd for item in bill.items if item.unit == "hour")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=50_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--network", choices=("small", "nature"), default="nature")
    parser.add_argument("--codec", choices=tuple(CODEC_BYTES_PER_S), default="fp16")
    parser.add_argument("--envs", type=int, default=16, help="games a worker")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--store-node", choices=tuple(BASELINE_GBIT), default="c6gn.xlarge")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    measured = measure(options.network, options.envs, options.steps, options.envs * options.steps // options.minibatches)
    rows = [recipe(workers, options, measured) for workers in options.workers]
    if options.json:
        print(json.dumps({"options": vars(options), "measured": measured, "rows": rows}))
        return
    print(
        f"{options.network}: {measured['parameters'] / 1e6:.2f} M parameters, {measured['resident_mb']:.0f} MB; an action "
        f"takes {measured['act_s'] * 1e3:.2f} ms of a core,\nlearning from an observation {measured['learn_s'] * 1e3:.2f} ms, "
        f"a start {measured['start_s']:.1f} s\n\n"
        "   n  observations/update  updates  act s  learn s  communicate s  hours  rounds    USD  of it the store"
    )
    for row in rows:
        sizes = f"{row['workers']:4} {row['update_frames'] // 4:20,} {row['updates']:8,}"
        parts = f"{row['act_s']:6.2f} {row['learn_s']:8.2f} {row['communicate_s']:14.2f}"
        print(
            f"{sizes} {parts} {row['hours']:6.1f} {row['rounds']:7} "
            f"{row['usd']:6.2f} {row['of_which_store_usd']:16.2f}{'   waits for the store' if row['store_limited'] else ''}"
        )


if __name__ == "__main__":
    main()
