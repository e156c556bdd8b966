"""Workers, stores and what lies between them; how a message goes from one to the other, and what it costs on its way.

Up: the worker's thread (copying into the kernel), its link, the store's interface, the store's thread (copying out of the
kernel, the command itself). Down: the same way back. On one machine there are no links, and all threads share its cores.
Messages are cut in slices, so that a large one is under way in several places at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.simulator.engine import Action, Cores, Engine, Link, Thread

#: What a valkey-server writes to a client before it looks after the next one (NET_MAX_WRITES_PER_EVENT).
SLICE_BYTES = 64 * 1024
SLICES_MAX = 32  # larger messages are cut in so many


@dataclass(frozen=True)
class Costs:
    """Seconds of a core's time, calibrated (`bench.simulator.calibration`). A byte is one on the wire."""

    encode_s_per_float: float  # a worker encodes its contribution
    add_s_per_float: float  # an owner adds one
    publish_s_per_float: float  # an owner adds its own, divides, encodes, decodes
    decode_s_per_float: float  # everyone, of aggregates
    worker_s_per_byte: float  # into or out of the kernel, and through its network stack
    worker_message_s: float  # a command composed, a reply understood
    worker_wake_s: float
    store_in_s_per_byte: float
    store_out_s_per_byte: float
    store_command_s: float
    store_serve_s: float  # a blocked XREAD is answered
    store_wake_s: float
    # A client in Python (redis-py, NumPy): the peers.
    python_s_per_byte: float = 0.3e-9
    python_message_s: float = 60e-6
    python_add_s_per_float: float = 0.4e-9

    def scaled(self, factor: float) -> Costs:
        """All of them `factor` times as large."""
        return Costs(**{name: value * factor for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Place:
    """Where a collective runs.

    `cores` are shared by all threads; None: everyone has its own. `link_bytes_per_s`: a worker's link each way, None for no
    links (a unix socket). `store_bytes_per_s`: the store's interface each way, None for none. `release_s`: how long after one
    worker the next one begins (a barrier wakes them one after the other). `nodes`: of the store.
    """

    name: str
    costs: Costs
    cores: int | None = None
    link_bytes_per_s: float | None = None
    link_burst_bytes: float = 0.0
    store_bytes_per_s: float | None = None
    latency_s: float = 0.0  # one way
    request_s: float = 0.0  # what each request takes beside all that: an object store's first byte
    release_s: float = 0.0
    nodes: int = 1
    worker_speed: float = 1.0
    socket_bytes: float = 4 << 20
    flow_bytes: float = 128 << 10  # that one connection may have in a link's queue
    crowding: float = 0.0  # work grows by this share for each thread more than there are cores: caches, switches

    def with_nodes(self, nodes: int) -> Place:
        """The same with a store of `nodes` nodes."""
        return replace(self, nodes=nodes)


class Worker:
    """A worker: one thread, a link each way."""

    def __init__(self, rank: int, thread: Thread, up: Link | None, down: Link | None) -> None:
        self.rank, self.thread, self.up, self.down = rank, thread, up, down


class StoreNode:
    """A node of the store: one thread, an interface each way."""

    def __init__(self, number: int, thread: Thread, into: Link | None, out: Link | None) -> None:
        self.number, self.thread, self.into, self.out = number, thread, into, out
        self.commands = 0
        self.calls: Counter[str] = Counter()  # of each command


class Cluster:
    """n workers and a store's nodes at a `place`. `grain`: how many times coarser slices and segments are than 64 KiB."""

    def __init__(self, place: Place, n: int, *, grain: float = 1.0) -> None:
        self.place, self.n, self.engine = place, n, Engine()
        self.slice_bytes = SLICE_BYTES * grain
        engine = self.engine
        self.cores = Cores(engine, place.cores) if place.cores is not None else None
        excess = max(0, n + place.nodes - place.cores) if place.cores is not None else 0
        self.costs = costs = place.costs.scaled(1 + place.crowding * excess) if place.crowding else place.costs

        def link(rate: float | None, latency_s: float, burst: float) -> Link | None:
            if rate is None:
                return None
            return Link(
                engine,
                rate,
                latency_s=latency_s,
                burst_bytes=burst,
                flow_bytes=place.flow_bytes,
                segment_bytes=self.slice_bytes,
            )

        self.workers = [
            Worker(
                rank,
                Thread(engine, self.cores, wake_s=costs.worker_wake_s, speed=place.worker_speed),
                link(place.link_bytes_per_s, place.latency_s, place.link_burst_bytes),
                link(place.link_bytes_per_s, place.latency_s, place.link_burst_bytes),
            )
            for rank in range(n)
        ]
        self.stores = [
            StoreNode(
                number,
                Thread(engine, self.cores, wake_s=costs.store_wake_s),
                link(place.store_bytes_per_s, 0.0, 0.0),
                link(place.store_bytes_per_s, 0.0, 0.0),
            )
            for number in range(place.nodes)
        ]

    # ---- messages ----

    def slices(self, size: float) -> tuple[int, float]:
        """Into how many slices a message is cut, and their size."""
        count = min(SLICES_MAX, max(1, -int(-size // self.slice_bytes)))
        return count, size / count

    def up(
        self,
        worker: Worker,
        store: StoreNode,
        lane: str,
        size: float,
        commands: float,
        done: Action,
        *arguments: Any,
        work_s_per_byte: float | None = None,
        message_s: float | None = None,
        calls: tuple[tuple[str, float], ...] = (),
    ) -> None:
        """`size` bytes in `commands` commands from a worker to a store; `done` is called when they have been carried out.

        `calls` names them, for the count.
        """
        count, part = self.slices(size)
        costs = self.costs
        per_byte = costs.worker_s_per_byte if work_s_per_byte is None else work_s_per_byte
        first_s = (costs.worker_message_s if message_s is None else message_s) * commands
        command_s = costs.store_command_s * commands
        if self.place.request_s:
            done, arguments = self._after_request, (self.place.request_s * commands, done, arguments)
        store.commands += int(commands)
        for name, times in calls:
            store.calls[name] += times  # type: ignore[assignment]
        for i in range(count):
            work_s = part * per_byte + (first_s if i == 0 else 0.0)
            last = i == count - 1
            at_store_s = part * costs.store_in_s_per_byte + (command_s if last else 0.0)
            worker.thread.do(
                lane, work_s, self._up_sent, worker, store, lane, part, at_store_s, done if last else _nothing, arguments
            )

    def _up_sent(
        self, worker: Worker, store: StoreNode, lane: str, size: float, work_s: float, done: Action, arguments: tuple[Any, ...]
    ) -> None:
        if worker.up is not None:
            worker.up.send(lane, size, self._up_at_interface, worker, store, lane, size, work_s, done, arguments)
        else:
            store.thread.do((worker.rank, lane), work_s, _call, done, arguments)

    def _after_request(self, seconds: float, done: Action, arguments: tuple[Any, ...]) -> None:
        self.engine.at(self.engine.now + seconds, done, *arguments)

    def _up_at_interface(
        self, worker: Worker, store: StoreNode, lane: str, size: float, work_s: float, done: Action, arguments: tuple[Any, ...]
    ) -> None:
        flow = (worker.rank, lane)
        if store.into is not None:
            store.into.send(flow, size, store.thread.do, flow, work_s, _call, done, arguments)
        else:
            store.thread.do(flow, work_s, _call, done, arguments)

    def down(
        self,
        store: StoreNode,
        worker: Worker,
        lane: str,
        size: float,
        work_s: float,
        done: Action,
        *arguments: Any,
        store_s: float = 0.0,
        work_s_per_byte: float | None = None,
        message_s: float | None = None,
    ) -> None:
        """`size` bytes from a store to a worker, who spends `work_s` on them beside receiving; `done` is called after that."""
        count, part = self.slices(size)
        costs = self.costs
        per_byte = costs.worker_s_per_byte if work_s_per_byte is None else work_s_per_byte
        last_s = costs.worker_message_s if message_s is None else message_s
        flow = (worker.rank, lane)
        for i in range(count):
            last = i == count - 1
            at_worker_s = part * per_byte + work_s / count + (last_s if last else 0.0)
            at_store_s = part * costs.store_out_s_per_byte + (store_s if i == 0 else 0.0)
            then = done if last else _nothing
            store.thread.do(flow, at_store_s, self._down_sent, store, worker, lane, part, at_worker_s, then, arguments)

    def _down_sent(
        self, store: StoreNode, worker: Worker, lane: str, size: float, work_s: float, done: Action, arguments: tuple[Any, ...]
    ) -> None:
        if store.out is not None:
            store.out.send((worker.rank, lane), size, self._down_at_link, worker, lane, size, work_s, done, arguments)
        else:
            self._down_at_link(worker, lane, size, work_s, done, arguments)

    def _down_at_link(
        self, worker: Worker, lane: str, size: float, work_s: float, done: Action, arguments: tuple[Any, ...]
    ) -> None:
        if worker.down is not None:
            worker.down.send(lane, size, worker.thread.do, lane, work_s, _call, done, arguments)
        else:
            worker.thread.do(lane, work_s, _call, done, arguments)


def _call(done: Action, arguments: tuple[Any, ...]) -> None:
    done(*arguments)


def _nothing(*_: Any) -> None:
    """A slice that is not the last of its message."""
