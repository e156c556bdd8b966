"""The Minibatch Buffer: minibatches loaded into memory ahead of the trainer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from smlt.worker.data import Indices


@dataclass(frozen=True)
class Minibatch:
    """This worker's part of a global batch."""

    epoch: int
    step: int  # within the epoch
    local_size: int
    global_size: int
    batch: Any


class MinibatchBuffer:
    """Loads the minibatches of `steps` in a thread, in order, at most `depth` ahead of who takes them.

    `load` turns indices into a batch; what it raises is raised where the batch would have been taken. Use it as a context
    manager: leaving it ends the thread.
    """

    def __init__(self, steps: Iterator[tuple[int, int, Indices, int]], load: Callable[[Indices], Any], depth: int = 4) -> None:
        self._steps, self._load = steps, load
        self._ready: queue.Queue[Minibatch | BaseException | None] = queue.Queue(maxsize=max(1, depth))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="smlt-minibatches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Minibatch]:
        while True:
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """End the thread. Safe to call twice."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)  # make room, so that the thread sees the flag
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> MinibatchBuffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fill(self) -> None:
        try:
            for epoch, step, indices, global_size in self._steps:
                if self._closing.is_set():
                    return
                self._ready.put(Minibatch(epoch, step, len(indices), global_size, self._load(indices)))
        except BaseException as error:
            self._ready.put(error)
        else:
            self._ready.put(None)
