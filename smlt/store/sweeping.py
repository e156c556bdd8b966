"""Going through all keys of a name pattern on every node of a parameter store: to count them, to delete them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

from smlt.errors import StoreError
from smlt.store.nodes import Nodes
from smlt.store.translation import translated
from smlt.store.url import is_cluster

#: Keys in one UNLINK.
BATCH = 500
#: A cluster whose slots move, or whose primary fails, while keys are deleted: tries, and the pause between them.
TRIES, PAUSE_S = 5, 0.2


def count_keys(nodes: Nodes, pattern: str) -> int:
    """How many keys match the pattern."""
    total = 0
    for url in nodes.servers():
        with nodes.connected(url) as client, _told(nodes, url):
            total += sum(1 for _ in client.scan_iter(match=pattern, count=1000))
    return total


def delete_keys(nodes: Nodes, pattern: str, wanted: Callable[[bytes], bool] = lambda key: True) -> int:
    """Delete the keys that match the pattern and are `wanted`, on every node; returns how many there were.

    A node that cannot be reached does not keep the others from being cleaned: its error is raised at the end.
    """
    deleted = 0
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_S)
        failure: StoreError | None = None
        servers = nodes.servers()
        for url in servers:
            try:
                with nodes.connected(url) as client, _told(nodes, url):
                    deleted += _delete_on(client, pattern, wanted)
            except StoreError as error:
                failure = failure or error
        if not is_cluster(nodes.url) or (failure is None and nodes.servers() == servers):
            break
    if failure is not None:
        raise failure
    return deleted


def _delete_on(client: Any, pattern: str, wanted: Callable[[bytes], bool]) -> int:
    deleted = 0
    batch: list[bytes] = []
    for key in client.scan_iter(match=pattern, count=1000):
        if wanted(key):
            batch.append(key)
        if len(batch) == BATCH:
            deleted += _unlink(client, batch)
            batch = []
    return deleted + _unlink(client, batch)


def _unlink(client: Any, keys: list[bytes]) -> int:
    """Keys of one tag at a time: a cluster takes only those of one slot in a command."""
    return sum(int(client.unlink(*group)) for _, group in groupby(sorted(keys), lambda key: key.partition(b"}")[0]))


def _told(nodes: Nodes, url: str) -> AbstractContextManager[None]:
    return translated(nodes.url if is_cluster(nodes.url) else url)
