"""What one server of the parameter store is: its product, version and memory, and whether it will do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from smlt.errors import ConfigError, StoreUnavailable
from smlt.store.translation import member_of_cluster, translated
from smlt.store.url import is_cluster, redact


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself. Memory is in bytes; a `maxmemory_bytes` of 0 means no limit.

    `run_id` is another after each restart and on each replica. `address` is its URL, fit for a message.
    """

    product: str
    version: tuple[int, int, int]
    cluster: bool
    maxmemory_bytes: int
    maxmemory_policy: str
    used_memory_bytes: int
    run_id: str = ""
    address: str = ""


def inspect(client: Any, node: str, store: str) -> ServerInfo:
    """Ask the server at `node`, one of those of the store at the URL `store`, by `client`: ServerInfo, or why it will not do.

    Raises StoreUnavailable and its siblings, ConfigError for a version that is too old or a URL of the wrong kind.
    """
    with translated(store if is_cluster(store) else node):
        info: dict[str, Any] = client.info()
    where = f"the store at {redact(node)}"
    if "redis_version" not in info:
        raise StoreUnavailable(f"{where} is no Redis or Valkey: its INFO names no version")
    product = "Valkey" if info.get("server_name") == "valkey" or "valkey_version" in info else "Redis"
    text = str(info["valkey_version"] if "valkey_version" in info else info["redis_version"])
    numbers = [int(n) for n in re.findall(r"\d+", text)[:3]]
    major, minor, patch = [*numbers, 0, 0, 0][:3]
    oldest = (7, 2) if product == "Valkey" else (6, 2)
    if (major, minor) < oldest:
        raise ConfigError(f"{where} is {product} {text}; SMLT needs {product} {oldest[0]}.{oldest[1]} or newer")
    cluster = bool(int(info.get("cluster_enabled", 0)))
    if cluster and not is_cluster(store):
        raise ConfigError(member_of_cluster(node))
    if not cluster and is_cluster(store):
        raise ConfigError(f"{where} is no cluster: write redis:// (rediss://) for independent servers")
    return ServerInfo(
        product,
        (major, minor, patch),
        cluster,
        int(info.get("maxmemory", 0)),
        str(info.get("maxmemory_policy", "")),
        int(info.get("used_memory", 0)),
        str(info.get("run_id", "")),
        redact(node),
    )


def smallest_memory_bytes(servers: Iterable[ServerInfo]) -> int:
    """The smallest maxmemory among the nodes of a store, 0 when none has a limit."""
    return min((server.maxmemory_bytes for server in servers if server.maxmemory_bytes), default=0)
