"""Several embedded stores as the nodes of one parameter store."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType

from smlt.errors import ConfigError
from smlt.store.embedded import EmbeddedStore, default_memory_bytes, new_password
from smlt.store.url import NODES_MAX


class EmbeddedStores:
    """`count` private Valkeys that live as long as this process, or until `close`: `url` lists them.

    `memory_bytes` and the rest are for each of them, as for `EmbeddedStore`; by default they share its memory. All have
    the same password. `logs` is a folder for their logs. Raises as `EmbeddedStore` does.
    """

    def __init__(
        self, count: int, *, memory_bytes: int | None = None, logs: Path | None = None, bind: Sequence[str] = ()
    ) -> None:
        check_count(count)
        password = new_password()
        self.nodes: list[EmbeddedStore] = []
        try:
            for j in range(count):
                self.nodes.append(
                    EmbeddedStore(
                        memory_bytes=memory_bytes or default_memory_bytes() // count,
                        log_path=logs / f"store-{j}" if logs is not None else None,
                        bind=bind,
                        password=password,
                    )
                )
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """For workers on this machine: unix sockets."""
        return ",".join(node.url for node in self.nodes)

    @property
    def tcp_url(self) -> str:
        """The same store over loopback TCP."""
        return ",".join(node.tcp_url for node in self.nodes)

    def tcp_url_at(self, host: str) -> str:
        """The same store at `host`, one of the addresses in `bind`."""
        return ",".join(node.tcp_url_at(host) for node in self.nodes)

    @property
    def life_lines(self) -> list[int]:
        """Open files: each server lives as long as any process has its own (`EmbeddedStore.life_line`)."""
        return [node.life_line for node in self.nodes]

    def outlives(self, dead: Collection[int]) -> bool:
        """Whether it goes on without these nodes: it does not."""
        return not dead

    def close(self) -> None:
        """End the servers. Safe to call twice."""
        with contextlib.ExitStack() as stack:  # all of them, whatever one says
            for node in self.nodes:
                stack.callback(node.close)

    def __enter__(self) -> EmbeddedStores:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_count(count: int) -> None:
    """ConfigError unless so many nodes can make a store."""
    if not 1 <= count <= NODES_MAX:
        raise ConfigError(f"{count} nodes: a store has 1 to {NODES_MAX}")
