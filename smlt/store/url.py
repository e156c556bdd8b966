"""The parameter store's URL: one server, several independent ones, or a cluster; and how it is shown without its password.

    redis://host[:port], rediss://host, unix:///path     one server
    redis://a,redis://b,unix:///c                        several independent ones: the *nodes* of one store
    redis+cluster://host[:port], rediss+cluster://host   a Valkey or Redis Cluster, by one or more of its nodes, with
                                                         commas between them too; ?groups=K sets the number of groups

A comma parts two URLs where a scheme follows it; other commas may stand in a password.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import parse_qs, urlsplit

from smlt.errors import ConfigError

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
#: In messages.
SCHEMES_TOLD = "redis://, rediss://, unix://, redis+cluster:// or rediss+cluster://"
CLUSTER = "+cluster"
#: Of a list of nodes, and of a cluster's groups: each is three connections of each worker.
NODES_MAX = 64

_NEXT = re.compile(r",\s*(?=(?:redis|rediss|unix|redis\+cluster|rediss\+cluster)://)", re.IGNORECASE)


def endpoints(url: str) -> list[str]:
    """The URLs that a store's URL is made of: one, or as many as are listed. They are not looked at any further."""
    return _NEXT.split(url.strip(" "))


def is_cluster(url: str) -> bool:
    """Whether the URL names a Valkey or Redis Cluster."""
    return url.partition("://")[0].lower().endswith(CLUSTER)


def redact(url: str) -> str:
    """The URL without users, passwords and options, fit for a message or a log.

    Never raises, and when it is not plain where a mistyped password ends ("redis://:a#b@host"), shows the scheme alone.
    """
    parts = endpoints(url)
    return ",".join(_redact(part, listed=len(parts) > 1) for part in parts)


def _redact(url: str, *, listed: bool) -> str:
    scheme, mark, rest = url.rpartition("://") if url.count("://") == 1 else ("", "", url)
    address, *options = re.split("[?#]", rest, maxsplit=1)
    if address.startswith("/"):  # a socket's path: no user can stand before it
        return f"{scheme}{mark}{address}"
    address = address.rpartition("@")[2]
    # In a list a host must be there: what precedes a comma may be the first half of a password.
    plain = re.fullmatch(rf"([\w.-]+|\[[\w:.%]+\]){'' if listed else '?'}(:\d*)?(/[\w./-]*)?", address)
    return f"{scheme}{mark}{address}" if plain and "@" not in "".join(options) else f"{scheme}{mark}..."


def is_local(url: str) -> bool:
    """Whether every part of a store's URL leads to this machine."""
    return all(_is_local(part) for part in endpoints(url))


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname in (None, "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(parts.hostname)).is_loopback
    except ValueError:
        return False


def addresses(url: str) -> list[str]:
    """HOST:PORT of each part of a store's URL, or what can be shown of it."""
    split = [(part, urlsplit(part)) for part in endpoints(url)]
    return [f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else redact(part) for part, parts in split]


def check_url(url: str) -> None:
    """Raise ConfigError for a URL that cannot be read. Python's own errors quote the password: they are not shown."""
    parts = endpoints(url)
    for part in parts:
        _check(part)
    if len({is_cluster(part) for part in parts}) > 1:
        raise ConfigError(
            f"store {redact(url)!r}: it lists nodes of a cluster beside others: write either independent servers, or nodes of "
            "one cluster"
        )
    if len(parts) > NODES_MAX and not is_cluster(url):
        raise ConfigError(f"store {redact(url)!r}: {len(parts)} nodes; at most {NODES_MAX} make one store")
    if is_cluster(url):
        _check_cluster(url, parts)


def _check(url: str) -> None:
    try:
        parts = urlsplit(url)
        scheme, _ = parts.scheme, parts.port if parts.scheme != "unix" else None
        # What an unquoted '/', '?' or '#' in a password makes of a URL: its end would be looked up as a host's name.
        split = bool(parts.fragment) or ("@" in parts.query and "=" not in parts.query)
        readable = not split and (scheme == "unix" or "@" not in parts.path)
    except ValueError:
        scheme, readable = url.partition("://")[0].lower(), False
    if scheme not in SCHEMES:
        raise ConfigError(f"store {redact(url)!r}: the URL must begin with {SCHEMES_TOLD}")
    if not readable:
        raise ConfigError(
            f"store {redact(url)!r}: the URL cannot be read: the port must be a number to 65535, and a "
            "password's '/', '?', '#' and '@' be written %2F, %3F, %23 and %40"
        )


def _check_cluster(url: str, parts: list[str]) -> None:
    if len({part.partition("://")[0].lower() for part in parts}) > 1:
        raise ConfigError(f"store {redact(url)!r}: write either redis+cluster:// or rediss+cluster:// for all of its nodes")
    for part in parts:
        split = urlsplit(part)
        if not split.hostname:
            raise ConfigError(f"store {redact(url)!r}: give the host of one of the cluster's nodes")
        if split.path.strip("/") not in ("", "0") or parse_qs(split.query).get("db", ["0"])[-1] != "0":
            raise ConfigError(f"store {redact(url)!r}: a cluster has database 0 only: leave {split.path or 'db='} out")
    groups_of(url)


def groups_of(url: str) -> int | None:
    """How many groups a cluster's URL asks for by `?groups=K`, None when it does not. ConfigError for what is no number."""
    text = parse_qs(urlsplit(endpoints(url)[0]).query).get("groups", [""])[-1]
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= NODES_MAX:
        raise ConfigError(f"store {redact(url)!r}: groups= is a number from 1 to {NODES_MAX}")
    return int(text)


def node_url(url: str, host: str, port: int) -> str:
    """The URL of one node of the cluster at `url`: its first part's user, password and options with another address."""
    parts = urlsplit(endpoints(url)[0])
    scheme = parts.scheme.removesuffix(CLUSTER)
    user, at, _ = parts.netloc.rpartition("@")
    kept = [option for option in parts.query.split("&") if option and not option.startswith("groups=")]
    address = f"[{host}]" if ":" in host else host
    return f"{scheme}://{user}{at}{address}:{port}{'?' if kept else ''}{'&'.join(kept)}"


def seeds(url: str) -> list[tuple[str, int]]:
    """Host and port of each node that a cluster's URL names."""
    parts = [urlsplit(part) for part in endpoints(url)]
    return [(part.hostname or "localhost", part.port or 6379) for part in parts]
