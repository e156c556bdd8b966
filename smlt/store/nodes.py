"""The nodes of a parameter store: what they are called in keys, and where each is now.

A store is k nodes. Node j holds the keys whose hash tag begins with "J.j" (J is the job): the first, "{J.0}", the control
plane besides. Such a tag without its braces is a *place*. What is behind a place is found out by `locate`: of a list of
independent servers always the same one; of a cluster (`smlt.store.cluster`) the primary that serves the tag's slot then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from smlt.errors import ConfigError
from smlt.store.translation import translated
from smlt.store.url import endpoints, redact


class Nodes:
    """The independent servers that a URL lists, or the one that it names. `control` is the client of the control plane."""

    def __init__(self, url: str, job: str, *, timeout_s: float, retries: int) -> None:
        self.url, self.job, self.timeout_s, self.retries = url, job, timeout_s, retries
        self._urls = endpoints(url)
        self.control: Any = self.client(self._urls[0])

    def client(self, url: str) -> Any:
        """A redis-py client of the server at `url` (redis://, rediss:// or unix://); it connects when first used."""
        # redis-py's own annotations differ from release to release
        try:
            made: Any = redis.Redis.from_url(
                url,
                protocol=2,
                socket_timeout=self.timeout_s,
                socket_connect_timeout=self.timeout_s,
                client_name="smlt",
                retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), self.retries),
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"store {redact(url)}: {error}") from error
        # Options in the URL win over the arguments above: these two would change what is answered.
        made.connection_pool.connection_kwargs.update(protocol=2, decode_responses=False)
        return made

    def servers(self) -> list[str]:
        """The URL of each server that holds keys, the control plane's first."""
        return list(self._urls)

    def propose(self) -> list[str]:
        """A place for each node."""
        return [f"{self.job}.{j}" for j in range(len(self._urls))]

    def locate(self, places: Sequence[str], within_s: float | None = None) -> list[str]:
        """For each place the URL of the server that has it now. ConfigError when they are those of another list."""
        if len(places) != len(self._urls):
            raise ConfigError(self.another_number(len(places)))
        return list(self._urls)

    def run_ids(self, places: Sequence[str]) -> list[str]:
        """For each place the run id of the server that has it now."""
        return [self._run_id(url) for url in self.locate(places)]

    def _run_id(self, url: str) -> str:
        with self.connected(url) as client, translated(url):
            return str(client.info("server").get("run_id", ""))

    def another_number(self, count: int) -> str:
        """What to say to a worker whose list is longer or shorter than the others'."""
        return (
            f"job {self.job}: the store at {redact(self.url)} has {_nodes(len(self._urls))}, the workers that are already "
            f"there use {count}: give every worker the same URL"
        )

    @contextmanager
    def connected(self, url: str) -> Iterator[Any]:
        """A client of one of `servers`, closed afterwards unless it is the control plane's."""
        if url == self._urls[0]:
            yield self.control
            return
        client = self.client(url)
        try:
            yield client
        finally:
            client.close()

    def impatient(self, timeout_s: float) -> Nodes:
        """The same nodes, with clients of their own that try once."""
        return Nodes(self.url, self.job, timeout_s=timeout_s, retries=0)

    def close(self) -> None:
        """Close what is open."""
        self.control.close()


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"
