"""Two worker processes that stay: starting torch takes seconds, forming a group takes milliseconds."""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
DEADLINE_S = 60


class Pair:
    """`run` calls a function in both processes, as ranks of a group of the backend asked for."""

    def __init__(self, store_url: str, folder: Path) -> None:
        self._folder, self._groups = folder, 0
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, rank, store_url), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, backend: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returned on rank 0 and on rank 1; AssertionError with the traceback when it raised.

        `function` is of a module that the workers can import. Tensors come back as NumPy arrays.
        """
        self._groups += 1
        for pipe in self._pipes:
            pipe.send((backend, f"file://{self._folder}/group{self._groups}", function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(DEADLINE_S), f"rank {rank} hangs in {function.__name__}"
            try:
                answers.append(pipe.recv())
            except EOFError:
                self._processes[rank].join()
                answers.append((None, f"rank {rank} has ended in {function.__name__}: {self._processes[rank].exitcode}"))
        errors = [error for _, error in answers if error]
        assert not errors, errors[0]
        return [value for value, _ in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # they hold nothing: their groups have been left
            process.join()


def _work(pipe: Connection, rank: int, store_url: str) -> None:
    os.environ.update(SMLT_STORE=store_url, RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), LOCAL_RANK=str(rank))
    faulthandler.enable()
    os.environ["OMP_NUM_THREADS"] = "1"  # Lightning would set more; two times two threads that spin take 100 times as long
    import torch
    import torch.distributed as dist

    import smlt.torch  # noqa: F401

    torch.set_num_threads(1)
    while True:
        try:
            backend, init_method, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=WORLD_SIZE)
            # Until the next: gloo's own thread, when a callback there lets go of the group last, aborts the process.
            held = dist.group.WORLD  # noqa: F841
            try:
                answer = _as_arrays(function(*arguments)), ""
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = None, traceback.format_exc()
        pipe.send(answer)


def _as_arrays(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().numpy().copy()
    if isinstance(value, dict):
        return {name: _as_arrays(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_arrays(part) for part in value]
    return value
