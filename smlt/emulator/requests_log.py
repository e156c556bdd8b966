"""The request log: what was asked of AWS, by whom, on what."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from smlt.emulator.operations import Operation
from smlt.emulator.principals import Principals

#: Older entries are dropped: a run of hours asks a great deal.
KEPT = 1_000_000


class Asked(NamedTuple):
    """An IAM action that a request needs. `principal` is the name of the user or role, "" for keys that IAM does not know."""

    service: str
    action: str
    principal: str = ""
    resource: str = ""


class RequestLog:
    """Collects entries; reading it gives a copy. Requests that need several actions have an entry for each."""

    def __init__(self, principals: Principals) -> None:
        self._principals = principals
        self._entries: deque[Asked] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def add(self, operation: Operation) -> None:
        """Note a request."""
        principal = self._principals.of_key(operation.access_key)
        name = principal.name if principal else ""
        with self._lock:
            if not operation.needs:
                self._entries.append(Asked(operation.service, f"{operation.service}:", name))
            for need in operation.needs:
                self._entries.append(Asked(operation.service, need.action, name, need.resource))

    def __iter__(self) -> Iterator[Asked]:
        with self._lock:
            return iter(list(self._entries))

    def clear(self) -> None:
        """Begin anew."""
        with self._lock:
            self._entries.clear()
