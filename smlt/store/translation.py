"""What redis-py raises, in SMLT's terms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from smlt.errors import ConfigError, StoreAuthError, StoreError, StoreFull, StoreUnavailable
from smlt.store.url import is_cluster, redact

#: What a store answers while it starts, fails over, is busy or short of something: it passes (as in csrc/receive.c).
PASSING = (
    "LOADING ",
    "READONLY ",
    "BUSY ",
    "MASTERDOWN ",
    "CLUSTERDOWN ",
    "TRYAGAIN ",
    "MOVED ",
    "ASK ",
    "MISCONF ",
    "NOREPLICAS ",
    "UNBLOCKED ",
    "ERR max number of clients",
)
_PASSING_ERRORS = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,  # and MasterDownError
    redis.exceptions.AskError,  # and MovedError
)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what redis-py raises into what SMLT promises; no message holds the password."""
    where = f"the store at {redact(url)}"
    try:
        yield
    except StoreError:  # translated already; one of them is an OSError
        raise
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise StoreAuthError(f"{where} refused the user, the password or a permission: {error}") from error
    except redis.exceptions.OutOfMemoryError as error:
        raise StoreFull(f"{where} is full: {error}; raise its maxmemory") from error
    except redis.exceptions.MaxConnectionsError as error:
        raise StoreUnavailable(f"{where} takes no more connections: {error}") from error
    except redis.exceptions.InvalidResponse as error:
        raise StoreUnavailable(f"{where} does not speak the Redis protocol: {error}") from error
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise StoreUnavailable(f"{where} cannot be reached: {error}") from error
    except redis.exceptions.MovedError as error:
        if not is_cluster(url):
            raise ConfigError(member_of_cluster(url)) from error
        raise StoreUnavailable(f"{where} takes no commands for now: a slot has moved ({error})") from error
    except _PASSING_ERRORS as error:
        raise StoreUnavailable(f"{where} takes no commands for now: {error}") from error
    except redis.ResponseError as error:
        text = str(error)
        reply = re.sub(r"^Command # \d+ \(.*?\) of pipeline caused error: ", "", text, flags=re.DOTALL)
        if reply.startswith("MOVED ") and not is_cluster(url):
            raise ConfigError(member_of_cluster(url)) from error
        if reply.startswith(PASSING):
            raise StoreUnavailable(f"{where} takes no commands for now: {text}") from error
        if reply.startswith(("NOAUTH", "WRONGPASS", "NOPERM")):
            raise StoreAuthError(f"{where} refused the user, the password or a permission: {text}") from error
        raise StoreError(f"{where} answered: {text}") from error
    except redis.RedisError as error:
        raise StoreError(f"{where}: {error}") from error


def member_of_cluster(url: str) -> str:
    """What to say when a plain URL leads to a cluster's node."""
    shown = redact(url)
    better = re.sub(r"(^|,)(rediss?)://", r"\1\2+cluster://", shown) if "unix:" not in shown else "redis+cluster://HOST:PORT"
    return f"the store at {shown} is a node of a cluster: write {better}"
