"""Links of a known rate between workers and a store on one machine: what serverless functions get, without leaving it.

Every worker has a network namespace of its own, joined to the machine by a veth pair; each direction is held to a rate
by a token bucket (tc-tbf(8)). Workers reach the store, and one another, through the machine's side. Linux, root.

    with shaped_links(4, rate_mbit=600) as links, EmbeddedStore(bind=links.store_hosts) as store:
        ...  # in a forked child, before it starts threads:
        links.enter(rank)
        Communicator(store.tcp_url_at(links.store_host(rank)), rank=rank, world_size=4)

Addresses are from 198.18.0.0/15, which RFC 2544 sets aside for benchmarks.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RATE_MBIT = 600.0  # a Lambda function's, each way
#: Bytes that a token bucket lets pass at once, and how long a packet may wait in it before it is dropped.
BURST, LATENCY = "128kb", "100ms"
WORKERS_MAX = 15  # the store listens at an address for each, and on loopback: Valkey binds 16
BLOCKS = (1 << 17) // 4 // 16  # of addresses, one a run: 16 networks (/30) each, from a /15
LOCKS = Path("/run/smlt-bench-links")
INTERFACE = "e0"  # the worker's side
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Links:
    """The links of one run. `rate_mbit` holds for each worker and each direction, in Mbit/s of Ethernet frames."""

    block: int
    n: int
    rate_mbit: float

    @property
    def store_hosts(self) -> tuple[str, ...]:
        """The addresses at which a store must listen to be reached by all workers."""
        return tuple(self.store_host(rank) for rank in range(self.n))

    def store_host(self, rank: int) -> str:
        """The store's address as worker `rank` sees it: the machine's end of its link."""
        return self._address(rank, 1)

    def worker_host(self, rank: int) -> str:
        """The worker's own end."""
        return self._address(rank, 2)

    def enter(self, rank: int) -> None:
        """Move the calling process into worker `rank`'s namespace. OSError when that cannot be."""
        with (Path("/run/netns") / self.namespace(rank)).open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:  # os.setns is in Python 3.12
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self.namespace(rank)}")

    def bound_s(self, sent: float, received: float) -> float:
        """The least time in seconds in which a worker can send and receive so many bytes, both at once."""
        return max(sent, received) * 8 / (self.rate_mbit * 1e6)

    def namespace(self, rank: int) -> str:
        """The name of worker `rank`'s network namespace (`ip netns`)."""
        return f"smlt{self.block}w{rank}"

    def _interface(self, rank: int) -> str:
        return f"smlt{self.block}h{rank}"

    def _address(self, rank: int, end: int) -> str:
        number = (self.block * 16 + rank) * 4 + end
        return f"198.{18 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"

    def _set_up(self, rank: int) -> None:
        namespace, interface = self.namespace(rank), self._interface(rank)
        inside = ("ip", "-n", namespace)
        shape = ("root", "tbf", "rate", f"{self.rate_mbit}mbit", "burst", BURST, "latency", LATENCY)
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", interface, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
        _run("ip", "address", "add", f"{self.store_host(rank)}/30", "dev", interface)
        _run("ip", "link", "set", interface, "up")
        # From worker to worker; for this interface alone, so that nothing is left to be set back.
        Path(f"/proc/sys/net/ipv4/conf/{interface}/forwarding").write_text("1")
        _run(*inside, "address", "add", f"{self.worker_host(rank)}/30", "dev", INTERFACE)
        _run(*inside, "link", "set", INTERFACE, "up")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "route", "add", "default", "via", self.store_host(rank))
        _run("tc", "qdisc", "add", "dev", interface, *shape)
        _run("tc", "-n", namespace, "qdisc", "add", "dev", INTERFACE, *shape)

    def _clean_up(self) -> None:
        """Delete the block's namespaces and interfaces, also those that a killed run has left."""
        found = subprocess.run(["ip", "-j", "link", "show", "type", "veth"], capture_output=True, text=True, check=False)
        for link in json.loads(found.stdout or "[]"):
            if link["ifname"].startswith(f"smlt{self.block}h"):
                _run("ip", "link", "delete", link["ifname"], check=False)
        for namespace in Path("/run/netns").glob(f"smlt{self.block}w*"):
            _run("ip", "netns", "delete", namespace.name, check=False)


@contextmanager
def shaped_links(n: int, rate_mbit: float = RATE_MBIT) -> Iterator[Links]:
    """n links, gone when the block is left, however it is left.

    Runs beside each other do not collide: each locks a block of names and addresses. What a run that was killed has left
    is deleted by the next. ValueError for too many workers, OSError when links cannot be made.
    """
    if not 1 <= n <= WORKERS_MAX:
        raise ValueError(f"{n} links: there can be 1 to {WORKERS_MAX}")
    LOCKS.mkdir(exist_ok=True)
    for block in range(BLOCKS):
        with (LOCKS / str(block)).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            links = Links(block, n, rate_mbit)
            try:
                links._clean_up()
                for rank in range(n):
                    links._set_up(rank)
                yield links
            finally:
                links._clean_up()
            return
    raise OSError(f"all {BLOCKS} blocks of addresses are in use, says {LOCKS}")


def links_available() -> str:
    """ "" when this process can make shaped links, else why it cannot."""
    if sys.platform != "linux":
        return "shaped links need Linux"
    if os.geteuid() != 0:
        return "shaped links need root"
    missing = [name for name in ("ip", "tc") if not shutil.which(name)]
    if missing:
        return f"shaped links need {' and '.join(missing)} (package iproute2)"
    try:
        with shaped_links(1):
            return ""
    except OSError as error:
        return f"shaped links cannot be made here: {error}"


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise OSError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
