"""How much of the communication hides behind backward: ResNet-18 on n worker processes, interleaved in one run.

    python -m bench.overlap [--workers 4] [--batch 2 4 8 | --paced-ms 300 600 1200] [--rate-mbit 600] [--bucket-mb 4]
                            [--rounds 7] [--json]

A step is forward, backward and the optimizer, with one torch thread a worker, and the all-reduce of 11.2 M gradients.
In each round all workers do, released together: the step without communication; the all-reduce of the buckets without
computing; both, one after the other; both, overlapped. The slowest worker counts; the table gives medians.

`over bound` is the overlapped step over the larger of computing and communicating; the bar is 1.15. Communication cannot
begin before backward does: `over possible` divides by the larger of computing and forward + communicating. `cpu s` is what
the workers together used of the processor in a computing and in a communicating round (without the store and the kernel):
when that divided by the cores comes near the bound, the cores are the limit, not the links.

Workers on one machine share its cores; functions each have their own. --paced-ms stands for those: images of 8x8 pixels,
and each convolution waits for its part of so many milliseconds (a third forward, the rest backward, by its operations on
32x32 pixels) without using the processor.

With --rate-mbit every worker's link to the store is shaped (Linux, root); with 0 all use loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

from smlt import Communicator
from smlt.store.embedded import EmbeddedStore
from smlt.worker.buckets import BUCKET_MB

MODES = ("compute", "communicate", "in turn", "overlapped")
WARM_UP = 2


class Pace:
    """Makes a model's convolutions take `seconds` in all."""

    seconds = 0.0

    def rule(self, model: Any) -> None:
        import torch

        convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
        operations: dict[Any, int] = {}
        hooks = [
            module.register_forward_hook(lambda m, _, out: operations.update({m: out.numel() * m.weight[0].numel()}))
            for module in convolutions
        ]
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 32, 32))
        for hook in hooks:
            hook.remove()
        for module in convolutions:
            part = operations[module] / sum(operations.values())
            module.register_forward_hook(lambda *_, part=part: time.sleep(self.seconds * part / 3))
            module.register_full_backward_hook(lambda *_, part=part: time.sleep(self.seconds * part * 2 / 3))


def worker(rank: int, n: int, options: argparse.Namespace, links: Any, url: str, start: Any, times: Any) -> None:
    if links is not None:
        links.enter(rank)
    import torch
    from torch.nn import functional

    from bench.models import resnet18
    from smlt import Task
    from smlt.worker.frameworks.torch import TorchAdapter

    warnings.filterwarnings("ignore", "Full backward hook is firing")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pace = Pace()

    def model() -> Any:
        made = resnet18()
        if options.paced_ms:
            pace.rule(made)
        return made

    class Images(Task):
        forward_s = 0.0

        def loss(self, model: Any, batch: Any) -> Any:
            began = time.perf_counter()
            loss = functional.cross_entropy(model(batch[0]), batch[1])
            self.forward_s = time.perf_counter() - began
            return loss

        def optimizer(self, model: Any) -> Any:
            return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    task = Images()
    whole = TorchAdapter(task, model())
    cut = TorchAdapter(task, model(), int(options.bucket_mb * 2**20))
    with Communicator(url, job="overlap", rank=rank, world_size=n, codec=options.codec) as comm:

        def compute(batch: Any) -> None:
            whole.compute(batch, 1.0, lambda bucket: None)
            whole.apply()

        def communicate(batch: Any) -> None:
            works = []
            cut.skip(lambda bucket: works.append(comm.allreduce_async(bucket, out=bucket)))
            comm.allreduce(cut.gradient, out=cut.gradient)
            for work in works:
                work.wait()

        def in_turn(batch: Any) -> None:
            whole.compute(batch, 1.0, lambda bucket: None)
            comm.allreduce(whole.gradient, out=whole.gradient)
            whole.apply()

        def overlapped(batch: Any) -> None:
            works = []
            cut.compute(batch, 1.0, lambda bucket: works.append(comm.allreduce_async(bucket, out=bucket)))
            comm.allreduce(cut.gradient, out=cut.gradient)
            for work in works:
                work.wait()
            cut.apply()

        modes: dict[str, Callable[[Any], None]] = dict(zip(MODES, (compute, communicate, in_turn, overlapped), strict=True))
        for size in options.paced_ms or options.batch:
            pace.seconds = size / 1e3
            images, pixels = (2, 8) if options.paced_ms else (size, 32)
            batch = torch.randn(images, 3, pixels, pixels), torch.randint(10, (images,))
            for number in range(options.rounds + WARM_UP):
                for name, mode in modes.items():
                    start.wait()
                    began, used = time.perf_counter(), time.process_time()
                    mode(batch)
                    seconds, cpu = time.perf_counter() - began, time.process_time() - used
                    if number >= WARM_UP:
                        times.put((size, name, number, seconds, cpu))
                        if name == "compute":
                            times.put((size, "forward", number, task.forward_s, cpu))
        start.wait()  # nobody leaves while others measure


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians by batch size and mode."""
    n, context = options.workers, mp.get_context("spawn")
    sizes = options.paced_ms or options.batch
    start, times = context.Barrier(n), context.Queue()
    with contextlib.ExitStack() as stack:
        links = None
        if options.rate_mbit:
            from bench.links import shaped_links

            links = stack.enter_context(shaped_links(n, rate_mbit=options.rate_mbit))
        store = stack.enter_context(EmbeddedStore(bind=links.store_hosts if links is not None else ()))
        processes = []
        for rank in range(n):
            url = store.tcp_url if links is None else store.tcp_url_at(links.store_host(rank))
            processes.append(context.Process(target=worker, args=(rank, n, options, links, url, start, times), daemon=True))
            processes[-1].start()
        rows = [times.get(timeout=300) for _ in range(n * options.rounds * (len(MODES) + 1) * len(sizes))]
        for process in processes:
            process.join()
    found = []
    for size in sizes:
        medians: dict[str, float] = {}
        cpu: dict[str, float] = {}
        for name in (*MODES, "forward"):
            rounds: dict[int, list[tuple[float, float]]] = {}
            for _, _, number, seconds, used in (row for row in rows if row[:2] == (size, name)):
                rounds.setdefault(number, []).append((seconds, used))
            medians[name] = statistics.median(max(seconds for seconds, _ in each) for each in rounds.values())
            cpu[name] = statistics.median(sum(used for _, used in each) for each in rounds.values())
        bound = max(medians["compute"], medians["communicate"])
        found.append(
            {
                "paced_ms" if options.paced_ms else "batch": size,
                **{f"{name.replace(' ', '_')}_s": seconds for name, seconds in medians.items()},
                "over_bound": medians["overlapped"] / bound,
                "over_possible": medians["overlapped"] / max(medians["compute"], medians["forward"] + medians["communicate"]),
                "over_in_turn": medians["overlapped"] / medians["in turn"],
                "compute_cpu_s": cpu["compute"],
                "communicate_cpu_s": cpu["communicate"],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 4, 8], help="samples a worker and step")
    parser.add_argument("--paced-ms", type=int, nargs="+", default=[], help="wait so long instead of computing")
    parser.add_argument("--rate-mbit", type=float, default=600.0, help="of each worker's link; 0: loopback, not shaped")
    parser.add_argument("--bucket-mb", type=float, default=BUCKET_MB)
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), **vars(options), "rows": rows}))
        return
    print(f"n={options.workers}, {options.rate_mbit:g} Mbit/s, {os.cpu_count()} cores; milliseconds")
    print(
        ("paced" if options.paced_ms else "batch")
        + "  compute  communicate  in turn  overlapped  over bound  over possible  over in turn  cpu s"
    )
    for row in rows:
        numbers = [row[f"{name.replace(' ', '_')}_s"] * 1e3 for name in MODES]
        print(
            "{:5} {:8.0f} {:12.0f} {:8.0f} {:11.0f}".format(row["paced_ms" if options.paced_ms else "batch"], *numbers)
            + f" {row['over_bound']:11.2f} {row['over_possible']:14.2f} {row['over_in_turn']:13.2f}"
            + f"  {row['compute_cpu_s']:.2f} + {row['communicate_cpu_s']:.2f}"
        )


if __name__ == "__main__":
    main()
