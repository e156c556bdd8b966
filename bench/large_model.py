"""Training steps of BERT-large (335 M parameters) on n workers through the embedded store, and what memory that takes.

    python -m bench.large_model [--model bert-large] [--workers 2] [--codec fp16] [--optimizer sgd|adamw] [--steps 2] [--json]

Each worker makes steps of examples/bert.py on a sample of text: without communication, then with it. Bars:

    store   its peak (INFO used_memory_peak) over n encoded gradients: 1.3
    worker  its peak of resident memory in a step with communication above that in a step without, over one encoded
            gradient: 1.1
    value   the largest value in the store: 512 MB, which is as much as Redis takes. The store is told to refuse any above
            1 MiB, so that a step that succeeds has none; the largest that was seen, by looking all the while, is shown too.
    whole   store and worker again as bench.memory has them: the gradient as one array, all-reduced at once

About 3.5 GB a worker with sgd, 6.5 GB with adamw, and the store's n encoded gradients of 0.67 GB. Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import sys
import threading
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

import redis

from bench import memory
from bench.memory import STORE_BAR, WORKER_BAR, resident_bytes
from bench.throughput import available_bytes
from bench.workloads import WORKLOADS, Replica, Workload
from smlt import Communicator
from smlt.collective.codecs import CODECS, wire_size
from smlt.store.embedded import EmbeddedStore

VALUE_BAR_BYTES = 512 << 20
REFUSED_BYTES = 1 << 20
DEADLINE_S = 1800.0
#: Of model size: parameters and gradients, and what AdamW holds; beside it a worker's PyTorch and activations.
COPIES = {"sgd": 2, "adamw": 4}
BESIDE_BYTES = 900 << 20


def worker(rank: int, n: int, workload: Workload, options: argparse.Namespace, url: str, start: Any, results: Any) -> None:
    try:
        results.put((train(rank, n, workload, options, url, start), ""))
    except BaseException:
        start.abort()
        results.put(({}, traceback.format_exc()))


def train(rank: int, n: int, workload: Workload, options: argparse.Namespace, url: str, start: Any) -> dict[str, Any]:
    """Peaks in bytes and seconds, of steps without and with communication."""
    import torch

    torch.set_num_threads(1)
    replica = Replica(workload, rank, workload.batch, own_optimizer=options.optimizer == "adamw")
    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in replica.model.parameters())}
    with Communicator(url, job="large-model", rank=rank, world_size=n, codec=options.codec) as comm:
        step = replica.step_of_smlt(comm)
        step(False)  # the optimizer's state is made
        for name, communicate in (("without", False), ("with", True)):
            start.wait(DEADLINE_S)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            seconds = []
            for _ in range(options.steps):
                start.wait(DEADLINE_S)
                began = time.perf_counter()
                step(communicate)
                seconds.append(time.perf_counter() - began)
            found[name] = {"seconds": seconds, "peak_bytes": resident_bytes("VmHWM")}
    gradients = [parameter.grad for parameter in replica.model.parameters() if parameter.grad is not None]
    found["gradients"] = [zlib.crc32(gradient.contiguous().numpy()) for gradient in gradients]
    return found


class Lookout(threading.Thread):
    """Looks for the largest value in a store until `done` is set: (bytes, key)."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.client = redis.Redis.from_url(url)
        self.done = threading.Event()
        self.largest: tuple[int, str] = (0, "")
        self.looks = 0

    def run(self) -> None:
        while not self.done.wait(0.02):
            keys = list(self.client.scan_iter(count=1000))
            for key in keys:
                size = self.client.memory_usage(key, samples=0) or 0  # none: it is gone by now
                self.largest = max(self.largest, (int(size), key.decode()))
            self.looks += bool(keys)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    workload, n = WORKLOADS[options.model], options.workers
    start, results = mp.get_context("spawn").Barrier(n), mp.get_context("spawn").Queue()
    with EmbeddedStore() as store, redis.Redis.from_url(store.url) as client:
        client.config_set("hz", "500")  # it looks for its peak so often
        client.config_set("proto-max-bulk-len", str(REFUSED_BYTES))
        empty: Any = client.info("memory")
        lookout = Lookout(store.url)
        lookout.start()
        processes = [
            mp.get_context("spawn").Process(
                target=worker, args=(rank, n, workload, options, store.url, start, results), daemon=True
            )
            for rank in range(n)
        ]
        for process in processes:
            process.start()
        answers = [results.get(timeout=DEADLINE_S) for _ in processes]
        for process in processes:
            process.join()
        lookout.done.set()
        lookout.join()
        peak: Any = client.info("memory")
        if errors := [error for _, error in answers if error]:
            raise RuntimeError("a worker failed:\n" + max(errors, key=len))
    found = [answer for answer, _ in answers]
    if any(one["gradients"] != found[0]["gradients"] for one in found):
        raise RuntimeError("the workers have different gradients after an all-reduce")
    encoded = wire_size("float32", options.codec, found[0]["parameters"])
    store_bytes = peak["used_memory_peak"] - empty["used_memory"]
    extra = max(one["with"]["peak_bytes"] - one["without"]["peak_bytes"] for one in found)
    return {
        "model": options.model,
        "parameters": found[0]["parameters"],
        "workers": n,
        "codec": options.codec,
        "optimizer": options.optimizer,
        "encoded_bytes": encoded,
        "store_peak_bytes": store_bytes,
        "store_ratio": store_bytes / (n * encoded),
        "worker_peak_bytes": max(one["with"]["peak_bytes"] for one in found),
        "worker_extra_bytes": extra,
        "worker_ratio": extra / encoded,
        "largest_value_bytes": lookout.largest[0],
        "largest_value_key": lookout.largest[1],
        "looks": lookout.looks,
        "step_s": [max(row) for row in zip(*(one["with"]["seconds"] for one in found), strict=True)],
        "compute_s": [max(row) for row in zip(*(one["without"]["seconds"] for one in found), strict=True)],
    }


def show(row: dict[str, Any]) -> None:
    """The figures beside their bars."""
    n, whole = row["workers"], row["whole"]
    print(f"{row['model']}, {row['parameters']:,} parameters, {n} workers, {row['codec']}, {row['optimizer']}")
    steps = ", ".join(f"{seconds:.1f}" for seconds in row["step_s"])
    print(f"  steps of {steps} s, without communication {min(row['compute_s']):.1f} s; all have the same gradients")
    print(f"  an encoded gradient has {row['encoded_bytes'] / 1e6:,.0f} MB; {'':31} measured    bar")
    for what, size, ratio, bar in (
        ("store at its peak, over n encoded gradients", row["store_peak_bytes"], row["store_ratio"], STORE_BAR),
        ("worker's peak with above without, over one", row["worker_extra_bytes"], row["worker_ratio"], WORKER_BAR),
        ("whole gradient at once: store", whole["store_peak_bytes"], whole["store_ratio"], STORE_BAR),
        ("whole gradient at once: worker", whole["worker_extra_bytes"], whole["worker_ratio"], WORKER_BAR),
    ):
        print(f"  {what:44} {size / 1e6:9,.0f} MB {ratio:10.2f} {bar:6.1f}")
    print(
        f"  {'largest value seen in the store':44} {row['largest_value_bytes'] / 2**20:9.2f} MiB, in {row['looks']} looks;"
        f" above {REFUSED_BYTES / 2**20:.0f} MiB refused; bar {VALUE_BAR_BYTES >> 20} MB"
    )
    print(f"  {'a worker at its peak, with PyTorch':44} {row['worker_peak_bytes'] / 1e6:9,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in WORKLOADS if name.startswith("bert")], default="bert-large")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--codec", choices=list(CODECS), default="fp16")
    parser.add_argument("--optimizer", choices=list(COPIES), default="adamw")
    parser.add_argument("--steps", type=int, default=2, help="of each kind (2)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = WORKLOADS[options.model].model_bytes
    needed = options.workers * ((COPIES[options.optimizer] + 0.5) * size + BESIDE_BYTES)
    if needed > (there := available_bytes()):
        sys.exit(f"nothing was measured: {needed / 1e9:.1f} GB are wanted, {there / 1e9:.1f} GB are there (--optimizer sgd?)")
    row = measure(options)
    row["whole"] = memory.measure(options.workers, row["parameters"], options.codec, rounds=1)
    if options.json:
        print(json.dumps(row))
    else:
        show(row)
    met = row["store_ratio"] <= STORE_BAR and row["worker_ratio"] <= WORKER_BAR and row["largest_value_bytes"] < VALUE_BAR_BYTES
    met = met and row["whole"]["store_ratio"] <= STORE_BAR and row["whole"]["worker_ratio"] <= WORKER_BAR
    sys.exit(0 if met else "a bar is not met")


if __name__ == "__main__":
    main()
