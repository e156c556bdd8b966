"""The parameter store's URL: what it may look like, and how it is shown without its password."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from smlt.errors import ConfigError

SCHEMES = ("redis", "rediss", "unix")


def redact(url: str) -> str:
    """The URL without user, password and options, fit for a message or a log.

    Never raises, and when it is not plain where a mistyped password ends ("redis://:a#b@host"), shows the scheme alone.
    """
    scheme, mark, rest = url.rpartition("://") if url.count("://") == 1 else ("", "", url)
    address, *options = re.split("[?#]", rest, maxsplit=1)
    if address.startswith("/"):  # a socket's path: no user can stand before it
        return f"{scheme}{mark}{address}"
    address = address.rpartition("@")[2]
    plain = re.fullmatch(r"([\w.-]+|\[[\w:.%]+\])?(:\d*)?(/[\w./-]*)?", address)
    return f"{scheme}{mark}{address}" if plain and "@" not in "".join(options) else f"{scheme}{mark}..."


def check_url(url: str) -> None:
    """Raise ConfigError for a URL that cannot be read. Python's own errors quote the password: they are not shown."""
    try:
        parts = urlsplit(url)
        scheme, _ = parts.scheme, parts.port if parts.scheme != "unix" else None
        # What an unquoted '/', '?' or '#' in a password makes of a URL: its end would be looked up as a host's name.
        split = bool(parts.fragment) or ("@" in parts.query and "=" not in parts.query)
        readable = not split and (scheme == "unix" or "@" not in parts.path)
    except ValueError:
        scheme, readable = url.partition("://")[0].lower(), False
    if scheme not in SCHEMES:
        raise ConfigError(f"store {redact(url)!r}: the URL must begin with redis://, rediss:// or unix://")
    if not readable:
        raise ConfigError(
            f"store {redact(url)!r}: the URL cannot be read: the port must be a number to 65535, and a "
            "password's '/', '?', '#' and '@' be written %2F, %3F, %23 and %40"
        )
