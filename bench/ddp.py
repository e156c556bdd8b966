"""ResNet-18 by DistributedDataParallel on shaped links: a step with gloo beside a step with SMLT, interleaved in one run.

    python -m bench.ddp [--workers 4] [--batch 1 2 4 | --paced-ms 100 200 400] [--rate-mbit 600] [--rounds 7]
                        [--modes NAME ...] [--bucket-cap-mb MB] [--json PATH]

n processes, each with a network namespace of its own whose link is held to a rate each way (bench/links.py; Linux, root),
one torch thread each, share this machine's cores with the embedded store; gloo goes from worker to worker, SMLT through the
store. The model is bench/models.py's for images of 32x32 pixels: 11.2 M parameters, 45 MB of gradients. A step is zero_grad,
forward, backward, SGD with momentum. In each round every mode takes a step, all workers released together; the slowest
worker counts. `compute` is the step without DDP. `gloo fp16` is gloo with PyTorch's own fp16_compress_hook.

The table gives medians in milliseconds, and how many times a step takes as long as gloo's: median and quartiles of the
rounds' ratios. Workers here share cores where functions have one each: large batches make the cores the limit, which the
row `compute` shows. --paced-ms stands for workers with a core each: images of 8x8 pixels, and the convolutions take so many
milliseconds without using the processor (see bench/overlap.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.links import INTERFACE, Links, shaped_links
from bench.overlap import Pace
from smlt.store.embedded import EmbeddedStore

MODES = ("compute", "gloo", "gloo fp16", "smlt fp32", "smlt fp16", "smlt int8")
DEFAULT_MODES = MODES[:-1]
WARM_UP = 2  # DDP lays its buckets out anew after the first step
DEADLINE_S = 300


def make_step(mode: str, batch: int, paced_ms: int, cap_mb: float, groups: dict[str, Any]) -> Callable[[], None]:
    """A function that takes one step, of `batch` samples or at the pace given."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.nn import functional
    from torch.nn.parallel import DistributedDataParallel

    import smlt.torch
    from bench.models import resnet18

    warnings.filterwarnings("ignore", "Full backward hook is firing")
    torch.manual_seed(0)
    model = resnet18()
    if paced_ms:
        pace = Pace()
        pace.rule(model)
        model.train()
        pace.seconds = paced_ms / 1e3
    if mode != "compute":
        group = groups[mode.split()[0]]
        model = DistributedDataParallel(model, process_group=group, bucket_cap_mb=cap_mb)
        if mode == "gloo fp16":
            model.register_comm_hook(group, fp16_compress_hook)
        elif mode == "smlt fp16":
            model.register_comm_hook(group, smlt.torch.fp16_hook)
        elif mode == "smlt int8":
            model.register_comm_hook(smlt.torch.HookState("int8", group), smlt.torch.compress_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pixels = 8 if paced_ms else 32
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def worker(rank: int, options: argparse.Namespace, links: Links, url: str, folder: str, start: Any) -> list[Any]:
    """Rows of (size, mode, round, wall seconds, processor seconds); a size is a batch or a pace."""
    links.enter(rank)
    os.environ.update(GLOO_SOCKET_IFNAME=INTERFACE, SMLT_STORE=url)
    import torch
    import torch.distributed as dist

    import smlt.torch  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options.workers)
    groups = {"gloo": dist.group.WORLD, "smlt": dist.new_group(backend="smlt")}
    rows = []
    for size in options.paced_ms or options.batch:
        batch, paced_ms = (2, size) if options.paced_ms else (size, 0)
        steps = {mode: make_step(mode, batch, paced_ms, options.bucket_cap_mb, groups) for mode in options.modes}
        names = list(steps)
        for number in range(options.rounds + WARM_UP):
            turn = number % len(names)  # nobody always comes behind the same one
            for mode in names[turn:] + names[:turn]:
                start.wait(DEADLINE_S)
                began, used = time.perf_counter(), time.process_time()
                steps[mode]()
                wall, cpu = time.perf_counter() - began, time.process_time() - used
                if number >= WARM_UP:
                    rows.append((size, mode, number, wall, cpu))
        del steps
    start.wait(DEADLINE_S)  # nobody leaves while others measure
    dist.destroy_process_group()
    return rows


def run_worker(results: Any, start: Any, *arguments: Any) -> None:
    """`worker` in a process; its rows or its error go to `results`."""
    try:
        results.put((worker(*arguments, start), ""))
    except BaseException:
        results.put(([], traceback.format_exc()))
        start.abort()


def measure(options: argparse.Namespace) -> list[Any]:
    """All workers' rows."""
    spawn = mp.get_context("spawn")
    start, results = spawn.Barrier(options.workers), spawn.Queue()
    with ExitStack() as stack:
        links = stack.enter_context(shaped_links(options.workers, options.rate_mbit))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        store = stack.enter_context(EmbeddedStore(bind=links.store_hosts))
        processes = []
        for rank in range(options.workers):
            arguments = (results, start, rank, options, links, store.tcp_url_at(links.store_host(rank)), folder)
            processes.append(spawn.Process(target=run_worker, args=arguments, daemon=True))
            processes[-1].start()
            stack.callback(processes[-1].kill)  # when this is interrupted; they have ended otherwise
        answers = [results.get(timeout=DEADLINE_S * 4) for _ in processes]
        for process in processes:
            process.join(DEADLINE_S)
    errors = [error for _, error in answers if error]
    if errors:
        raise RuntimeError("a worker failed:\n" + max(errors, key=len))
    return [row for rows, _ in answers for row in rows]


def summarise(rows: list[Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each size and mode."""
    found = []
    for size in options.paced_ms or options.batch:
        slowest: dict[str, dict[int, float]] = {mode: {} for mode in options.modes}
        cpu: dict[str, dict[int, float]] = {mode: {} for mode in options.modes}
        for _, mode, number, wall, used in (row for row in rows if row[0] == size):
            slowest[mode][number] = max(wall, slowest[mode].get(number, 0.0))
            cpu[mode][number] = used + cpu[mode].get(number, 0.0)
        for mode in options.modes:
            row = {
                "paced_ms" if options.paced_ms else "batch": size,
                "mode": mode,
                "step_s": statistics.median(slowest[mode].values()),
                "cpu_s": statistics.median(cpu[mode].values()),  # all workers', without the store and the kernel
            }
            if "gloo" in slowest:
                ratios = [seconds / slowest["gloo"][number] for number, seconds in slowest[mode].items()]
                row["over_gloo"] = statistics.median(ratios)
                row["over_gloo_quartiles"] = statistics.quantiles(ratios, n=4, method="inclusive")[::2]
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4], help="samples a worker and step")
    parser.add_argument("--paced-ms", type=int, nargs="+", default=[], help="wait so long instead of computing")
    parser.add_argument("--rate-mbit", type=float, default=600.0, help="of each worker's link, each way")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(DEFAULT_MODES))
    parser.add_argument("--bucket-cap-mb", type=float, default=25.0, help="DDP's; 25 is its default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = summarise(measure(options), options)
    print(f"ResNet-18, n = {options.workers}, {options.rate_mbit:g} Mbit/s, {os.cpu_count()} cores, {options.rounds} rounds")
    size = "paced_ms" if options.paced_ms else "batch"
    print(f"{'paced' if options.paced_ms else 'batch'}  mode        step ms   x gloo (quartiles)     cpu s")
    for row in rows:
        low, high = row.get("over_gloo_quartiles", (float("nan"),) * 2)
        print(
            f"{row[size]:5}  {row['mode']:10} {row['step_s'] * 1e3:8.0f}   {row.get('over_gloo', float('nan')):.2f}"
            f" ({low:.2f} - {high:.2f})      {row['cpu_s']:.2f}"
        )
    if options.json:
        about = {"cores": os.cpu_count(), "platform": platform.platform(), "workers": options.workers}
        about |= {"rate_mbit": options.rate_mbit, "bucket_cap_mb": options.bucket_cap_mb, "rounds": options.rounds}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
