"""What TLS costs: the same all-reduce over rediss:// and over redis://, interleaved, on shaped links.

    python -m bench.tls [--workers 4] [--floats 11000000] [--codec fp16] [--rounds 7] [--links MBIT | --local] [--server PATH]

One server with a TLS port and a plain port, so that nothing else differs; it has to be built with TLS (Debian's redis-server
is; $SMLT_STORE_SERVER or --server names it). Certificates are made by trustme and verified. Bar: with TLS at least
70 % of the plain rate.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import redis

from bench.compare import WARM_UP, summary
from bench.links import RATE_MBIT, Links, links_available, shaped_links
from smlt import Communicator
from smlt.collective.codecs import CODECS

BAR = 0.7


@dataclass(frozen=True)
class TlsServer:
    """A Redis that speaks TLS on one port and plain on another."""

    password: str
    plain_port: int
    tls_port: int
    authority: Path
    pid: int = 0

    def url(self, host: str, *, tls: bool) -> str:
        if tls:
            return f"rediss://:{self.password}@{host}:{self.tls_port}?ssl_ca_certs={self.authority}"
        return f"redis://:{self.password}@{host}:{self.plain_port}"


@contextmanager
def tls_server(program: str, hosts: tuple[str, ...]) -> Iterator[TlsServer]:
    """The server at `hosts` and on loopback, gone at the end of the block; RuntimeError with its log when it does not start."""
    import trustme

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        own = authority.issue_cert("localhost", "127.0.0.1", *hosts)
        own.private_key_pem.write_to_path(str(folder / "key.pem"))
        for pem in own.cert_chain_pems:
            pem.write_to_path(str(folder / "cert.pem"), append=True)
        plain_port, tls_port = _free_ports(2)
        server = TlsServer(secrets.token_urlsafe(24), plain_port, tls_port, folder / "ca.pem")
        settings = {
            "bind": " ".join(("127.0.0.1", *hosts)),
            "port": server.plain_port,
            "tls-port": server.tls_port,
            "tls-cert-file": folder / "cert.pem",
            "tls-key-file": folder / "key.pem",
            "tls-ca-cert-file": folder / "ca.pem",
            "tls-auth-clients": "no",
            "requirepass": server.password,
            "save": '""',
            "dir": folder,
        }
        config = folder / "conf"
        config.touch(mode=0o600)
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([program, str(config)], stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 10
            while not _answers(server):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{program} did not start with TLS:\n{(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.02)
            yield replace(server, pid=process.pid)
        finally:
            process.terminate()
            process.wait()


def worker(rank: int, options: argparse.Namespace, server: TlsServer, links: Links | None, start: Any, results: Any) -> None:
    """Measures (seconds, this worker's and the store's processor seconds) a round, plain and with TLS."""
    host = "127.0.0.1"
    if links is not None:
        links.enter(rank)
        host = links.store_host(rank)
    gradient = np.random.default_rng(0).standard_normal(options.floats, dtype=np.float32)
    out = np.empty_like(gradient)
    rows: dict[str, list[tuple[float, float, float]]] = {"redis": [], "rediss": []}
    with ExitStack() as stack:
        comms = {}
        for name in rows:
            url = server.url(host, tls=name == "rediss")
            comms[name] = stack.enter_context(Communicator(url, job=f"tls-{name}", rank=rank, world_size=options.workers))
        for step in range(options.rounds + WARM_UP):
            for name, comm in comms.items():
                start.wait()
                began, worked, served = time.perf_counter(), time.process_time(), processor_s(server.pid)
                comm.allreduce(gradient, codec=options.codec, out=out)
                took, worked = time.perf_counter() - began, time.process_time() - worked
                start.wait()
                row = (took, worked, processor_s(server.pid) - served)
                if step >= WARM_UP:
                    rows[name].append(row)
                elif step == 0:
                    np.testing.assert_allclose(out, gradient, rtol=0, atol=0.1)
        start.wait()
    results.put(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--floats", type=int, default=11_000_000)
    parser.add_argument("--codec", choices=list(CODECS), default="fp16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--links", type=float, default=RATE_MBIT, metavar="MBIT")
    parser.add_argument("--local", action="store_true", help="loopback instead of shaped links")
    parser.add_argument("--server", default=os.environ.get("SMLT_STORE_SERVER") or "redis-server")
    options = parser.parse_args()
    if not options.local and (reason := links_available()):
        sys.exit(f"nothing was measured: {reason}; --local measures over loopback")
    program = shutil.which(options.server)
    if program is None:
        sys.exit(f"nothing was measured: there is no program {options.server}")
    n = options.workers
    start: Any = mp.Barrier(n)
    results: Any = mp.Queue()
    with ExitStack() as stack:
        links = None if options.local else stack.enter_context(shaped_links(n, options.links))
        server = stack.enter_context(tls_server(program, links.store_hosts if links is not None else ()))
        arguments = (options, server, links, start, results)
        processes = [mp.Process(target=worker, args=(rank, *arguments)) for rank in range(n)]
        for process in processes:
            process.start()
        answers = [results.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    where = "loopback" if options.local else f"links of {options.links:g} Mbit/s"
    print(f"{where}, n = {n}, {options.floats:,} floats, {options.codec}, {options.rounds} rounds")
    slowest = {name: [max(row)[0] for row in zip(*(answer[name] for answer in answers), strict=True)] for name in answers[0]}
    for name, seconds in slowest.items():
        low, middle, high = (1e3 * value for value in summary(seconds))
        spread = f"{middle:7.1f} ms ({low:.1f} to {high:.1f})"
        _, worked, served = (1e3 * np.mean([answer[name] for answer in answers], axis=(0, 1))).tolist()
        print(f"  {name:7} {spread}; processor: {worked:.0f} ms a worker, {served:.0f} ms the store")
    low, middle, high = summary([a / b for a, b in zip(slowest["redis"], slowest["rediss"], strict=True)])
    print(f"  with TLS {middle:.0%} of the plain rate ({low:.0%} to {high:.0%}); bar {BAR:.0%}")


def processor_s(pid: int) -> float:
    """Processor time that a process has used, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _answers(server: TlsServer) -> bool:
    try:
        with redis.Redis.from_url(server.url("localhost", tls=True), retry=None, socket_timeout=2) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


if __name__ == "__main__":
    main()
