"""`smlt estimate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from smlt.cli.common import AsJson, app, examples
from smlt.client.bill import ARCHITECTURES, FREE_EPHEMERAL_MB
from smlt.client.cost import CostModel, JobEstimate
from smlt.client.offers import (
    MachineOffer,
    Offer,
    better_machine,
    interesting,
    machine_like,
    machines,
    offers,
    recommended,
)
from smlt.client.optimizer.goals import Goal, duration_text, parse_duration, parse_usd
from smlt.client.platforms import STORE_NODE, Platform
from smlt.client.prices import load_prices
from smlt.client.profiling import BUSY, ProgressLine, profile
from smlt.client.rehearsal import rehearse
from smlt.client.request import PLACES
from smlt.client.workload import Workload
from smlt.collective.codecs import check_codec
from smlt.errors import ConfigError


@app.command(
    epilog=examples(
        "smlt estimate examples/digits.py --epochs 25",
        "smlt estimate task.py --data ./images --epochs 90 --global-batch-size 1024 --deadline 2h",
        "smlt estimate task.py --budget 5.00 --arch arm64 --store-node cache.m7g.large --save task.json",
        "smlt estimate --workload task.json --epochs 200 --json",
        "smlt estimate task.py --on local --deadline 1h30m",
    )
)
def estimate(
    script: Annotated[str | None, typer.Argument(help="Script that defines a smlt.Task. Not needed with --workload.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Files for the task (its data_dir).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.", show_default="10")] = None,
    global_batch_size: Annotated[
        int | None, typer.Option(help="Samples a step, all workers together.", show_default="64")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="What gradients travel as: fp32, fp16, bf16 or int8.", show_default="fp16")
    ] = None,
    deadline: Annotated[str | None, typer.Option(metavar="TIME", help="Such as 2h, 90m, 1h30m, 45s.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="USD", help="Such as 5.00.")] = None,
    on: Annotated[str, typer.Option("--on", help="Where workers would run: lambda or local.")] = "lambda",
    arch: Annotated[str, typer.Option(help="Of the functions: x86_64 or arm64.")] = "x86_64",
    store_node: Annotated[
        str, typer.Option(metavar="NODE", help="What the store runs on: t4g.small, cache.m7g.large, ...")
    ] = STORE_NODE,
    store_nodes: Annotated[int, typer.Option(metavar="K", help="How many of them.")] = 1,
    tmp: Annotated[int, typer.Option("--tmp", metavar="MB", help="Disk of each function.")] = FREE_EPHEMERAL_MB,
    max_workers: Annotated[
        int | None, typer.Option(metavar="N", help="Look at no more than that.", show_default="128; locally twice the cores")
    ] = None,
    core_speed: Annotated[
        float, typer.Option(metavar="TIMES", help="A vCPU of a function, against a core of this machine.")
    ] = 1.0,
    month_gb_s: Annotated[
        float, typer.Option(metavar="GB-S", help="GB-seconds the account has used this month: prices fall above 6e9.")
    ] = 0.0,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prices of your own, TOML or JSON; SMLT_PRICES names one, too.")
    ] = None,
    rehearsal: Annotated[
        bool, typer.Option("--rehearsal/--no-rehearsal", help="With --on local: also train for some seconds, then stop.")
    ] = True,
    workload: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What --save has written, instead of profiling.")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep what was measured of the task.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict what training SCRIPT takes and costs, over numbers of workers and their memory.

    Some real steps are done on this machine first. The table shows the front of choices of which none is both slower and
    dearer than another, which of them keep the deadline or the budget, and which one to take; and it says when one rented
    machine would do as well for less. See docs/cost.md for what is in it and what is not.
    """
    goal = Goal(parse_duration(deadline) if deadline is not None else None, parse_usd(budget) if budget is not None else None)
    _check(on, arch, goal, max_workers)
    known = load_prices(prices)
    platform = _platform(on, arch, store_node, store_nodes, tmp, core_speed, month_gb_s)
    task = _workload(script, data, workload, platform, epochs, global_batch_size, codec)
    if save is not None:
        task.save(save)
    model = CostModel(task, platform, known)
    if platform.is_local and rehearsal and script is not None:
        model = _rehearsed(model, Path(script), data)
    most = max_workers or (2 * platform.cores if platform.is_local else 128)
    found = offers(model, model.space(most))
    taken = recommended(found, goal)
    rented = machines(model) if not platform.is_local else []
    if as_json:
        typer.echo(json.dumps(_as_json(model, found, taken, rented, goal)))
        return
    typer.echo(_about(model))
    typer.echo(_table(model, interesting(found, taken), taken, goal))
    typer.echo(_verdict(model, found, taken, rented, goal))


def _check(on: str, arch: str, goal: Goal, max_workers: int | None) -> None:
    if on not in PLACES:
        raise ConfigError(f"--on {on!r}: choose one of {', '.join(PLACES)}")
    if arch not in ARCHITECTURES:
        raise ConfigError(f"--arch {arch!r}: choose one of {', '.join(ARCHITECTURES)}")
    if on == "local" and goal.budget_usd is not None:
        raise ConfigError("--budget: workers on this machine cost nothing; give --on lambda, or a --deadline")
    if max_workers is not None and max_workers < 1:
        raise ConfigError(f"--max-workers {max_workers} is not positive")


def _platform(
    on: str, arch: str, store_node: str, store_nodes: int, tmp: int, core_speed: float, month_gb_s: float
) -> Platform:
    if on == "local":
        return Platform.local()
    return Platform.on_lambda(
        arch, store_node, store_nodes=store_nodes, ephemeral_mb=tmp, core_speed=core_speed, month_gb_s=month_gb_s
    )


def _workload(
    script: str | None,
    data: Path | None,
    saved: Path | None,
    platform: Platform,
    epochs: int | None,
    global_batch_size: int | None,
    codec: str | None,
) -> Workload:
    """Profiled, or what was kept of an earlier time, with what is asked for now."""
    if saved is not None:
        if script is not None or data is not None:
            raise ConfigError("--workload is what was measured of a script and its data: give no SCRIPT or --data")
        asked: dict[str, Any] = {"epochs": epochs, "global_batch_size": global_batch_size, "codec": codec}
        return Workload.load(saved).changed(**{name: value for name, value in asked.items() if value is not None})
    if script is None:
        raise ConfigError("give a SCRIPT, or --workload FILE")
    check_codec(codec or "fp16")
    say = ProgressLine()
    try:
        return profile(
            Path(script),
            data,
            epochs=epochs or 10,
            global_batch_size=global_batch_size or 64,
            codec=codec or "fp16",
            crowd=platform.is_local,
            say=say,
        )
    finally:
        say.close()


def _rehearsed(model: CostModel, script: Path, data: Path | None) -> CostModel:
    workers = min(model.platform.cores, model.workload.global_batch_size)
    say = ProgressLine()
    try:
        say(f"a rehearsal with {_workers_text(workers)}")
        return model.with_rehearsal(rehearse(script, data, model.workload, workers))
    finally:
        say.close()


# ---- for people ----


def _about(model: CostModel) -> str:
    task, platform = model.workload, model.platform
    steps = task.epochs * task.steps_per_epoch
    where = f"{platform.cores} cores of this machine"
    if not platform.is_local:
        nodes = f"{platform.store_nodes} x " if platform.store_nodes > 1 else ""
        where = f"Lambda ({platform.architecture}) with a store on {nodes}{platform.store_node}"
    step_s = task.compute_s(task.global_batch_size) + task.optimizer_s
    busy = ""
    if task.queued > BUSY:
        busy = f"this machine is busy: it had no core for the task {task.queued:.0%} of the time, which is left out\n"
    return (
        f"{task.script}: {task.parameters:,} parameters, {task.samples:,} samples, {task.epochs} epochs of "
        f"{task.steps_per_epoch:,} steps ({steps:,} steps of {task.global_batch_size} samples)\n{busy}"
        f"here a step takes one core {step_s * 1e3:,.1f} ms (+- {task.noise:.0%}); on {where}:\n"
    )


def _table(model: CostModel, rows: list[Offer], taken: Offer | None, goal: Goal) -> str:
    local = model.platform.is_local
    head = ["", "workers", "time", "worker s", "step ms", "compute", "communication", "other"]
    if not local:
        head[2:4] = ["memory MB", "time", "USD"]
    lines = [[*head, ""]]
    for offer in rows:
        parts = model.step(offer.choice, model.workload.global_batch_size)
        other = parts.total_s - parts.compute_s - parts.communication_s
        step = [f"{value * 1e3:,.1f}" for value in (parts.total_s, parts.compute_s, parts.communication_s, other)]
        cost = f"{offer.choice.workers * offer.seconds:,.0f}" if local else usd_text(offer.usd)
        memory = [] if local else [str(offer.choice.memory_mb)]
        mark = ("> " if offer is taken else "  ") + ("*" if offer.on_front else " ")
        lines.append(
            [mark, str(offer.choice.workers), *memory, duration_text(offer.seconds), cost, *step, _notes(offer, goal, local)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[:-1], widths[:-1], strict=True)]
        shown.append("  ".join([*cells, line[-1]]).rstrip())
    key = "* on the front: none is both faster and cheaper   > recommended"
    return "\n".join([*shown, key])


def _notes(offer: Offer, goal: Goal, local: bool) -> str:
    notes = []
    if goal.deadline_s is not None:
        notes.append("in time" if offer.seconds <= goal.deadline_s else "too late")
    if goal.budget_usd is not None:
        notes.append("within budget" if offer.usd <= goal.budget_usd else "too dear")
    if offer.store_limited and not local:
        notes.append("waits for the store")
    return ", ".join(notes)


def _verdict(model: CostModel, found: list[Offer], taken: Offer | None, rented: list[MachineOffer], goal: Goal) -> str:
    if taken is None:
        fastest, cheapest = found[0], min(found, key=lambda offer: offer.usd)
        text = f"\nno choice keeps it: the fastest is {_offer_text(fastest, model)}"
        return text + ("" if model.platform.is_local else f", the cheapest {_offer_text(cheapest, model)}")
    why = "the best trade of time and cost"
    if goal.deadline_s is not None:
        why = "the cheapest in time" + (" and within budget" if goal.budget_usd is not None else "")
    elif goal.budget_usd is not None:
        why = "the fastest within budget"
    lines = [f"\nrecommended: {_offer_text(taken, model)}: {why}"]
    if not model.platform.is_local:
        lines += _machine_lines(taken, rented)
        lines.append(f"prices of {model.prices.region}, {model.prices.as_of}; times are predictions from this machine's cores")
    return "\n".join(lines)


def _offer_text(offer: Offer, model: CostModel) -> str:
    if model.platform.is_local:
        return f"{_workers_text(offer.choice.workers)}, {duration_text(offer.seconds)}"
    return f"{offer.choice}, {duration_text(offer.seconds)}, {usd_text(offer.usd)} USD"


def _machine_lines(taken: Offer, rented: list[MachineOffer]) -> list[str]:
    better, like = better_machine(taken, rented), machine_like(taken, rented)
    if better is not None:
        return [
            f"Lambda is the wrong tool for this: one {better.node} ({better.vcpus} vCPUs, {_workers_text(better.workers)}) "
            f"would take {duration_text(better.seconds)} and {usd_text(better.usd)} USD, booting among it"
        ]
    if like is None:
        return []
    return [
        f"for comparison: one {like.node} ({like.vcpus} vCPUs, {_workers_text(like.workers)}) would take "
        f"{duration_text(like.seconds)} and {usd_text(like.usd)} USD, booting among it"
    ]


def _workers_text(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def usd_text(usd: float) -> str:
    """An amount for people: three significant digits, cents at least."""
    if usd >= 10:
        return f"{usd:,.2f}"
    digits = 2
    while digits < 6 and usd < 10 ** (1 - digits):
        digits += 1
    return f"{usd:.{digits + 1}f}"


# ---- for programs ----


def _as_json(
    model: CostModel, found: list[Offer], taken: Offer | None, rented: list[MachineOffer], goal: Goal
) -> dict[str, Any]:
    better = better_machine(taken, rented) if taken is not None else None
    return {
        "workload": json.loads(model.workload.to_json()),
        "platform": json.loads(model.platform.to_json()),
        "goal": {"deadline_s": goal.deadline_s, "budget_usd": goal.budget_usd},
        "offers": [_offer_json(model, offer, goal) for offer in found],
        "recommended": _offer_json(model, taken, goal) if taken is not None else None,
        "bill": model.job(taken.choice).bill.to_dict() if taken is not None else None,
        "machines": [asdict(machine) for machine in rented],
        "better_machine": asdict(better) if better is not None else None,
        "prices_as_of": model.prices.as_of,
        "region": model.prices.region,
    }


def _offer_json(model: CostModel, offer: Offer, goal: Goal) -> dict[str, Any]:
    job: JobEstimate = model.job(offer.choice)
    parts = model.step(offer.choice, model.workload.global_batch_size)
    return {
        "workers": offer.choice.workers,
        "memory_mb": offer.choice.memory_mb,
        "seconds": offer.seconds,
        "usd": offer.usd,
        "on_front": offer.on_front,
        "keeps_goal": offer.keeps(goal),
        "store_limited": offer.store_limited,
        "start_s": job.start_s,
        "invocations": job.invocations,
        "step": {**asdict(parts), "total_s": parts.total_s},
    }
