"""A Valkey or Redis Cluster as a parameter store.

Every key of the control plane has the tag "{J.0}", and so one slot: one server at a time answers for all of it. Its client
is a plain redis-py client, with all that those can do, whose connections find that server when they are opened, as
redis-py's own for Sentinel do. When the slot has moved the connection is closed, and the command is tried again.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
import redis.connection
from redis.backoff import ExponentialBackoff
from redis.exceptions import AskError, BusyLoadingError, ClusterDownError, MovedError, ReadOnlyError, TryAgainError
from redis.retry import Retry

from smlt.errors import ConfigError, StoreUnavailable
from smlt.store.nodes import Nodes
from smlt.store.slots import SLOTS, Address, SlotMap, choose_places, slot_of
from smlt.store.translation import translated
from smlt.store.url import groups_of, node_url, redact, seeds

# Untyped, or typed otherwise, in some releases of redis-py.
_parse_url: Any = redis.connection.parse_url
_ConnectionPool: Any = redis.connection.ConnectionPool
_Connection: Any = redis.Connection
_SSLConnection: Any = redis.SSLConnection


class Elsewhere(redis.ResponseError):
    """MOVED and its like, from releases of redis-py (5.0) whose plain clients know no such errors."""


#: Another try, on a new connection that asks who has the slot, may go well.
_AGAIN = [
    redis.ConnectionError,
    redis.TimeoutError,
    BusyLoadingError,
    MovedError,
    AskError,
    TryAgainError,
    ClusterDownError,
    ReadOnlyError,
    Elsewhere,
]
_ELSEWHERE = ("MOVED ", "ASK ", "TRYAGAIN ", "CLUSTERDOWN ", "READONLY ")
#: For a node that is asked for the slot map while others may be asked instead.
ASK_TIMEOUT_S = 2.0
#: While nodes tell different things of a slot: tries, and the pause between them.
TRIES, PAUSE_S = 5, 0.1


class ClusterNodes(Nodes):
    """The primaries of the cluster at `url` (redis+cluster://, rediss+cluster://), in groups. Asks it for nothing yet."""

    def __init__(self, url: str, job: str, *, timeout_s: float, retries: int, known: Sequence[Address] = ()) -> None:
        self.url, self.job, self.timeout_s, self.retries = url, job, timeout_s, retries
        self._lock = threading.Lock()
        self._known = list(dict.fromkeys([*seeds(url), *known]))  # whom to ask: the seed may be the one that died
        self.control = self._control()

    @property
    def known(self) -> list[Address]:
        """Nodes that may be asked for the slot map."""
        with self._lock:
            return list(self._known)

    def slots(self, within_s: float | None = None) -> SlotMap:
        """The slot map as a node tells it now. redis-py's errors when none does in time, ConfigError when it is no cluster."""
        asked, deadline = self.known, time.monotonic() + (self.timeout_s if within_s is None else within_s)
        random.shuffle(asked)  # one that is cut off from the others, and tells what was, is not asked again and again
        failure: Exception = redis.ConnectionError("no node of the cluster is known")
        for address in asked:
            try:
                return self._ask(address, max(deadline - time.monotonic(), 0.1))
            except redis.AuthenticationError:
                raise
            except (redis.ConnectionError, redis.TimeoutError, ValueError, OSError) as error:
                failure = error
            except redis.ResponseError as error:
                if "cluster support disabled" in str(error).lower():
                    raise ConfigError(
                        f"the store at {redact(node_url(self.url, *address))} is no cluster: write redis:// (rediss://) for "
                        "independent servers"
                    ) from error
                failure = error
            if time.monotonic() >= deadline:
                break
        if isinstance(failure, ValueError):
            raise redis.exceptions.InvalidResponse(str(failure)) from failure
        raise failure

    def _ask(self, address: Address, limit_s: float) -> SlotMap:
        with contextlib.closing(self.client(node_url(self.url, *address))) as client:
            limit_s = min(limit_s, ASK_TIMEOUT_S)
            retry = Retry(ExponentialBackoff(cap=0.5, base=0.02), 0)
            client.connection_pool.connection_kwargs.update(socket_timeout=limit_s, socket_connect_timeout=limit_s, retry=retry)
            found = SlotMap.parse(client.execute_command("CLUSTER", "SLOTS"), address)
        if not found.ranges:
            raise redis.ConnectionError(f"{address[0]}:{address[1]} serves no slots: is the cluster set up?")
        with self._lock:
            self._known = list(dict.fromkeys([*seeds(self.url), *found.addresses()]))
        return found

    def address_of(self, place: str) -> Address:
        """Who serves the slot of `place` now. redis-py's ClusterDownError when nobody does."""
        return _served(self.slots(), place)

    def servers(self) -> list[str]:
        """The URL of each primary, the one with the control plane first, in the order of the places."""
        with translated(self.url):
            slots = self.slots()
            first = _served(slots, f"{self.job}.0")
        found = slots.primaries()
        at = found.index(first)
        return [node_url(self.url, *address) for address in found[at:] + found[:at]]

    def propose(self) -> list[str]:
        """A place for each group: see `smlt.store.slots`."""
        with translated(self.url):
            return choose_places(self.job, self.slots(), groups_of(self.url))

    def locate(self, places: Sequence[str], within_s: float | None = None) -> list[str]:
        """For each place the URL of the primary that serves it now; the cluster is asked anew, for so long at most."""
        with translated(self.url):
            slots = self.slots(within_s)
            return [node_url(self.url, *_served(slots, place)) for place in places]

    def run_ids(self, places: Sequence[str]) -> list[str]:
        """For each place the run id of the primary that serves it now: the server itself is asked whether it does.

        For some tenths of a second after a failover nodes tell of the old primary, which is a replica then.
        """
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_S)
            found = dict[str, str]()
            try:
                located = self.locate(places)
                for url, place in zip(located, places, strict=True):
                    found[url] = self._run_id_at(url, place)
                return [found[url] for url in located]
            except StoreUnavailable as error:
                failure = error
        raise failure

    def _run_id_at(self, url: str, place: str) -> str:
        with self.connected(url) as client, translated(self.url):
            try:
                client.exists(f"smlt:{{{place}}}:")
            except redis.ResponseError as error:
                # On its way to another one, and here until then.
                if isinstance(error, MovedError) or not (isinstance(error, AskError) or str(error).startswith("ASK ")):
                    raise
            return str(client.info("server").get("run_id", ""))

    @contextmanager
    def connected(self, url: str) -> Iterator[Any]:
        """A client of one of `servers`, closed afterwards."""
        with contextlib.closing(self.client(url)) as client:
            yield client

    def impatient(self, timeout_s: float) -> ClusterNodes:
        """The same cluster, with clients of their own that try once."""
        return ClusterNodes(self.url, self.job, timeout_s=timeout_s, retries=0, known=self.known)

    def _control(self) -> Any:
        host, port = seeds(self.url)[0]
        try:
            options: dict[str, Any] = dict(_parse_url(node_url(self.url, host, port)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"store {redact(self.url)}: {error}") from error
        secure = options.pop("connection_class", None) is redis.SSLConnection
        settings = {"socket_timeout": self.timeout_s, "socket_connect_timeout": self.timeout_s, "client_name": "smlt"}
        pool = _ConnectionPool(
            connection_class=_SecureToPlace if secure else _ToPlace,
            **(settings | options | {"protocol": 2, "decode_responses": False}),
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), 2 * self.retries),
            retry_on_error=_AGAIN,
            nodes=self,
            place=f"{self.job}.0",
        )
        client: Any = redis.Redis(connection_pool=pool)
        client.auto_close_connection_pool = True
        return client


class _ToPlace(_Connection):  # type: ignore[misc]
    """A connection to whoever serves the slot of a place when it is opened."""

    def __init__(self, *, nodes: ClusterNodes, place: str, **options: Any) -> None:
        super().__init__(**options)
        self._nodes, self._place = nodes, place

    def _connect(self) -> Any:
        self.host, self.port = self._nodes.address_of(self._place)
        return super()._connect()

    def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().read_response(*arguments, **options)
        except redis.ResponseError as error:
            if type(error) is redis.ResponseError and str(error).startswith(_ELSEWHERE):
                raise Elsewhere(str(error)) from error
            raise


class _SecureToPlace(_ToPlace, _SSLConnection):  # type: ignore[misc]
    """The same over TLS."""


def _served(slots: SlotMap, place: str) -> Address:
    address = slots.primary_of(slot_of(place))
    if address is None:
        raise ClusterDownError(f"CLUSTERDOWN {slots.covered()} of {SLOTS} slots are served; {slot_of(place)} is not")
    return address
