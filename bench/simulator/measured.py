"""Collectives measured on this machine, with the processor's time that workers and store spend on them.

The programs are those of bench/peers.py; the places are a unix socket ("local") and shaped links (bench/links.py). A cell
is (place, n, floats, peer). It is measured in *windows* of about a third of a second, each with what share of the processors'
time others took meanwhile: other processes, or the hypervisor's other guests. Windows are added until enough of them were
quiet, or until patience ends; then the quietest count. Of their rounds the lower quartile is taken, for others only add.
Root measures at the highest priority (workers and store alike), which keeps others off the cores, though not out of caches.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.links import INTERFACE, RATE_MBIT, Links, shaped_links
from bench.peers import Peer, Place, all_peers
from smlt.store.embedded import EmbeddedStore

WARM_UP = 3
DEADLINE_S = 600
#: A window is quiet when processes that are not its own, or other guests, took less of the processors' time than this.
OTHERS_MAX = 0.06
WINDOW_S = 0.3
QUIET_WINDOWS, WINDOWS_MAX, PATIENCE_S = 4, 10, 6.0
PLACES = ("local", "links")


@dataclass(frozen=True, order=True)
class Cell:
    """One all-reduce to be measured and to be simulated. `place`: "local" (unix socket) or "links" (600 Mbit/s)."""

    place: str
    workers: int
    floats: int
    peer: str = "smlt fp16"

    def __str__(self) -> str:
        return f"{self.peer}, {self.place}, n = {self.workers}, {self.floats:,} floats"


@dataclass(frozen=True)
class Window:
    """Some rounds: seconds of the slowest worker in each; the processor's, a round, of a worker (mean) and of the store."""

    wall_s: tuple[float, ...]
    worker_cpu_s: float
    store_cpu_s: float
    others: float  # their share of the processors' time


@dataclass
class Sample:
    """What was measured of a cell."""

    windows: list[Window] = field(default_factory=list)

    @property
    def chosen(self) -> list[Window]:
        """The quiet windows; when there are fewer than two, the two least disturbed."""
        ordered = sorted(self.windows, key=lambda window: window.others)
        quiet = [window for window in ordered if window.others <= OTHERS_MAX]
        return quiet if len(quiet) >= 2 else ordered[:2]

    @property
    def typical_s(self) -> float:
        """The lower quartile of the chosen windows' rounds."""
        return quartile([value for window in self.chosen for value in window.wall_s])

    @property
    def worker_cpu_s(self) -> float:
        return quartile([window.worker_cpu_s for window in self.chosen])

    @property
    def store_cpu_s(self) -> float:
        return quartile([window.store_cpu_s for window in self.chosen])

    @property
    def others(self) -> float:
        """The largest share that others had in a chosen window."""
        return max(window.others for window in self.chosen)


def quartile(values: list[float]) -> float:
    """The lower quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]


def rounds_for(cell: Cell) -> int:
    """So many rounds in a window that it takes about `WINDOW_S`, at least three."""
    expected_s = cell.floats * 1e-9 * (1 + cell.workers) + cell.workers * 1e-4
    if cell.place == "links":
        expected_s += cell.floats * 45e-9
    if not cell.peer.startswith("smlt"):
        expected_s *= 8
    return int(max(3, min(500, WINDOW_S / expected_s)))


def measure(cells: list[Cell], *, passes: int = 1, tell: Callable[[str], None] | None = None) -> dict[Cell, Sample]:
    """All cells, `passes` times one after the other, each pass with stores and workers of its own."""
    samples = {cell: Sample() for cell in cells}
    with _priority():
        for _ in range(passes):
            for cell in cells:
                samples[cell].windows += measure_once(cell, -(-QUIET_WINDOWS // passes), -(-WINDOWS_MAX // passes))
                if tell is not None:
                    tell(f"{cell}: {samples[cell].typical_s * 1e3:.3f} ms, others had up to {samples[cell].others:.0%}")
    return samples


@contextmanager
def _priority() -> Iterator[None]:
    """The highest there is, for this process and those it starts; as it was where it must not be raised."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    _prefer_session("self", -20)
    try:
        yield
    finally:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before)
        _prefer_session("self", 0)


def _prefer_session(pid: int | str, nice: int) -> None:
    """Linux shares the cores among sessions; a process's own priority counts only within its session (sched(7), autogroup)."""
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def measure_once(cell: Cell, quiet_wanted: int, windows_max: int) -> list[Window]:
    """One pass of one cell. RuntimeError when a worker fails."""
    fork = mp.get_context("fork")
    n, peer = cell.workers, all_peers()[cell.peer]
    gradients = [np.random.default_rng(rank).standard_normal(cell.floats, dtype=np.float32) for rank in range(n)]
    shared = _Shared(fork.Barrier(n), fork.Array("d", 2 * n, lock=False), fork.Value("i", 1), fork.Queue())
    with ExitStack() as stack:
        links = stack.enter_context(shaped_links(n, RATE_MBIT)) if cell.place == "links" else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(EmbeddedStore(bind=links.store_hosts if links is not None else ()))
        _prefer_session(store.pid, -20)  # it has a session of its own
        processes = []
        for rank in range(n):
            url = store.tcp_url_at(links.store_host(rank)) if links is not None else store.url
            place = Place(rank, n, gradients[rank], url, folder, INTERFACE if links is not None else "lo")
            arguments = (shared, peer, place, links, rounds_for(cell), store.pid, quiet_wanted, windows_max)
            processes.append(fork.Process(target=_run_worker, args=arguments, daemon=True))
        for process in processes:
            process.start()
            stack.callback(process.kill)
        answers = [shared.results.get(timeout=DEADLINE_S) for _ in range(n)]
        for process in processes:
            process.join()
    if errors := [error for _, _, error in answers if error]:
        raise RuntimeError(f"{cell}: a worker failed:\n" + max(errors, key=len))
    looks = next(looked for _, looked, _ in answers if looked)
    windows = []
    for number, look in enumerate(looks):
        walls = tuple(max(row) for row in zip(*(walls[number] for walls, _, _ in answers), strict=True))
        windows.append(Window(walls, look.worker_cpu_s / len(walls), look.store_cpu_s / len(walls), look.others))
    return windows


@dataclass(frozen=True)
class _Shared:
    """What the workers of a pass share: a barrier, the processor's seconds of each (all, in all-reduces), whether to go on."""

    start: Any
    used_s: Any
    more: Any
    results: Any


@dataclass(frozen=True)
class _Look:
    """Rank 0's look at a window: the processor's seconds of a worker (mean) and of the store, and the others' share."""

    worker_cpu_s: float
    store_cpu_s: float
    others: float


def _run_worker(shared: _Shared, *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        shared.results.put((*_worker(shared, *arguments), ""))
    except BaseException:
        shared.results.put(([], [], traceback.format_exc()))
        shared.start.abort()


def _worker(
    shared: _Shared,
    peer: Peer,
    place: Place,
    links: Links | None,
    rounds: int,
    store_pid: int,
    quiet_wanted: int,
    windows_max: int,
) -> tuple[list[list[float]], list[_Look]]:
    """Seconds of the rounds of each window; rank 0 also says what else happened in it."""
    if links is not None:
        links.enter(place.rank)
    rank, n, windows, looks = place.rank, place.n, [], []
    with peer.open(place) as allreduce:
        for _ in range(WARM_UP):
            shared.start.wait(DEADLINE_S)
            allreduce()
        first = time.perf_counter()
        while shared.more.value:
            shared.start.wait(DEADLINE_S)
            before = _state(shared, store_pid) if rank == 0 else None
            began_s, used_s, walls = time.process_time(), 0.0, []
            for _ in range(rounds):
                shared.start.wait(DEADLINE_S)
                cpu, began = time.process_time(), time.perf_counter()
                allreduce()
                walls.append(time.perf_counter() - began)
                used_s += time.process_time() - cpu
            windows.append(walls)
            shared.used_s[rank] += time.process_time() - began_s
            shared.used_s[n + rank] += used_s
            shared.start.wait(DEADLINE_S)
            if before is not None:
                looks.append(_look(before, _state(shared, store_pid), n))
                quiet = sum(look.others <= OTHERS_MAX for look in looks)
                patient = time.perf_counter() - first < PATIENCE_S or len(looks) < 2
                shared.more.value = quiet < quiet_wanted and len(looks) < windows_max and patient
            shared.start.wait(DEADLINE_S)
    return windows, looks


def _state(shared: _Shared, store_pid: int) -> tuple[float, ...]:
    """Now; the processors' seconds of the machine, of the store, of the workers, of their all-reduces."""
    n = len(shared.used_s) // 2
    return time.perf_counter(), _machine_s(), _running_s(store_pid), sum(shared.used_s[:n]), sum(shared.used_s[n:])


def _look(before: tuple[float, ...], after: tuple[float, ...], n: int) -> _Look:
    seconds, machine, store, workers, allreduces = (end - begin for begin, end in zip(before, after, strict=True))
    others = max(0.0, machine - store - workers) / (seconds * (os.cpu_count() or 1))
    return _Look(allreduces / n, store, others)


def _running_s(pid: int) -> float:
    """Seconds that all threads of a process have run."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def _machine_s() -> float:
    """Seconds for which this machine's processors have been busy, or other guests had them."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
